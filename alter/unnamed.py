"""``alter test --no-task-id``: what it costs when nobody says which task an input is for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from alter.data import MultiTaskDataModule
from alter.errors import AlterError
from alter.evaluate import answers
from alter.guess import Guess, fit_kinds, joined, shares
from alter.nn.task_predictor import TaskPredictor
from alter.predict import Predictor, Text
from alter.results import with_interval
from alter.writing import write_json

VIEWS = {
    "prompt": "whole prompts, as the tasks' templates make them",
    "input": "the values of the prompts' fields alone",
}
MISSING = ""  # what counts as the answer to an input whose task is not clear


def measure_unnamed(run: Path, predictor: Predictor, data: MultiTaskDataModule, split: str) -> dict[str, Any]:
    """Measures a run's tasks with and without their names, writes ``results.no_task_id.json`` and prints the table.

    An input whose task is not clear counts as answered with nothing. ``unknown`` is the share of a task's inputs that are
    reported as not clear by a task predictor that was fitted without that task.

    Args:
        run: the run folder.
        predictor: its model, with a task predictor.
        data: set up.
        split: test or validation.

    Returns:
        for each task ``named`` and, for whole prompts and for bare inputs, ``right``, ``wrong``, ``unclear``, ``unknown`` (shares of
        its rows) and ``metrics``: name to ``value``, ``low``, ``high`` and ``loss`` against the given name.

    Raises:
        AlterError: the model has one task alone.
    """
    if predictor.task_predictor is None:
        raise AlterError(
            f"--no-task-id: {run} has one task alone, {predictor.tasks[0]}, so nothing is to be guessed; leave it out."
        )
    train, validation = fit_kinds(predictor, data, predictor.tasks)
    results = {}
    for name in predictor.tasks:
        print(f"{split} without names: {name}")
        task, rows = predictor.task(name), data.examples(name, split)
        targets, named = rows["target"][:], answers(predictor, data, name, split)
        found: dict[str, Any] = {
            "named": {key: with_interval(key, named, targets, task.choices) for key in task.metrics},
            "n": len(targets),
        }
        fields = [json.loads(text) for text in rows["input"]]
        single = len(task.fields) == 1
        views: dict[str, Sequence[Text]] = {
            "prompt": rows["prompt"][:],
            "input": [joined(task, row) for row in fields] if single else fields,
        }
        for view, texts in views.items():
            guesses = predictor.guess(texts)
            guessed = _answers(predictor, name, view, texts, guesses, named)
            measured = {key: with_interval(key, guessed, targets, task.choices) for key in task.metrics}
            for key, entry in measured.items():
                entry["loss"] = found["named"][key]["value"] - entry["value"]
            unknown = _unknown(predictor, train, validation, name, texts)
            found[view] = {**shares(guesses, name), "unknown": unknown, "metrics": measured}
        results[name] = found
    file = run / ("results.no_task_id.json" if split == "test" else f"results.no_task_id.{split}.json")
    write_json(file, results)
    print(table(results))
    print(f"\nWritten to {file}")
    return results


def _answers(
    predictor: Predictor,
    name: str,
    view: str,
    texts: Sequence[Text],
    guesses: Sequence[Guess],
    named: Sequence[str],
) -> list[str]:
    """Those of the guessed tasks; where task and view of the text are guessed right it is the answer with the name."""
    given = [MISSING] * len(texts)
    for task in predictor.tasks:
        prompts = {}
        for row, found in enumerate(guesses):
            if found.task == task == name and found.is_prompt == (view == "prompt"):
                given[row] = named[row]
            elif found.task == task:
                with suppress(AlterError):  # it does not fit what it was taken for: no answer
                    prompts[row] = predictor.guessed_prompt(texts[row], found, f"row {row + 1}")
        answered = predictor.answer(task, list(prompts.values()), probabilities=False)
        for row, answer in zip(prompts, answered, strict=True):
            given[row] = answer.text
    return given


def _unknown(
    predictor: Predictor, train: Mapping[Any, Any], validation: Mapping[Any, Any], name: str, texts: Sequence[Text]
) -> float | None:
    """The share that is not clear to one who does not know the task; None where too few tasks are left to guess from."""
    if len(predictor.tasks) < 3:
        return None
    others = [{kind: rows for kind, rows in part.items() if kind.task != name} for part in (train, validation)]
    before = predictor.task_predictor
    try:
        predictor.task_predictor = TaskPredictor.fit(*others)
        return shares(predictor.guess(texts), name)["unclear"]
    finally:
        predictor.task_predictor = before


def table(results: Mapping[str, Any]) -> str:
    """Each task's first metric with and without its name, and how its inputs were guessed, as plain text."""
    width = max(len(name) for name in results)
    lines = []
    for view, what in VIEWS.items():
        lines += [
            "",
            f"Without a task's name, from {what}:",
            f"{'task':<{width}}  metric       named  without   cost  right  wrong  unclear  unclear if unknown",
        ]
        for name, found in results.items():
            own = found[view]
            key, entry = next(iter(own["metrics"].items()))
            named = entry["value"] + entry["loss"]
            unknown = "-" if own["unknown"] is None else f"{own['unknown']:.0%}"
            lines.append(
                f"{name:<{width}}  {key:<11}{named:>7.3f}{entry['value']:>9.3f}{entry['loss']:>7.3f}{own['right']:>7.0%}"
                f"{own['wrong']:>7.0%}{own['unclear']:>9.0%}{unknown:>20}"
            )
    return "\n".join(lines)
