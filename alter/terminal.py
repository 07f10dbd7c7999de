"""Text for a terminal: as wide as it is, and tables in columns."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence

WIDEST = 110  # characters of a line that is read with ease


def width() -> int:
    """Characters of a line: of the terminal (or the variable COLUMNS) as far as a line of it is read with ease."""
    return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)


def cut(text: str, room: int) -> str:
    """The text, or as much of its beginning as there is room for."""
    return text if len(text) <= room else f"{text[: room - 3]}..."


def columns(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lines of cells as a table, as narrow as its cells allow.

    Args:
        lines: the cells, of each line as many.
        right: the columns that stand to the right, such as numbers.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def narrowed(lines: Sequence[Sequence[str]], keep: int, right: Collection[int] = ()) -> str:
    """The same, without the last columns where the terminal has no room for them; the first ``keep`` stay."""
    count = len(lines[0])
    while True:
        text = columns([line[:count] for line in lines], right)
        if count <= keep or max(map(len, text.splitlines())) <= width():
            return text
        count -= 1
