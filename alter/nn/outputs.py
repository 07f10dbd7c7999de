"""Outputs of several feed-forwards side by side, kept from their last map for as long as nobody needs them whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from alter.nn.linear import plain_weight

if TYPE_CHECKING:
    from alter.nn.frozen import FrozenFeedForward


class Outputs:
    """``output_k = down(inner_k) + change_k``, where ``down`` is the last map of a frozen block, which all share.

    What is made of them is linear: a gate's first map ``sum_k U_k output_k``, and the weighted sum. So for many tokens

        ``sum_k U_k output_k = sum_k (U_k W) inner_k + U_k change_k``
        ``sum_k w_k output_k = down(sum_k w_k inner_k) + sum_k w_k change_k``

    with ``W`` of ``down`` apply it to one vector a token, not to each of K + 1, which is most of what stage 2 would cost.

    Args:
        change: [batch, seq, k, d].
        inner: [batch, seq, k, h]; None where ``change`` is the whole output.
        ffn: whose ``down`` it is.
    """

    def __init__(self, change: Tensor, inner: Tensor | None = None, ffn: FrozenFeedForward | None = None) -> None:
        self._change, self._inner, self._ffn = change, inner, ffn

    @classmethod
    def beside(cls, parts: Sequence[Self]) -> Self:
        """All of several, in their order; of one block."""
        inners = [part._inner for part in parts if part._inner is not None]
        if len(inners) < len(parts):
            return cls(torch.cat([part.whole() for part in parts], -2))
        return cls(torch.cat([part._change for part in parts], -2), torch.cat(inners, -2), parts[0]._ffn)

    def whole(self) -> Tensor:
        """[batch, seq, k, d]."""
        if self._inner is not None and self._ffn is not None:
            frozen = self._ffn.linear("down", self._inner)
            self._change, self._inner = frozen + self._change.to(frozen.dtype), None
        return self._change

    def read(self, linear: nn.Linear) -> Tensor:
        """``linear([output_1; ..; output_k])``, [batch, seq, linear.out_features]."""
        weight = self._down(linear)
        if self._inner is None or self._ffn is None or weight is None:
            return linear(self.whole().float().flatten(-2))
        read = linear.weight.unflatten(1, self._change.shape[-2:])  # [out, k, d]
        through = read.to(weight.dtype) @ weight  # of the two, W is the larger to convert
        found = self._inner.flatten(-2) @ through.flatten(1).t().to(self._inner.dtype)
        found = found + self._change.flatten(-2) @ linear.weight.t().to(self._change.dtype)
        if (bias := self._ffn.bias("down")) is not None:
            found = found + read.sum(1) @ bias.to(read.dtype)
        return found if linear.bias is None else found + linear.bias

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum_k weights_k output_k``, [batch, seq, d]; weights are [batch, seq or 1, k]."""
        weights = weights.expand(*self._change.shape[:2], -1).to(self._change.dtype)
        changes = torch.einsum("bsk,bskd->bsd", weights, self._change)
        if self._inner is None or self._ffn is None:
            return changes
        frozen = self._ffn.linear("down", torch.einsum("bsk,bskh->bsh", weights.to(self._inner.dtype), self._inner))
        if (bias := self._ffn.bias("down")) is not None:
            frozen = frozen + (weights.sum(-1, keepdim=True) - 1).to(frozen.dtype) * bias
        return frozen + changes.to(frozen.dtype)

    def _down(self, linear: nn.Linear) -> Tensor | None:
        """W [d, h] where reading through it is cheaper than every output: it costs as much as so many tokens' outputs."""
        # An exported graph must not depend on how many tokens its example has.
        if self._ffn is None or torch.compiler.is_exporting():
            return None
        tokens, k = self._change.shape[:2].numel(), self._change.shape[-2]
        return plain_weight(self._ffn.module("down")) if (k - 1) * tokens > k * linear.out_features else None
