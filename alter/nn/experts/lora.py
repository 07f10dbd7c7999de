"""Low-rank changes of the feed-forward's own maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.change import Change
from alter.nn.experts.base import Linears, few_experts
from alter.nn.experts.low_rank import Changes, LowRank
from alter.nn.frozen import FrozenFeedForward
from alter.nn.linear import dense_weight
from alter.nn.routers.base import Routing


class LoRA(LowRank):
    """Low-rank changes of the feed-forward's own linear maps: ``F_k`` is F with ``W + (alpha / rank) B_k A_k``.

    A mixture blends the changes, ``W + sum_k g_k (alpha / rank) B_k A_k``, as one wide pair of matmuls a linear map.
    B starts at zero, so F_k starts as F. Source: Hu et al., arXiv 2106.09685.

    Args:
        rank: of each change.
        alpha: the changes are scaled by ``alpha / rank``; None means alpha = rank.
    """

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for role, (fan_in, fan_out) in ffn.shapes.items():
            self.a[role] = nn.Parameter(torch.empty(fan_in, num_experts, self.rank).uniform_(-1, 1) * fan_in**-0.5)
            self.b[role] = nn.Parameter(torch.zeros(num_experts, self.rank, fan_out))

    def mixed_changes(self, hidden_states: Tensor, gates: Tensor, active: int | None, routing: Routing) -> Changes:
        gates = gates if self.scale == 1 else gates * self.scale
        few = few_experts(hidden_states, gates, active)
        scaled = few.units(self.rank) if few else gates.repeat_interleave(self.rank, -1)

        def change(role: str, x: Tensor) -> Change:
            a, b = self.a[role], self.b[role]
            a, b = (few.inputs(a), few.outputs(b)) if few else (a.flatten(1), b.flatten(0, 1))
            return Change(x @ a * scaled, b)

        return change

    @torch.no_grad()
    def merged(self, gates: Tensor, ffn: FrozenFeedForward, task_id: int) -> Linears:
        found = {}
        for role in ffn.shapes:
            weight, bias = dense_weight(ffn.module(role))
            change = torch.einsum("der,ero,e->od", self.a[role], self.b[role], gates * self.scale)
            found[role] = weight + change, bias
        return found

    def own_changes(self, routing: Routing) -> Changes:
        def change(role: str, x: Tensor) -> Change:
            a, b = self.a[role], self.b[role]
            if x.dim() == 3:
                low = (x @ a.flatten(1)).unflatten(-1, b.shape[:2]).movedim(-2, 0)
            else:
                low = torch.bmm(x.flatten(1, 2), a.movedim(1, 0)).unflatten(1, x.shape[1:3])
            return Change(low * self.scale, b)

        return change
