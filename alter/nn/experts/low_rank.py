"""What experts have in common that change the feed-forward's own maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alter.nn.change import Change
from alter.nn.experts.base import Expert
from alter.nn.frozen import FrozenFeedForward
from alter.nn.outputs import Kept, Outputs
from alter.nn.routers.base import Routing

Changes = Callable[[str, Tensor], Change]


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
        self._require("alpha", self.alpha is None or self.alpha > 0, "give a number above 0, or none for the rank")

    b: nn.ParameterDict  # the outer factor of each role

    @torch.no_grad()
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        for outer in self.b.values():
            outer.mul_(factor)

    @abstractmethod
    def mixed_changes(self, hidden_states: Tensor, gates: Tensor, active: int | None, routing: Routing) -> Changes:
        """Returns what maps a role and its input [batch, seq, in] to the mixture's change.

        Args:
            hidden_states: the block's input.
            gates: as for ``mix``.
            active: as for ``mix``.
            routing: the tasks of the batch.
        """

    @abstractmethod
    def own_changes(self, routing: Routing) -> Changes:
        """Returns what maps a role and its input to the change of every expert by itself.

        The input is [batch, seq, in] of the first maps, which all read the same, and [experts, batch, seq, in] of the last.
        """

    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        changes = self.mixed_changes(hidden_states, gates, active, routing)
        return ffn.run(hidden_states, _changed(ffn, changes))

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        return self.own_outputs(hidden_states, ffn, routing).whole()

    def mixed_outputs(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Outputs:
        return _outputs(hidden_states, ffn, self.mixed_changes(hidden_states, gates, active, routing))

    def own_outputs(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Outputs:
        return _outputs(hidden_states, ffn, self.own_changes(routing))


def _changed(ffn: FrozenFeedForward, changes: Changes) -> Callable[[str, Tensor], Tensor]:
    """The block's linear maps with their changes; of several experts by themselves [experts, batch, seq, out]."""
    return lambda role, x: changes(role, x).added(ffn.linear(role, x))


def _outputs(hidden_states: Tensor, ffn: FrozenFeedForward, changes: Changes) -> Outputs:
    inner = ffn.inner(hidden_states, _changed(ffn, changes))
    return Outputs(kept=[Kept(inner, changes("down", inner))], ffn=ffn)
