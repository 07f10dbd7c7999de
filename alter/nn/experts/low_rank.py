"""What experts have in common that change the feed-forward's own maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alter.nn.experts.base import Expert
from alter.nn.frozen import FrozenFeedForward
from alter.nn.outputs import Outputs
from alter.nn.routers.base import Routing

Change = Callable[[str, Tensor], Tensor]


class LowRank(Expert):
    """Experts whose ``F_k`` is F with something added to what each of its linear maps gives; a mixture blends the changes.

    Args:
        rank: of each change.
        alpha: the changes are scaled by ``alpha / rank``; None means alpha = rank.
    """

    contains_ffn = True
    blends_parameters = True
    only_multiplies = True

    def __init__(self, rank: int = 32, alpha: float | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha

    @property
    def scale(self) -> float:
        """Of the changes."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self) -> None:
        self._require("rank", self.rank >= 1, "give 1 or more")

    b: nn.ParameterDict  # the outer factor of each role

    @torch.no_grad()
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        for outer in self.b.values():
            outer.mul_(factor)

    @abstractmethod
    def mixed_change(self, hidden_states: Tensor, gates: Tensor, active: int | None, routing: Routing) -> Change:
        """Returns what maps a role and its input [batch, seq, in] to the mixture's change, [batch, seq, out].

        Args:
            hidden_states: the block's input.
            gates: as for ``mix``.
            active: as for ``mix``.
            routing: the tasks of the batch.
        """

    @abstractmethod
    def own_changes(self, routing: Routing) -> Change:
        """Returns what maps a role and its input [batch, seq, 1 or experts, in] to every expert's change, [.., experts, out]."""

    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        return self.mixed_outputs(hidden_states, gates, ffn, active, routing).whole().squeeze(-2)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        return self.own_outputs(hidden_states, ffn, routing).whole()

    def mixed_outputs(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Outputs:
        change = self.mixed_change(hidden_states, gates, active, routing)
        inner = ffn.inner(hidden_states, change)
        return Outputs(change("down", inner).unsqueeze(-2), inner.unsqueeze(-2), ffn)

    def own_outputs(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Outputs:
        changes = self.own_changes(routing)
        inner = ffn.inner(hidden_states, changes, apart=True)
        return Outputs(changes("down", inner), inner, ffn)
