"""MTL-LoRA: a task's own transformation between the shared A and several B."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.experts.hydra_lora import HydraLoRA
from alter.nn.frozen import FrozenFeedForward
from alter.nn.routers.base import Routing


class MTLLoRA(HydraLoRA):
    """``HydraLoRA`` with a matrix Lambda_t [rank, rank] a task: ``F_k`` is F with ``W + (alpha / rank) B_k Lambda_t A``.

    With the router ``TaskSelector`` a mixture is ``W + (alpha / rank) sum_k softmax(w_t / tau)_k B_k Lambda_t A``, the
    design of Yang et al., arXiv 2410.09437. Lambda starts as the identity.

    Args:
        rank: of each change.
        alpha: the changes are scaled by ``alpha / rank``; None means alpha = rank.
    """

    holds_tasks = True

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        super().build(ffn, num_experts, num_tasks)
        identity = torch.eye(self.rank).repeat(num_tasks, 1, 1)
        self.task = nn.ParameterDict({role: nn.Parameter(identity.clone()) for role in ffn.shapes})

    def _low(self, role: str, x: Tensor, routing: Routing) -> Tensor:
        low = super()._low(role, x, routing)
        return low @ self.task[role][routing.rows(x.shape[-3])].to(low.dtype)

    def _inner(self, role: str, task_id: int) -> Tensor:
        return self.a[role] @ self.task[role][task_id]
