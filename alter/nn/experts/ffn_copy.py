"""Full copies of the feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.experts.base import Expert, Linears
from alter.nn.frozen import FrozenFeedForward
from alter.nn.linear import dense_weight
from alter.nn.routers.base import Routing


class FFNCopy(Expert):
    """Full trainable copies of the frozen feed-forward, the experts of the authors' released code (arXiv 2309.11042).

    Where a router uses few experts a token (``active``), tokens are sorted by expert and each runs through its own
    expert alone, as one grouped matmul; otherwise all experts run and are weighted. Copies start alike, and those with equal
    gates get equal gradients: as stage 2's shared experts under ``SharedGate`` they stay nearly one; take ``LoRA`` there.
    """

    contains_ffn = True

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for role in ffn.shapes:
            weight, bias = dense_weight(ffn.module(role))
            # contiguous [experts, in, out]: what grouped matmul reads
            self.weight[role] = nn.Parameter(weight.t().unsqueeze(0).repeat(num_experts, 1, 1).contiguous())
            if bias is not None:
                self.bias[role] = nn.Parameter(bias.unsqueeze(0).repeat(num_experts, 1))

    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        tokens = hidden_states.flatten(0, 1)
        weights = gates.expand(*hidden_states.shape[:2], -1).flatten(0, 1)
        mixed = self._dense(tokens, weights, ffn) if active is None else self._sparse(tokens, weights, ffn, active)
        return mixed.view_as(hidden_states)

    def merged(self, gates: Tensor, ffn: FrozenFeedForward, task_id: int) -> Linears | None:
        chosen = int(gates.argmax())
        if not torch.equal(gates, torch.zeros_like(gates).index_fill(0, gates.argmax(), 1.0)):
            return None  # several blocks' outputs are no block's
        return {
            role: (weight[chosen].detach().T, self.bias[role][chosen].detach() if role in self.bias else None)
            for role, weight in self.weight.items()
        }

    @torch.no_grad()
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        for role, weight in self.weight.items():
            frozen, bias = dense_weight(ffn.module(role))
            weight.copy_(torch.lerp(frozen.t(), weight, factor))
            if bias is not None:
                self.bias[role].copy_(torch.lerp(bias, self.bias[role], factor))

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        outputs = ffn.run(hidden_states.flatten(0, 1), self._all_experts)
        return outputs.transpose(0, 1).unflatten(0, hidden_states.shape[:2])

    def _all_experts(self, role: str, x: Tensor) -> Tensor:
        """[tokens, in] or [experts, tokens, in] -> [experts, tokens, out]."""
        y = x @ self.weight[role]
        return y + self.bias[role].unsqueeze(1) if role in self.bias else y

    def _dense(self, tokens: Tensor, weights: Tensor, ffn: FrozenFeedForward) -> Tensor:
        return torch.einsum("etd,te->td", ffn.run(tokens, self._all_experts), weights)

    def _sparse(self, tokens: Tensor, weights: Tensor, ffn: FrozenFeedForward, active: int) -> Tensor:
        kept, chosen = weights.topk(active, dim=-1)  # [tokens, active]
        order = chosen.flatten().argsort(stable=True)
        source = order // active
        counts = torch.bincount(chosen.flatten(), minlength=weights.shape[-1])
        outputs = ffn.run(tokens[source], self._grouped(counts, chosen.flatten()[order]))
        weighted = outputs * kept.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, source, weighted.to(tokens.dtype))

    def _grouped(self, counts: Tensor, expert: Tensor) -> Callable[[str, Tensor], Tensor]:
        ends = counts.cumsum(0).to(torch.int32)

        def linear(role: str, x: Tensor) -> Tensor:
            y = F.grouped_mm(x.contiguous(), self.weight[role].to(x.dtype), offs=ends)
            return y + self.bias[role][expert].to(y.dtype) if role in self.bias else y

        return linear
