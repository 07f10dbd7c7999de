"""Stage 2, inter-task: how tasks help each other."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from alter.nn.experts import Expert, LoRA
from alter.nn.model import MTAModel
from alter.nn.routers import Router, SharedGate
from alter.nn.trunk_cache import TrunkCache
from alter.stages.base import StageModule
from alter.stages.schedule import Schedule


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
        schedule: of the learning rate after the warm-up.
        warmup: share of the steps over which the learning rate rises.
        loss_average: over target tokens, or over examples.
        gradient_checkpointing: computes activations again in the backward pass, to save memory.
        trunk_cache: how the states below the first adapter are kept, set by the recipe's ``trunk_cache``.
        skip_bad_batches: how many batches may be left out whose loss is not finite, and steps whose gradient is not; the
            next one stops the run.
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
        schedule: Schedule = "cosine",
        warmup: float = 0.05,
        loss_average: Literal["token", "example"] = "token",
        gradient_checkpointing: bool = False,
        trunk_cache: TrunkCache | None = None,
        skip_bad_batches: int = 0,
    ) -> None:
        super().__init__(
            optimizer, schedule, warmup, loss_average, gradient_checkpointing, trunk_cache, skip_bad_batches
        )
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
