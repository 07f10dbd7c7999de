"""Parallel bottleneck adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.experts.base import Expert, few_experts
from alter.nn.frozen import FrozenFeedForward
from alter.nn.routers.base import Routing


class Bottleneck(Expert):
    """Parallel bottleneck adapters: ``A_k(x) = up_k(act(down_k(x)))``.

    All experts together are one wide bottleneck of ``experts * rank`` units whose activations are scaled by the gates:
    ``up(gate * act(down(x)))``. Starts at zero. Source: Houlsby et al., arXiv 1902.00751; parallel form He et al.,
    arXiv 2110.04366.

    Args:
        rank: units of each expert.
        activation: gelu, relu or silu.
    """

    only_multiplies = True

    def __init__(self, rank: int = 64, activation: Literal["gelu", "relu", "silu"] = "gelu") -> None:
        super().__init__()
        self.rank = rank
        self.activation = activation

    def check(self) -> None:
        self._require("rank", self.rank >= 1, "give 1 or more")

    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        d = ffn.hidden_size
        self.down = nn.Parameter(torch.randn(d, num_experts, self.rank) * d**-0.5)
        self.up = nn.Parameter(torch.zeros(num_experts, self.rank, d))

    def _units(self, hidden_states: Tensor) -> Tensor:
        return getattr(F, self.activation)(hidden_states @ self.down.flatten(1)).unflatten(-1, self.down.shape[1:])

    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        if few := few_experts(hidden_states, gates, active):
            units = getattr(F, self.activation)(torch.bmm(hidden_states, few.inputs(self.down)))
            return torch.bmm(units * few.units(self.rank), few.outputs(self.up))
        return (self._units(hidden_states) * gates.unsqueeze(-1)).flatten(-2) @ self.up.flatten(0, 1)

    @torch.no_grad()
    def concatenated(self, gates: Tensor) -> Self:
        """One expert that is the mixture with fixed gates [experts]."""
        used = gates.nonzero().squeeze(1)  # an expert that a hard selector leaves out takes no room
        if not len(used):
            used = torch.zeros(1, dtype=torch.long, device=gates.device)
        wide = type(self)(len(used) * self.rank, self.activation)
        wide.down = nn.Parameter(self.down[:, used].flatten(1).unsqueeze(1))
        wide.up = nn.Parameter((self.up * gates.view(-1, 1, 1))[used].flatten(0, 1).unsqueeze(0))
        return wide

    @classmethod
    @torch.no_grad()
    def joined(cls, experts: Sequence[Self]) -> Self:
        """One expert that is the sum of experts of one activation, each alone in its stack."""
        wide = cls(sum(expert.rank for expert in experts), experts[0].activation)
        wide.down = nn.Parameter(torch.cat([expert.down for expert in experts], dim=-1))
        wide.up = nn.Parameter(torch.cat([expert.up for expert in experts], dim=1))
        return wide

    @torch.no_grad()
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        self.up.mul_(factor)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        return torch.einsum("bsek,ekd->bsed", self._units(hidden_states), self.up)
