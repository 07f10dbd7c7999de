"""From the cells' answers to ``compare.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from alter.compare.cell import DRAWS
from alter.compare.methods import Method
from alter.data import Task
from alter.metrics import RESAMPLES, interval_and_p

Cells = Mapping[str, Mapping[int, Path]]  # the folders by method and seed


class Difference(NamedTuple):
    """One method minus another: the mean, its 95% interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


class Answers:
    """What every cell answered, as the first metric of every task: on all rows, and on resampled ones.

    Two methods' draws are of the same rows, since these depend on the number of rows alone (`alter.metrics.bootstrap`).

    Args:
        cells: complete.
        metrics: of each task, the first.
        split: whose rows were answered.
    """

    def __init__(self, cells: Cells, metrics: Mapping[str, str], split: str) -> None:
        self._values: dict[tuple[str, int, str], float] = {}
        self._draws: dict[tuple[str, int, str], np.ndarray] = {}
        for method, seeds in cells.items():
            for seed, folder in seeds.items():
                found = json.loads((folder / f"{split}.json").read_text())["tasks"]
                with np.load(folder / f"{split}.npz") as draws:
                    for task, metric in metrics.items():
                        self._values[method, seed, task] = found[task][metric]
                        name = f"{DRAWS}{task}"
                        self._draws[method, seed, task] = draws[name if name in draws else task]  # as in older cells

    def value(self, method: str, seed: int, task: str) -> float:
        """The task's first metric on all rows."""
        return self._values[method, seed, task]

    def difference(self, first: str, second: str, seeds: Sequence[int], tasks: Sequence[str]) -> Difference:
        """The mean over tasks of one method minus another's, paired by seed and row.

        The interval is a hierarchical bootstrap: seeds are drawn with replacement, and rows within each.
        """
        pairs = [[(seed, task) for task in tasks] for seed in seeds]
        value = fmean(fmean(self.value(first, *p) - self.value(second, *p) for p in by_task) for by_task in pairs)
        by_seed = np.stack(
            [np.mean([self._draws[first, *p] - self._draws[second, *p] for p in by_task], axis=0) for by_task in pairs]
        )
        drawn = np.random.default_rng(len(seeds)).integers(len(seeds), size=(len(seeds), RESAMPLES))
        differences = by_seed[drawn, np.arange(RESAMPLES)].mean(0)
        return Difference(value, *interval_and_p(differences))


def against(
    other: str | None, cells: Cells, answers: Answers, tasks: Sequence[str]
) -> dict[str, dict[str, float] | None]:
    """What the average of every method is above another's; None where there is no such other."""
    seeds = list(next(iter(cells.values())))
    return {
        name: answers.difference(name, other, seeds, tasks)._asdict() if other and other in cells else None
        for name in cells
    }


def summarise(cells: Cells, methods: Mapping[str, Method], tasks: Sequence[Task], split: str) -> dict[str, Any]:
    """Returns what ``compare.json`` says of the methods.

    Args:
        cells: complete; every method with the same seeds.
        methods: by name.
        tasks: of the mixture.
        split: whose rows were answered.
    """
    metrics = {task.name: task.metrics[0] for task in tasks}
    answers, names = Answers(cells, metrics, split), list(metrics)
    seeds = list(next(iter(cells.values())))
    found = {
        method: {seed: json.loads((folder / f"{split}.json").read_text()) for seed, folder in own.items()}
        for method, own in cells.items()
    }
    all_cells = [cell for own in found.values() for cell in own.values()]
    averages = {m: [fmean(answers.value(m, seed, name) for name in names) for seed in seeds] for m in cells}
    baselines = [name for name in cells if methods[name].baseline]
    best = max(baselines, key=lambda name: fmean(averages[name]), default=None)
    above_best, above_two_stage = (against(other, cells, answers, names) for other in (best, "two_stage"))
    result: dict[str, Any] = {
        "split": split,
        "seeds": seeds,
        "primary_metrics": metrics,
        "best_baseline": best,
        **{key: "; ".join(dict.fromkeys(cell[key] for cell in all_cells)) for key in ("commit", "hardware")},
        "methods": {},
    }
    for name, own in found.items():
        any_seed = next(iter(own.values()))
        result["methods"][name] = {
            "about": methods[name].about,
            "baseline": methods[name].baseline,
            "tasks": {
                task.name: {m: _spread([own[seed]["tasks"][task.name][m] for seed in seeds]) for m in task.metrics}
                for task in tasks
            },
            "average": {k: v for k, v in _spread(averages[name]).items() if k != "seeds"},
            "trainable_parameters": any_seed["trainable_parameters"],
            "tokens": over_seeds(fmean, [own[seed]["tokens"] for seed in seeds]),
            "validation_loss": over_seeds(fmean, [own[seed].get("validation_loss") for seed in seeds]),
            # a median, since the first cell to draw an example computes its trunk for all
            "tokens_per_second": over_seeds(median, [own[seed]["tokens_per_second"] for seed in seeds]),
            "peak_memory_bytes": max(own[seed]["peak_memory_bytes"] for seed in seeds),
            "learning_rate_factor": _factor(cells[name][seeds[0]]),
            "vs_best_baseline": above_best[name],
            "vs_two_stage": above_two_stage[name],
            "routing": any_seed["routing"],
        }
    if "alone" in cells and len(cells) > 1:
        result["negative_transfer"] = {
            name: {task: answers.difference(name, "alone", seeds, [task])._asdict() for task in names}
            for name in cells
            if name != "alone"
        }
    return result


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "seeds": list(values)}


def over_seeds(statistic: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """A statistic of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return statistic(known) if known else None


def _factor(folder: Path) -> float:
    return float(folder.name.partition("-lr")[2] or 1.0)
