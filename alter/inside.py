"""What is inside a trained model: who answers what, and how alike the experts are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alter.data import MultiTaskDataModule
from alter.nn import gates
from alter.predict import Predictor

ROWS = 16  # validation examples a task
FEW_ROWS = 2  # by which experts are compared


def gates_by_task(predictor: Predictor, data: MultiTaskDataModule, rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """Averages the gates of every router over a few validation examples of each task, by layer.

    Args:
        predictor: the trained model.
        data: set up.
        rows: examples a task.

    Returns:
        for ``experts`` and ``shared``, where the model has such a router: ``{layer: [tasks, experts]}``.
    """
    tasks = predictor.tasks
    sums: dict[str, dict[str, Tensor]] = {}
    for index, share, batch in _batches(predictor, data, tasks, rows):
        for kind, layers in gates.mean_gates(predictor.model, batch).items():
            for layer, mean in layers.items():
                table = sums.setdefault(kind, {}).setdefault(layer, torch.zeros(len(tasks), len(mean)))
                table[index] += mean * share
    return _lists(sums)


def expert_similarity(
    predictor: Predictor, data: MultiTaskDataModule, rows: int = FEW_ROWS
) -> dict[str, dict[str, Any]]:
    """How alike the experts are, the mean over the tasks' tokens of `alter.nn.gates.expert_cosines`, by layer.

    Args:
        predictor: the trained model.
        data: set up.
        rows: examples a task.

    Returns:
        for ``experts`` and ``shared``, where there are two or more of them: ``{layer: [experts, experts]}``.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    # A task that was added later does not pass the router beside which the experts are compared.
    tasks = [task for task in predictor.tasks if task in predictor.model.tasks[: predictor.model.base_tasks]]
    for _, share, batch in _batches(predictor, data, tasks, rows):
        for kind, layers in gates.expert_cosines(predictor.model, batch).items():
            for layer, cosines in layers.items():
                part = cosines * share / len(tasks)
                sums.setdefault(kind, {})[layer] = sums.get(kind, {}).get(layer, 0) + part
    return _lists(sums)


def _batches(
    predictor: Predictor, data: MultiTaskDataModule, tasks: Sequence[str], rows: int
) -> Iterator[tuple[int, float, dict[str, Tensor]]]:
    """A few validation examples of each task, one at a time: the task, the example's share of the task's, the batch."""
    device = next(predictor.model.parameters()).device
    for index, task in enumerate(tasks):
        examples = data.examples(task, "validation").select_columns(["prompt_ids", "target_ids"])
        count = min(rows, len(examples))
        for row in range(count):
            batch = predictor.collator([{**examples[row], "task_id": predictor.model.tasks.index(task)}])
            yield index, 1 / count, {key: value.to(device) for key, value in batch.items()}


def _lists(sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    return {kind: {layer: table.tolist() for layer, table in layers.items()} for kind, layers in sums.items()}
