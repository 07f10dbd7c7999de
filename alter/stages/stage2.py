"""Stage 2, inter-task: how tasks help each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from alter.nn.experts import Expert, LoRA
from alter.nn.model import MTAModel
from alter.nn.routers import Router, SharedGate
from alter.stages.base import StageModule


class Stage2Module(StageModule):
    """Starts from stage 1, adds shared experts and trains them and their gate; the backbone is frozen unless told
    otherwise.

    Args:
        backbone: name or folder, set by the recipe's ``backbone``.
        tasks: names, set by the recipe's ``data.tasks``.
        precision: of the frozen backbone, set by the recipe's ``precision``.
        start_from: stage 1's model folder, set by the run.
        expert: the kind of the shared experts (default LoRA).
        num_shared: how many shared experts.
        router: gate over the task experts' mixture and the shared experts (default SharedGate).
        keep: the task experts' share at the start.
        task_expert_lr: factor on the task experts' learning rate; 0 freezes them and their router.
        backbone_lr: factor on the backbone's learning rate; 0 freezes it, as stage 1 left it. See stage 1.
        optimizer: class and arguments (default AdamW, lr 1e-3).
        kwargs: as for ``StageModule``.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        tasks: list[str] | None = None,
        precision: str = "fp32",
        start_from: str = "",
        expert: Expert | None = None,
        num_shared: int = 2,
        router: Router | None = None,
        keep: float = 0.9,
        task_expert_lr: float = 0.0,
        backbone_lr: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)
        self.backbone = backbone
        self.tasks = tasks or []
        self.precision = precision
        self.start_from = start_from
        self.expert = expert or LoRA()
        self.num_shared = num_shared
        self.router = router or SharedGate()
        self.keep = keep
        self.task_expert_lr = task_expert_lr
        self.backbone_lr = backbone_lr

    def make_model(self) -> MTAModel:
        """Stage 1's model with fresh shared experts."""
        model = MTAModel.from_pretrained(self.start_from, self.backbone, self.precision)
        model.add_shared(self.expert, self.num_shared, self.router, self.keep)
        return model

    def learning_rates(self) -> dict[str, float]:
        """The shared experts and the gate train; task experts and backbone at their own factors, frozen by default."""
        return {
            "shared": 1.0,
            "shared_router": 1.0,
            "experts": self.task_expert_lr,
            "router": self.task_expert_lr,
            "backbone": self.backbone_lr,
        }
