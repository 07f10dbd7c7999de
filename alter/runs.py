"""Finished and unfinished runs beside each other: a table of them, and what differs between two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from alter.errors import AlterError
from alter.results import measured, overlap
from alter.terminal import columns, cut, narrowed, width
from alter.yaml_file import read_yaml

Metrics = Mapping[str, Mapping[str, Any]]
NARROWEST = 20  # characters of a column


@dataclass
class Run:
    """A run folder.

    Attributes:
        folder: of the run.
        recipe: its complete recipe.
        progress: its finished steps.
        results: of its test, or None where it is not finished.
    """

    folder: Path
    recipe: dict[str, Any]
    progress: dict[str, Any]
    results: dict[str, Any] | None

    @property
    def score(self) -> float | None:
        """The mean over the tasks of each task's first metric."""
        if self.results is None:
            return None
        return fmean(next(iter(metrics.values()))["value"] for metrics in self.results["tasks"].values())

    @property
    def seconds(self) -> float:
        """Of its steps, and of its test."""
        tested = (self.results["seconds"]["test"] or 0.0) if self.results else 0.0
        return float(sum(record["seconds"] for record in self.progress.values()) + tested)

    @property
    def trained(self) -> int:
        """The most parameters that a step of it trained."""
        return max((int(record.get("trainable_parameters", 0)) for record in self.progress.values()), default=0)

    @property
    def memory(self) -> int:
        """The most memory that a step of it, or its test, took, in bytes."""
        records = [self.results or {}, *self.progress.values()]
        return max(int(record.get("peak_memory_bytes", 0)) for record in records)

    @property
    def tasks(self) -> list[str]:
        """Of its recipe, by name."""
        return [task["name"] for task in self.recipe["data"]["tasks"]]

    @property
    def state(self) -> str:
        """Tested, or the last step that is finished."""
        return "tested" if self.results is not None else f"{[*self.progress][-1]} done" if self.progress else "begun"


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        AlterError: there is none, or a file of it is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise AlterError(f"{folder}: no run here, recipe.yaml is missing; name a folder that `alter fit` has written.")
    try:
        recipe = read_yaml(folder / "recipe.yaml")
        found = [_json(folder / name) for name in ("progress.json", "results.json")]
        run = Run(folder, dict(recipe), found[0] or {}, found[1])
        _ = run.score, run.state, run.tasks, run.seconds, run.trained, run.memory  # they read what else may be damaged
        for entry in (entry for found in (run.results or {"tasks": {}})["tasks"].values() for entry in found.values()):
            _ = [float(entry[key]) for key in ("value", "low", "high")]
        return run
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AlterError) as error:
        raise AlterError(f"{folder}: a file of this run is damaged ({error}); run it again, or remove it.") from error


def _json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """All runs in a folder and below, the best first, those without results last; and what is wrong with damaged ones.

    Raises:
        AlterError: there is none, or all are damaged.
    """
    runs, problems = [], list[str]()
    for file in sorted(folder.rglob("recipe.yaml")):
        if not (file.parent / "env.txt").is_file():
            continue
        try:
            runs.append(read_run(file.parent))
        except AlterError as error:
            problems += error.messages
    if not runs:
        missing = f"{folder}: no run here or below; name a folder that `alter fit` has written runs into."
        raise AlterError(*(problems or [missing]))
    return sorted(runs, key=lambda run: (run.score is None, -(run.score or 0.0), str(run.folder))), problems


def runs_table(folder: Path) -> str:
    """A table of the runs in a folder, the best first; damaged ones are named below it."""
    runs, problems = find_runs(folder)
    head = ["run", "state", "mean", "tasks", "minutes", "trained", "memory", "when"]
    lines = [head]
    for run in runs:
        when = datetime.fromtimestamp((run.folder / "recipe.yaml").stat().st_mtime)
        lines.append(
            [
                str(run.folder),
                run.state,
                "-" if run.score is None else f"{run.score:.3f}",
                str(len(run.tasks)),
                f"{run.seconds / 60:.1f}",
                f"{run.trained:,}" if run.trained else "-",
                f"{run.memory / 2**30:.1f} GiB" if run.memory else "-",
                f"{when:%Y-%m-%d %H:%M}",
            ]
        )
    table = narrowed(lines, keep=5, right=range(2, 7))
    text = f"{table}\n\nmean: over the tasks, of each task's first metric on the test split."
    if len({tuple(sorted(run.results["tasks"])) for run in runs if run.results}) > 1:
        text += " These runs have different tasks, so their means do not compare."
    return "\n".join([text, *(f"left out: {problem}" for problem in problems)])


def diff(first: Path, second: Path) -> str:
    """The recipe's lines in which two runs differ, and how each metric changes from the first to the second."""
    one, other = read_run(first), read_run(second)
    names = [_end(str(folder)) for folder in (first, second)]
    lines = [["recipe", *names], *_recipe_changes(one.recipe, other.recipe)]
    text = columns(lines) if len(lines) > 1 else "The recipes are the same, but for the run folder."
    if one.results is None or other.results is None:
        missing = first if one.results is None else second
        return f"{text}\n\n{missing}: no results yet, so no metrics to compare."
    table = [["metric", *names, "change", ""], *_metric_changes(one.results, other.results)]
    return f"{text}\n\n{narrowed(table, keep=4, right=(3,))}"


def _recipe_changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[list[str]]:
    before, after = (dict(_leaves(recipe)) for recipe in (one, other))
    keys = [*before, *(key for key in after if key not in before)]
    changed = [key for key in keys if key != "run" and before.get(key) != after.get(key)]
    room = (width() - max(map(len, changed), default=0) - 4) // 2  # of a value
    for key in changed:
        old, new = (_text(found[key]) if key in found else "-" for found in (before, after))
        yield [key, *_where_they_differ(old, new, max(room, NARROWEST))]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots and their values; the tasks by their names, without the place that they were read from."""
    if key == "data.tasks":
        value = {task["name"]: {k: v for k, v in task.items() if k not in ("name", "where")} for task in value}
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _text(value: Any) -> str:
    return " ".join(json.dumps(value, ensure_ascii=False).strip('"').split())


def _where_they_differ(one: str, other: str, room: int) -> list[str]:
    """Two texts cut to a length, so that the first difference is seen."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - room // 3) if max(len(one), len(other)) > room else 0
    return [cut(f"...{text[start + 3 :]}" if start else text, room) for text in (one, other)]


def _end(text: str) -> str:
    return text if len(text) <= NARROWEST else f"...{text[3 - NARROWEST :]}"


def _metric_changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[list[str]]:
    names = [
        (task, metric) for results in (one, other) for task, metrics in results["tasks"].items() for metric in metrics
    ]
    for task, metric in dict.fromkeys(names):
        before, after = (results["tasks"].get(task, {}).get(metric) for results in (one, other))
        change, note = "", ""
        if before and after:
            change = f"{after['value'] - before['value']:+.3f}"
            note = "" if overlap(before, after) else "intervals apart"
        yield [f"{task} {metric}", measured(before), measured(after), change, note]
