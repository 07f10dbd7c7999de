"""Stage 1, intra-task: what each task needs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from alter.nn.backbone import load_backbone
from alter.nn.experts import Expert, LoRA
from alter.nn.model import MTAModel
from alter.nn.routers import Router, TaskSelector
from alter.stages.base import StageModule


class Stage1Module(StageModule):
    """Trains one expert a task and the selector that mixes them; the backbone is frozen unless told otherwise.

    Args:
        backbone: name or folder, set by the recipe's ``backbone``.
        tasks: names, set by the recipe's ``data.tasks``.
        precision: of the frozen backbone, set by the recipe's ``precision``.
        layers: blocks that get adapters: ``all``, ``last:4`` or ``last:40%`` of each stack, or a list of indices.
        ffn: pattern of the feed-forward blocks' module names, where their structure does not show them.
        expert: the kind of the task experts (default LoRA).
        router: who mixes them (default TaskSelector).
        own: share of a task's own expert at the start.
        num_experts: how many experts; None for one a task. Task t's own is ``t % num_experts``.
        router_lr: factor on the router's learning rate.
        backbone_lr: factor on the backbone's learning rate; 0 freezes it. Above 0 all of it trains, without dropout, in
            fp32; checkpoints and the model hold it whole, and the trunk cache is off.
        optimizer: class and arguments (default AdamW, lr 3e-3).
        kwargs: as for ``StageModule``.
    """

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        tasks: list[str] | None = None,
        precision: str = "fp32",
        layers: str | list[int] = "last:4",
        ffn: str | None = None,
        expert: Expert | None = None,
        router: Router | None = None,
        own: float = 0.9,
        num_experts: int | None = None,
        router_lr: float = 1.0,
        backbone_lr: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)
        self.backbone = backbone
        self.tasks = tasks or []
        self.precision = precision
        self.layers = layers
        self.ffn = ffn
        self.expert = expert or LoRA()
        self.router = router or TaskSelector()
        self.own = own
        self.num_experts = num_experts
        self.router_lr = router_lr
        self.backbone_lr = backbone_lr

    def make_model(self) -> MTAModel:
        """The backbone with fresh experts."""
        model = MTAModel(load_backbone(self.backbone, self.precision), self.tasks, self.layers, self.ffn)
        model.add_experts(self.expert, self.router, self.own, self.num_experts)
        return model

    def learning_rates(self) -> dict[str, float]:
        """Experts and their router train; the backbone at its own factor, frozen by default."""
        return {"experts": 1.0, "router": self.router_lr, "backbone": self.backbone_lr}
