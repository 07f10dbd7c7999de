"""Low-rank changes of what a frozen map gives, kept as two factors for as long as nobody needs them multiplied."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """``low @ outer``, of one feed-forward or of several experts by themselves.

    Attributes:
        low: [batch, seq, rank], or [experts, batch, seq, rank].
        outer: [rank, out], or [batch, rank, out] where each example has its own; with ``experts`` [experts, rank, out].
    """

    low: Tensor
    outer: Tensor

    @property
    def apart(self) -> bool:
        """Whether it is that of several experts by themselves."""
        return self.low.dim() == 4

    def added(self, frozen: Tensor) -> Tensor:
        """The change and what it changes, as one product that adds.

        Args:
            frozen: [batch, seq, out], or [experts, batch, seq, out] where experts have their own.

        Returns:
            as ``frozen``; [experts, batch, seq, out] of several experts.
        """
        if self.apart:
            wide = frozen.flatten(-3, -2).expand(len(self.low), -1, -1)
            return torch.baddbmm(wide, self.low.flatten(1, 2), self.outer).unflatten(1, frozen.shape[-3:-1])
        if self.outer.dim() == 3:
            return torch.baddbmm(frozen, self.low, self.outer)
        return torch.addmm(frozen.flatten(0, 1), self.low.flatten(0, 1), self.outer).view(frozen.shape)

    def weighted(self, weights: Tensor) -> Change:
        """The sum over experts, each weighted at every token, as one wider change; weights are [batch, seq, experts or 1]."""
        if not self.apart:
            return Change(self.low * weights, self.outer)
        low = self.low * weights.movedim(-1, 0).unsqueeze(-1)
        return Change(low.movedim(0, 2).flatten(2), self.outer.flatten(0, 1))

    def read(self, weight: Tensor) -> Tensor:
        """``sum_k weight_k change_k``, [batch, seq, units]; weight is [units, experts, out]."""
        outer = self.outer @ (weight.permute(1, 2, 0) if self.apart else weight.squeeze(1).t())
        if not self.apart:
            return self.low @ outer
        return torch.bmm(self.low.flatten(1, 2), outer).sum(0).unflatten(0, self.low.shape[1:3])
