"""The test of a run: every task's metrics beside three references on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alter import references
from alter.data import MultiTaskDataModule
from alter.predict import Predictor
from alter.results import task_results


def answers(predictor: Predictor, data: MultiTaskDataModule, task: str, split: str) -> list[str]:
    """The model's answers to a task's rows, in their order."""
    prompts = data.examples(task, split)["prompt_ids"][:]
    return [answer.text for answer in predictor.answer(task, prompts, probabilities=False)]


def evaluate(
    predictor: Predictor,
    data: MultiTaskDataModule,
    split: str = "test",
    keep: Callable[[str, list[str]], None] = lambda task, answered: None,
    tasks: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures a model and the references, and tells each task as it starts.

    Args:
        predictor: the model with its tasks.
        data: prepared and set up.
        split: test, or validation while tuning.
        keep: given each task's answers, in the order of the rows.
        tasks: which; by default all.

    Returns:
        ``tasks`` of results.json.
    """
    results = {}
    for name in tasks or predictor.tasks:
        task, rows, train = predictor.task(name), data.examples(name, split), data.examples(name, "train")
        print(f"{split}: {name}, {len(rows)} rows")
        targets, predictions = rows["target"][:], answers(predictor, data, name, split)
        keep(name, predictions)
        with predictor.model.adapters_disabled():
            untouched = answers(predictor, data, name, split)
        found: dict[str, list[str] | None] = {"majority": None, "backbone": untouched, "tfidf": None}
        if task.choices:
            labels = train["target"]
            found["majority"] = references.majority(labels, len(rows))
            found["tfidf"] = references.tfidf(train["prompt"], labels, rows["prompt"][:])
        results[name] = task_results(task.metrics, targets, predictions, found, task.choices)
    return results
