"""Experts that scale channels: each adds to the block a multiple of its input, one number a channel."""

import torch
from torch import Tensor, nn

from alter.nn import Expert, Routing
from alter.nn.frozen import FrozenFeedForward


class ChannelScale(Expert):
    """``A_k(x) = v_k * x``, v_k a number for each of the d channels. Starts at zero."""

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        """Makes all experts' numbers, [experts, d]."""
        self.scale = nn.Parameter(torch.zeros(num_experts, ffn.hidden_size))

    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        """[batch, seq, d], gates [batch, seq or 1, experts] -> ``sum_k g_k A_k(x)``; no loop over experts."""
        return hidden_states * (gates @ self.scale)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        """[batch, seq, d] -> each expert's own output, [batch, seq, experts, d]."""
        return hidden_states.unsqueeze(-2) * self.scale

    @torch.no_grad()
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        """Makes each change ``factor`` times as large, as stage 2 asks for."""
        self.scale.mul_(factor)
