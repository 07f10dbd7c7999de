"""The comparison as Markdown, and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown: results, cost, and what the mixture does to each task."""
    parts = [
        _table(*results_table(result)),
        "",
        *notes(result),
        "",
        _table(*cost_table(result)),
    ]
    if "negative_transfer" in result:
        parts += ["", TRANSFER, "", _table(*transfer_table(result))]
    return "\n".join(parts) + "\n"


TRANSFER = (
    "Each task against the same task trained alone, in points (first metric x 100); in bold where the 95% interval leaves "
    "out zero."
)


def results_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each task's first metric x 100, the average, the difference from the best baseline."""
    metrics = result["primary_metrics"]
    head = ["method", *(f"{task} ({metric})" for task, metric in metrics.items()), "average", "against best baseline"]
    best = max((m["average"]["mean"] for m in result["methods"].values()), default=0.0)
    rows = []
    for name, method in result["methods"].items():
        cells = [_spread(method["tasks"][task][metric]) for task, metric in metrics.items()]
        average = _spread(method["average"])
        rows.append(
            [
                f"{name}{' (baseline)' if method['baseline'] else ''}",
                *cells,
                f"**{average}**" if method["average"]["mean"] == best else average,
                _difference(method["vs_best_baseline"]),
            ]
        )
    return head, rows


def cost_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each method is and takes."""
    head = ["method", "what it is", "trained parameters", "tokens seen", "tokens/s", "peak memory", "lr x"]
    rows = [
        [
            name,
            method["about"],
            f"{method['trainable_parameters']:,}",
            _number(method["tokens"]),
            _number(method["tokens_per_second"]),
            f"{method['peak_memory_bytes'] / 2**30:.1f} GB",
            f"{method['learning_rate_factor']:g}",
        ]
        for name, method in result["methods"].items()
    ]
    return head, rows


def transfer_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every method's tasks against their alone-trained selves."""
    tasks = list(result["primary_metrics"])
    rows = []
    for name, differences in result["negative_transfer"].items():
        cells = []
        for task in tasks:
            found = differences[task]
            text = f"{100 * found['difference']:+.1f}"
            cells.append(f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text)
        rows.append([name, *cells])
    return ["method", *tasks], rows


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know beside the numbers."""
    seeds = result["seeds"]
    spread = "mean ± standard deviation over the seeds" if len(seeds) > 1 else "one seed"
    yield f"- Split: {result['split']}. Seeds: {', '.join(map(str, seeds))}; {spread}. All metrics x 100."
    if result["best_baseline"]:
        yield (
            f"- Best baseline: {result['best_baseline']}. Differences of the average: paired bootstrap over seeds and rows, 95% "
            "interval, two-sided p."
        )
    if "parameter_budget" in result:
        budget = result["parameter_budget"]
        apart = [
            name for name, method in result["methods"].items() if abs(method["trainable_parameters"] / budget - 1) > 0.1
        ]
        yield (
            f"- Parameter budget: {budget:,}, that of the recipe's two stages; every method that trains is within 10% of it"
            f"{', except ' if apart else ''}{', '.join(apart)}."
        )
    for key in ("command", "commit", "hardware", "hours"):
        if result.get(key):
            yield f"- {key.capitalize()}: {result[key]}"


def _spread(found: Mapping[str, Any]) -> str:
    sd = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
    return f"{100 * found['mean']:.1f}{sd}"


def _difference(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['difference']:+.1f} [{low:+.1f}, {high:+.1f}], p = {found['p']:.3f}"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:" if number else "---" for number in _numeric(rows)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers."""
    return [all(cell[:1] in "0123456789+-*" for cell in column) for column in zip(*rows, strict=True)]


# -- HTML -------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: 37 99 235; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
li { overflow-wrap: anywhere; }
.text { text-align: left; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { vertical-align: bottom; }
.heat { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.heat figure { margin: 0; } .heat figcaption { font-size: .8rem; margin-bottom: .2rem; }
.heat table { font-size: .7rem; } .heat th, .heat td { border: 0; padding: 0 .25rem; text-align: center; }
.heat td { min-width: 1.9rem; height: 1.3rem; background: rgb(var(--ink) / var(--share)); }
.heat th:first-child { text-align: right; font-weight: normal; }
@media print { body { max-width: none; } details { break-inside: avoid; } }
"""


def page(result: Mapping[str, Any], title: str) -> str:
    """One self-contained HTML page: the tables and the routing heatmaps."""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<ul>{''.join(f'<li>{html.escape(note[2:])}</li>' for note in notes(result))}</ul>",
        "<h2>Results</h2>",
        _html_table(*results_table(result)),
        "<h2>Cost</h2>",
        _html_table(*cost_table(result)),
    ]
    if "negative_transfer" in result:
        parts += ["<h2>Against training alone</h2>", f"<p>{TRANSFER}</p>", _html_table(*transfer_table(result))]
    routed = {name: method["routing"] for name, method in result["methods"].items() if method["routing"]}
    if routed:
        parts.append(
            "<h2>Routing</h2><p>Mean gate of each task (rows) on each expert (columns), by layer, on validation examples; "
            "the first seed. Under “shared”, column 0 is the mixture of task experts.</p>"
        )
        parts += [_heatmaps(name, routing, list(result["primary_metrics"])) for name, routing in routed.items()]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kinds = ["" if number else ' class="text"' for number in _numeric(rows)]
    top = "".join(f"<th{kind}>{html.escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{_bold(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _bold(cell: str) -> str:
    inner = html.escape(cell.strip("*"))
    return f"<b>{inner}</b>" if cell.startswith("**") else inner


def _heatmaps(name: str, routing: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    figures = []
    for kind, layers in routing.items():
        for layer, table in layers.items():
            head = "".join(f"<th>{i}</th>" for i in range(len(table[0])))
            rows = "".join(
                f"<tr><th>{html.escape(task)}</th>"
                + "".join(f'<td style="--share:{share:.3f}" title="{share:.3f}">{share:.2f}</td>' for share in row)
                + "</tr>"
                for task, row in zip(tasks, table, strict=False)
            )
            caption = f"{html.escape(layer)} ({kind})"
            figures.append(
                f"<figure><figcaption>{caption}</figcaption><table><tr><th></th>{head}</tr>{rows}</table></figure>"
            )
    return f'<details><summary>{html.escape(name)}</summary><div class="heat">{"".join(figures)}</div></details>'
