"""One A, many B."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.change import Change
from alter.nn.experts.base import Linears
from alter.nn.experts.low_rank import Changes, LowRank
from alter.nn.frozen import FrozenFeedForward
from alter.nn.linear import dense_weight
from alter.nn.routers.base import Routing


class HydraLoRA(LowRank):
    """Low-rank changes that share A: ``F_k`` is F with ``W + (alpha / rank) B_k A``.

    A mixture is ``W + (alpha / rank) (sum_k g_k B_k) A``. With the router ``TokenGate`` it is the design of Tian et al.,
    arXiv 2404.19245. B starts small with a mean of zero over the experts, so that equal gates start as F. At zero,
    experts with equal gates would get equal gradients and stay one. As stage 2's shared experts they stay
    nearly one under ``SharedGate``, which starts with equal gates at all tokens; take another router or ``LoRA`` there.

    Args:
        rank: of each change.
        alpha: the changes are scaled by ``alpha / rank``; None means alpha = rank.
    """

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for role, (fan_in, fan_out) in ffn.shapes.items():
            self.a[role] = nn.Parameter(torch.empty(fan_in, self.rank).uniform_(-1, 1) * fan_in**-0.5)
            b = 1e-3 * torch.randn(num_experts, self.rank, fan_out)
            self.b[role] = nn.Parameter(b - b.mean(0))

    def _low(self, role: str, x: Tensor, routing: Routing) -> Tensor:
        """What enters B, [..., batch, seq, in] -> [..., batch, seq, rank]."""
        return x @ self.a[role] * self.scale

    def mixed_changes(self, hidden_states: Tensor, gates: Tensor, active: int | None, routing: Routing) -> Changes:
        def change(role: str, x: Tensor) -> Change:
            low = self._low(role, x, routing)
            return Change((gates.unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2), self.b[role].flatten(0, 1))

        return change

    def _inner(self, role: str, task_id: int) -> Tensor:
        """What stands before B for one task, [in, rank]."""
        return self.a[role]

    @torch.no_grad()
    def merged(self, gates: Tensor, ffn: FrozenFeedForward, task_id: int) -> Linears:
        found = {}
        for role in ffn.shapes:
            weight, bias = dense_weight(ffn.module(role))
            outer = torch.einsum("ero,e->ro", self.b[role], gates * self.scale)
            found[role] = weight + (self._inner(role, task_id) @ outer).T, bias
        return found

    def own_changes(self, routing: Routing) -> Changes:
        def change(role: str, x: Tensor) -> Change:
            low = self._low(role, x, routing)
            return Change(low.expand(len(self.b[role]), *low.shape[-3:]), self.b[role])

        return change
