"""The frozen feed-forward block as experts see it: its linear maps by role, and its formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from alter.nn.feed_forward import FeedForward
from alter.nn.linear import sizes


class FrozenFeedForward:
    """Names the linear maps of a block, so that an expert can vary them; holds references and no parameters of its own.

    Attributes:
        hidden_size: d, the width of the block's input and output.
        shapes: role ("gate" where the block is gated, "up", "down") to (in, out) features.
    """

    def __init__(self, parent: nn.Module, found: FeedForward, dtype: torch.dtype) -> None:
        """Args: parent: the module that owns the linear maps. found: their names. dtype: the backbone's."""
        names = {"gate": found.gate, "up": found.up, "down": found.down}
        self._linears = {role: parent.get_submodule(name) for role, name in names.items() if name is not None}
        self.activation = found.activation
        self.hidden_size = found.hidden_size
        self.shapes = {role: sizes(linear) for role, linear in self._linears.items()}
        self.dtype = dtype
        self._input: Tensor | None = None
        self._read: dict[str, Tensor] = {}

    def reading(self, x: Tensor) -> Self:
        """The same block, which applies its first maps to ``x`` [batch, seq, d] once, for all experts that vary it."""
        found = copy.copy(self)
        found._input, found._read = x, {}
        return found

    def module(self, role: str) -> nn.Module:
        """Returns the frozen linear map of this role."""
        return self._linears[role]

    def linear(self, role: str, x: Tensor) -> Tensor:
        """Applies the frozen linear map of this role, in the backbone's precision; to what is read (``reading``), once."""
        if x is not self._input:
            return self._applied(role, x)
        if role not in self._read:
            self._read[role] = self._applied(role, x)
        return self._read[role]

    def _applied(self, role: str, x: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous()  # Conv1D takes views
        if x.dim() <= 3:
            return self._linears[role](x)
        return self._linears[role](x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # bitsandbytes takes no more dimensions

    def bias(self, role: str) -> Tensor | None:
        """Returns the bias of the frozen linear map of this role, [out], where it has one."""
        return cast("Tensor | None", self._linears[role].bias)

    def run(self, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Computes the block's formula with another set of linear maps.

        Args:
            x: [..., d].
            linear: called with a role and its input.

        Returns:
            ``down(act(gate(x)) * up(x))`` where the block is gated, else ``down(act(up(x)))``.
        """
        return linear("down", self.inner(x, linear))

    def inner(self, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        """What enters the block's last map with another set of first maps, as for ``run``."""
        if "gate" in self._linears:
            return self.activation(linear("gate", x)) * linear("up", x)
        return self.activation(linear("up", x))
