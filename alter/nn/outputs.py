"""Outputs of several feed-forwards side by side, kept from their last map for as long as nobody needs them whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from alter.nn.change import Change
from alter.nn.linear import plain_weight

if TYPE_CHECKING:
    from alter.nn.frozen import FrozenFeedForward


class Kept(NamedTuple):
    """Outputs before the last map: of a mixture, or of several experts by themselves.

    Attributes:
        inner: [batch, seq, h], or [experts, batch, seq, h].
        change: of as many.
    """

    inner: Tensor
    change: Change

    @property
    def experts(self) -> int:
        """How many outputs."""
        return len(self.inner) if self.change.apart else 1

    @property
    def inners(self) -> Tensor:
        """[experts, batch, seq, h], of a mixture too."""
        return self.inner if self.change.apart else self.inner.unsqueeze(0)


class Outputs:
    """``output_k = down(inner_k) + change_k`` of experts of one block, where ``down`` is its frozen last map, which all share.

    What is made of them is linear: a gate's first map ``sum_k U_k output_k``, and the weighted sum. So for many tokens

        ``sum_k U_k output_k = sum_k (U_k W) inner_k + U_k change_k``
        ``sum_k w_k output_k = down(sum_k w_k inner_k) + sum_k w_k change_k``

    with ``W`` of ``down`` apply it to one vector a token, not to each of K + 1, which is most of what stage 2 would cost.
    Experts come first here, so that each is one piece of memory.

    Args:
        whole: [experts, batch, seq, d]; None where they are kept.
        kept: those that stand side by side.
        ffn: whose ``down`` it is.
    """

    def __init__(
        self, whole: Tensor | None = None, kept: Sequence[Kept] = (), ffn: FrozenFeedForward | None = None
    ) -> None:
        self._whole, self._kept, self._ffn = whole, kept, ffn

    @classmethod
    def beside(cls, several: Sequence[Self]) -> Self:
        """All of several, in their order; of one block."""
        if any(outputs._ffn is None for outputs in several):
            return cls(torch.cat([outputs._made() for outputs in several]))
        return cls(kept=[kept for outputs in several for kept in outputs._kept], ffn=several[0]._ffn)

    def whole(self) -> Tensor:
        """[batch, seq, experts, d]."""
        return self._made().movedim(0, 2)

    def _made(self) -> Tensor:
        if self._ffn is not None:
            made = [kept.change.added(self._ffn.linear("down", kept.inner)) for kept in self._kept]
            made = [output.view(-1, *output.shape[-3:]) for output in made]
            self._whole = torch.cat(made) if len(made) > 1 else made[0]
            self._ffn = None
        return cast(Tensor, self._whole)

    def read(self, linear: nn.Linear) -> Tensor:
        """``linear([output_1; ..; output_k])``, [batch, seq, linear.out_features]."""
        down = self._down(linear)
        if self._ffn is None or down is None:
            return linear(self.whole().float().flatten(-2))
        counts = [kept.experts for kept in self._kept]
        weight = linear.weight.unflatten(1, (sum(counts), self._ffn.hidden_size))  # [units, experts, d]
        found = 0.0 if linear.bias is None else linear.bias
        if (bias := self._ffn.bias("down")) is not None:
            found = found + weight.sum(1) @ bias.to(weight.dtype)
        through = (weight.movedim(1, 0).flatten(0, 1) @ down).unflatten(0, (sum(counts), -1))  # [experts, units, h]
        for kept, own, inner in zip(self._kept, weight.split(counts, 1), through.split(counts), strict=True):
            read = torch.bmm(kept.inners.flatten(1, 2), inner.mT).sum(0)
            found = found + read.unflatten(0, kept.inner.shape[-3:-1]) + kept.change.read(own)
        return found

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum_k weights_k output_k``, [batch, seq, d]; weights are [batch, seq or 1, k]."""
        if self._ffn is None:
            return _weighted(self._made(), weights)
        inner = _weighted([inner for kept in self._kept for inner in kept.inners], weights)
        found = self._ffn.linear("down", inner)
        if (bias := self._ffn.bias("down")) is not None:
            found = found + (weights.sum(-1, keepdim=True) - 1).to(found.dtype) * bias
        for kept, own in zip(self._kept, weights.split([kept.experts for kept in self._kept], -1), strict=True):
            found = kept.change.weighted(own.to(kept.change.low.dtype)).added(found)
        return found

    def _down(self, linear: nn.Linear) -> Tensor | None:
        """W [d, h] where reading through it is cheaper than every output: it costs as much as so many tokens' outputs."""
        # An exported graph must not depend on how many tokens its example has.
        if self._ffn is None or torch.compiler.is_exporting():
            return None
        tokens, k = self._kept[0].inner.shape[-3:-1].numel(), sum(kept.experts for kept in self._kept)
        return plain_weight(self._ffn.module("down")) if (k - 1) * tokens > k * linear.out_features else None


def _weighted(outputs: Iterable[Tensor], weights: Tensor) -> Tensor:
    """The sum of [batch, seq, width] by [batch, seq or 1, k]: one pass over memory for each."""
    each = zip(outputs, weights.unsqueeze(-2).unbind(-1), strict=True)
    found, share = next(each)
    found = found * share.to(found.dtype)
    for output, share in each:
        found = torch.addcmul(found, output, share.to(output.dtype))
    return found
