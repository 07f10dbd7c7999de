"""The pictures of a run: each is one matplotlib figure, for a file and for a page."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

TEXT = "#010203"  # in a page it becomes the page's own colour, light or dark
INK = (0.145, 0.388, 0.922)
SHARES = LinearSegmentedColormap.from_list("shares", [(*INK, 0.0), (*INK, 1.0)])
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alter",  # the same picture is the same file
    "text.parse_math": False,  # a label may hold dollar signs
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), TEXT
    ),
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
PER_CELL, SMALL_CELL, MOST_ANNOTATED = 0.34, 0.2, 12  # inches, inches, columns
CURVES = 10.0  # inches


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as PNG, on white."""
    with rc_context(STYLE):
        figure.savefig(file, dpi=150, facecolor="white", bbox_inches=_laid_out(figure))


def pixels(figure: Figure) -> np.ndarray:
    """A figure on white, [height, width, 3] in bytes."""
    with rc_context(STYLE):
        canvas: Any = FigureCanvasAgg(figure)
        figure.set_facecolor("white")
        figure.set_dpi(150)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def svg(figure: Figure) -> str:
    """A figure as an SVG element whose text has the colour of the page around it."""
    stream = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="svg", bbox_inches=_laid_out(figure), metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(TEXT, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _laid_out(figure: Figure) -> Bbox:
    """Lays a figure out once, whatever the number of its files; returns what of it is drawn on, in inches.

    ``bbox_inches="tight"`` would do so in a drawing of its own for every file.
    """
    FigureCanvasAgg(figure)
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)
    return figure.get_tightbbox().padded(0.1)


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], begins: float | None) -> Figure:
    """Lines over steps, a panel beside another.

    Args:
        panels: title to name to points; a name that begins with ``_`` is drawn faint.
        begins: the step at which stage 2 begins, or None.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(CURVES, 3.6), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, points in lines.items():
                steps, values = zip(*points, strict=True) if points else ((), ())
                faint = name.startswith("_")
                axes.plot(
                    steps,
                    values,
                    label=name.lstrip("_"),
                    linewidth=1.0 if faint else 1.6,
                    alpha=0.7 if faint else 1.0,
                    marker="o" if len(points) < 30 and not faint else None,
                    markersize=3,
                )
            if begins is not None:
                axes.axvline(begins, color=TEXT, linewidth=0.8, linestyle=":")
            axes.set(title=title, xlabel="step" if begins is None else "step; stage 2 begins at the dotted line")
            if len(lines) > 4:
                figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
            else:
                axes.legend(fontsize=8)
        return figure


def bars(shares: Mapping[str, float], title: str) -> Figure:
    """Shares as horizontal bars."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 0.6 + 0.3 * len(shares)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(list(shares), list(shares.values()), color=INK)
        axes.bar_label(drawn, [f" {share:.1%}" for share in shares.values()], color=TEXT)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title)
        return figure


def heatmaps(
    tables: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    numbers: str | None = "{:.2f}",
    top: float = 1.0,
    cell: float = PER_CELL,
) -> Figure:
    """Tables of shares as small multiples, with the numbers in the cells where there is room.

    Args:
        tables: title to [rows, columns].
        rows: their names.
        columns: their names.
        numbers: how a cell's number is written; None for none.
        top: the value of the darkest cell.
        cell: its side in inches; of many columns it is small in any case.
    """
    annotated = len(columns) <= MOST_ANNOTATED
    cell = cell if annotated else SMALL_CELL
    names = 0.075 * max(map(len, rows))  # to the left of the first
    width = max(cell * len(columns) + 0.25, 1.0)
    across = min(len(tables), max(1, math.floor((CURVES - names) / width)))
    down = math.ceil(len(tables) / across)
    height = cell * len(rows) + 0.3 + 0.06 * max(map(len, columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(names + width * across, height * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for place, (axes, title) in enumerate(
            zip(grid.flat, [*tables, *[""] * (grid.size - len(tables))], strict=True)
        ):
            if not title:
                axes.set_axis_off()
                continue
            values = np.asarray(tables[title], dtype=float)
            shares = np.clip(values / top, 0, 1)
            axes.pcolormesh(shares, cmap=SHARES, vmin=0, vmax=1)
            axes.invert_yaxis()
            axes.set_aspect("equal")
            axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 if max(map(len, columns)) > 2 else 0)
            axes.set_yticks(np.arange(len(rows)) + 0.5, rows if place % across == 0 else [""] * len(rows))
            axes.tick_params(length=0, labelsize=7)
            axes.spines[:].set_visible(False)
            axes.set_title(title, fontsize=8)
            if not (annotated and numbers):
                continue
            for (row, column), value in np.ndenumerate(values):
                _number(axes, row, column, numbers.format(value), shares)
        return figure


def confusion(targets: Sequence[str], answers: Sequence[str], most: int = 25) -> Figure:
    """Who is taken for whom: rows are the right answers, columns what was answered, cells counts.

    Args:
        targets: what is right.
        answers: what was answered.
        most: classes that are shown; the rarer ones are one class.
    """
    counts = Counter([*targets, *answers])
    kept = sorted(label for label, _ in counts.most_common(most))
    names = [*kept, f"{len(counts) - most} others"] if len(counts) > most else kept
    places = {label: kept.index(label) if label in kept else len(kept) for label in counts}
    table = np.zeros((len(names), len(names)))
    for target, answer in zip(targets, answers, strict=True):
        table[places[target], places[answer]] += 1
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure = heatmaps({"right answer (row), answered (column)": shares}, names, names, numbers=None)
    axes = figure.axes[0]
    for place in range(len(names)):  # what is right is found on the diagonal
        axes.add_patch(Rectangle((place, place), 1, 1, fill=False, edgecolor=TEXT, linewidth=0.4, alpha=0.5))
    for (row, column), count in np.ndenumerate(table):
        if count:
            _number(axes, row, column, f"{count:.0f}", shares)
    return figure


def _number(axes: Axes, row: int, column: int, text: str, shares: np.ndarray) -> None:
    """Writes into a cell. It is inside its axes in any case, so the layout need not measure it."""
    colour = "white" if shares[row, column] > 0.55 else TEXT
    place = column + 0.5, row + 0.5
    axes.text(*place, text, ha="center", va="center", fontsize=6, color=colour).set_in_layout(False)
