"""Who answers what: the mean gates of every router, by task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alter.data import MultiTaskDataModule
from alter.nn.model import MTAModel
from alter.predict import Predictor

ROWS = 16  # validation examples a task


@torch.inference_mode()
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
    sums: dict[tuple[str, str], Tensor] = {}
    for index, task in enumerate(model.tasks):
        examples = data.examples(task, "validation").select_columns(["prompt_ids", "target_ids"])
        count = min(rows, len(examples))
        for row in range(count):
            # one at a time, so that nothing is padding
            batch = {k: v.to(device) for k, v in predictor.collator([{**examples[row], "task_id": index}]).items()}
            with _noted(model) as noted:
                model(batch)
            for (kind, layer), gates in noted.items():
                mean = gates.float().mean((0, 1)).cpu()
                table = sums.setdefault((kind, layer), torch.zeros(len(model.tasks), len(mean)))
                table[index] += mean / count
    found: dict[str, dict[str, Any]] = {}
    for (kind, layer), table in sums.items():
        found.setdefault(kind, {})[layer] = table.tolist()
    return found


@contextmanager
def _noted(model: MTAModel) -> Iterator[dict[tuple[str, str], Tensor]]:
    """The gates that each router returns within the context."""
    noted: dict[tuple[str, str], Tensor] = {}
    handles = []
    for name, layer in model.layers.items():
        for kind, router in (("experts", layer.router), ("shared", layer.shared_router)):
            if router is not None:

                def note(module: nn.Module, args: Any, gates: Tensor, key: tuple[str, str] = (kind, name)) -> None:
                    noted[key] = gates

                handles.append(router.register_forward_hook(note))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
