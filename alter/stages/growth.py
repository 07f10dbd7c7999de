"""After training: a task joins the model, or all of them share anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from alter.nn.experts import Expert
from alter.nn.model import MTAModel
from alter.stages.base import StageModule


class GrowthModule(StageModule):
    """Goes on with a trained model, on data of some of its tasks.

    Args:
        backbone: name or folder.
        tasks: names of the tasks in the data, in its order.
        precision: of the frozen backbone.
        start_from: the model's folder.
        optimizer: class and arguments (default AdamW, lr 2e-3).
        kwargs: as for ``StageModule``.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        tasks: list[str] | None = None,
        precision: str = "fp32",
        start_from: str = "",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)
        self.backbone = backbone
        self.tasks = tasks or []
        self.precision = precision
        self.start_from = start_from

    def make_model(self) -> MTAModel:
        """The trained model."""
        return MTAModel.from_pretrained(self.start_from, self.backbone, self.precision)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """As in a stage, with the ids that the data's tasks have in the model."""
        return super().training_step(self._placed(batch), batch_idx)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As in a stage, with the ids that the data's tasks have in the model."""
        super().validation_step(self._placed(batch), batch_idx)

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = torch.tensor([self.model.tasks.index(task) for task in self.tasks], device=batch["task_ids"].device)
        return {**batch, "task_ids": places[batch["task_ids"]]}


class AddTaskModule(GrowthModule):
    """Trains what a new task brings: its expert, and how it mixes it with those that are there. Nothing else changes.

    Args:
        tasks: the new task's name.
        expert: the kind of its expert; None for the kind of the task experts.
        own: share of its own expert among the task experts at the start.
        keep: the task experts' share at the start, where there are shared ones.
        rates_lr: factor on the learning rate of the mixture's rates.
        kwargs: as for ``GrowthModule``.
    """

    def __init__(
        self,
        expert: Expert | None = None,
        own: float = 0.8,
        keep: float = 0.8,
        rates_lr: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.expert, self.own, self.keep, self.rates_lr = expert, own, keep, rates_lr

    def make_model(self) -> MTAModel:
        """The trained model with a fresh newcomer."""
        model = super().make_model()
        (task,) = self.tasks
        model.add_newcomer(task, self.expert, self.own, self.keep)
        return model

    def learning_rates(self) -> dict[str, float]:
        """The newcomer's parts alone train."""
        last = len(self.model.tasks) - self.model.base_tasks - 1
        return {f"newcomers.{last}.expert": 1.0, f"newcomers.{last}.rates": self.rates_lr}


class ConsolidateModule(GrowthModule):
    """Trains stage 2's part again on all tasks, those included that were added later.

    Args:
        task_expert_lr: factor on the task experts' learning rate; 0 freezes them and their router.
        kwargs: as for ``GrowthModule``.
    """

    def __init__(self, task_expert_lr: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task_expert_lr = task_expert_lr

    def learning_rates(self) -> dict[str, float]:
        """The shared experts, their gate and what was added train; task experts at their own factor."""
        added = [part for part in self.model.part_parameters() if part.startswith("newcomers.")]
        return {
            "shared": 1.0,
            "shared_router": 1.0,
            "experts": self.task_expert_lr,
            "router": self.task_expert_lr,
            **dict.fromkeys(added, 1.0),
        }
