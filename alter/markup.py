"""Pages of one file that need nothing else: they work offline, in light and dark, narrow and wide, and print."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: 37 99 235; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; } a { color: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
li { overflow-wrap: anywhere; }
.text { text-align: left; }
.long td { white-space: pre-line; overflow-wrap: anywhere; vertical-align: top; text-align: left; min-width: 8rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { vertical-align: bottom; white-space: normal; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { font-size: .9rem; }
pre { font-size: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 12px; } nav { display: none; }
  figure, tr { break-inside: avoid; } h2, h3, summary, thead { break-after: avoid; }
  .wide, figure { overflow: visible; } figure svg { max-width: 100%; height: auto; }
  table { font-size: 10.5px; } th, td { white-space: normal; padding: .2rem .35rem; }
  .long td { min-width: 0; overflow-wrap: break-word; }
  th:first-child, td:first-child { position: static; }
  details::details-content { content-visibility: visible; display: block; } /* paper cannot be clicked */
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
        + "\n</body></html>\n"
    )


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], long: bool = False) -> str:
    """A table of plain texts; a number that begins with ``**`` is bold, and columns of numbers stand to the right.

    Args:
        head: the columns' names.
        rows: the cells.
        long: whether cells hold sentences, which are then broken.
    """
    shown = html.escape if long else _bold  # a sentence is somebody's own
    kinds = ["" if number and not long else ' class="text"' for number in numeric(rows)]
    top = "".join(f"<th{kind}>{html.escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{shown(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    kind = ' class="long"' if long else ""
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers."""
    return [all(cell[:1] in "0123456789+-*" for cell in column) for column in zip(*rows, strict=True)]


def folded(title: str, inside: str, opened: bool = False) -> str:
    """A part that opens and closes at a click."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>{inside}</details>"


def figure(svg: str, caption: str = "") -> str:
    """A picture with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _bold(cell: str) -> str:
    return f"<b>{html.escape(cell.strip('*'))}</b>" if cell.startswith("**") else html.escape(cell)
