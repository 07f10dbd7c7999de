"""Draws the pictures of docs/two_stages.md from one finished cell of `alter compare`.

    python benchmarks/stage_pictures.py runs/compare/customer_service/cells/two_stage/seed13

Left: each task's validation loss through both stages. Right: who answers whom after stage 2, the mean over the adapted blocks.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

PICTURES = Path(__file__).parents[1] / "docs"


def losses(run):
    """Each task's validation losses as (step, loss), over both stages, and the step at which stage 2 begins."""
    found, start, begins = {}, 0, 0
    for stage in ("stage1", "stage2"):
        last = 0
        with (run / stage / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                last = int(row["step"])
                if row["metric"].startswith("val/loss/"):
                    task = row["metric"].removeprefix("val/loss/")
                    found.setdefault(task, []).append((start + last, float(row["value"])))
        begins = begins or last
        start += last
    return found, begins


def mean_gates(cell, kind):
    (file,) = [f for f in (cell / "test.json", cell / "validation.json") if f.is_file()][:1]
    return np.mean(list(json.loads(file.read_text())["routing"][kind].values()), axis=0)


def heatmap(axes, table, tasks, columns, title):
    axes.imshow(table, cmap="Blues", vmin=0, vmax=table.max())
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    for row, column in np.ndindex(table.shape):
        dark = table[row, column] > 0.6 * table.max()
        axes.text(
            column,
            row,
            f"{table[row, column]:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    axes.set_title(title, fontsize=10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path)
    cell = parser.parse_args().cell
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "alter"  # the same picture, the same file
    from matplotlib import pyplot

    found, begins = losses(cell / "run")
    tasks = json.loads((cell / "run" / "model" / "alter.json").read_text())["tasks"]

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for task in tasks:
        axes.plot(*zip(*found[task], strict=True), marker="o", markersize=3, label=task)
    axes.axvline(begins, color="grey", linestyle="--", linewidth=1)
    axes.text(begins, axes.get_ylim()[1], " stage 2", va="top", color="grey")
    axes.set(xlabel="step", ylabel="validation loss", yscale="log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(PICTURES / "two_stages_loss.svg", bbox_inches="tight", metadata={"Date": None})

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), width_ratios=[6, 3], layout="constrained")
    heatmap(left, mean_gates(cell, "experts"), tasks, tasks, "selector: task by task expert")
    shares = mean_gates(cell, "shared")
    shared = [f"shared {k + 1}" for k in range(shares.shape[1] - 1)]
    heatmap(right, shares, tasks, ["task experts", *shared], "gate: task experts or shared")
    figure.savefig(PICTURES / "two_stages_gates.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
