"""Who answers what: the mean gates of every router, by task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alter.data import MultiTaskDataModule
from alter.nn import gates
from alter.predict import Predictor

ROWS = 16  # validation examples a task


def mean_gates(predictor: Predictor, data: MultiTaskDataModule, rows: int = ROWS) -> dict[str, dict[str, Any]]:
    """Averages the gates of every router over a few validation examples of each task, by layer.

    Args:
        predictor: the trained model.
        data: set up.
        rows: examples a task.

    Returns:
        for ``experts`` and ``shared``, where the model has such a router: ``{layer: [tasks, experts]}``.
    """
    model = predictor.model
    device = next(model.parameters()).device
    sums: dict[str, dict[str, Tensor]] = {}
    for index, task in enumerate(model.tasks):
        examples = data.examples(task, "validation").select_columns(["prompt_ids", "target_ids"])
        count = min(rows, len(examples))
        for row in range(count):
            batch = {k: v.to(device) for k, v in predictor.collator([{**examples[row], "task_id": index}]).items()}
            for kind, layers in gates.mean_gates(model, batch).items():
                for layer, mean in layers.items():
                    table = sums.setdefault(kind, {}).setdefault(layer, torch.zeros(len(model.tasks), len(mean)))
                    table[index] += mean / count
    return {kind: {layer: table.tolist() for layer, table in layers.items()} for kind, layers in sums.items()}
