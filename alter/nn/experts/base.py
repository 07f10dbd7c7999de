"""What every expert is, and the few experts that hard routing uses."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from alter.nn.frozen import FrozenFeedForward
from alter.nn.outputs import Outputs
from alter.nn.routers.base import Routing
from alter.nn.template import Template

Linears = dict[str, tuple[Tensor, Tensor | None]]


class Expert(Template):
    """A stack of experts for one feed-forward block.

    Attributes:
        contains_ffn: whether ``mix`` and ``each`` return whole feed-forward outputs F_k(x) rather than additions to F(x).
        blends_parameters: whether ``mix`` blends the experts' weights, so that gates need not sum to one.
        holds_tasks: whether there is something in it for each task, so that a later task has no place there.
        only_multiplies: whether its parameters enter matrix products alone. In bf16 these convert them, so that a model that
            only answers may keep them converted (``MTAModel.settle``).
    """

    contains_ffn = False
    blends_parameters = False
    holds_tasks = False
    only_multiplies = False

    @abstractmethod
    def build(self, ffn: FrozenFeedForward, num_experts: int, num_tasks: int) -> None:
        """Makes the parameters for ``num_experts`` experts beside the frozen block ``ffn``, for ``num_tasks`` tasks."""

    @abstractmethod
    def mix(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Tensor:
        """Returns the experts' mixture ``sum_k g_k A_k(x)``.

        Args:
            hidden_states: [batch, seq, d], the block's input.
            gates: [batch, seq or 1, experts].
            ffn: the frozen block.
            active: how many gates of a token are not zero, where the router knows; None for all.
            routing: the tasks of the batch, for experts that hold something for each.

        Returns:
            [batch, seq, d].
        """

    @abstractmethod
    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Tensor:
        """Returns every expert's output by itself, [batch, seq, experts, d]."""

    def mixed_outputs(
        self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None, routing: Routing
    ) -> Outputs:
        """What ``mix`` returns, as the only one of ``Outputs``."""
        return Outputs(self.mix(hidden_states, gates, ffn, active, routing).unsqueeze(0))

    def own_outputs(self, hidden_states: Tensor, ffn: FrozenFeedForward, routing: Routing) -> Outputs:
        """What ``each`` returns, as ``Outputs``."""
        return Outputs(self.each(hidden_states, ffn, routing).movedim(2, 0))

    @abstractmethod
    def strengthen(self, factor: float, ffn: FrozenFeedForward) -> None:
        """Multiplies what every expert changes, so that a share of ``1 / factor`` of it is what all of it was."""

    def merged(self, gates: Tensor, ffn: FrozenFeedForward, task_id: int) -> Linears | None:
        """The linear maps of one feed-forward that is the mixture with fixed gates.

        Args:
            gates: [experts].
            ffn: the frozen block, not quantised.
            task_id: for experts that hold something for each task.

        Returns:
            role to weight [out, in] and bias [out] or None; None where no block of the same shape is the mixture.
        """
        return None


class Few(NamedTuple):
    """The few experts that each example of a batch uses.

    Attributes:
        chosen: [batch, active], the experts.
        gates: [batch, active], their gates.
    """

    chosen: Tensor
    gates: Tensor

    def inputs(self, weight: Tensor) -> Tensor:
        """[in, experts, rank] -> [batch, in, active * rank]."""
        return self._gather(weight.movedim(1, 0)).transpose(1, 2).flatten(2)

    def outputs(self, weight: Tensor) -> Tensor:
        """[experts, rank, out] -> [batch, active * rank, out]."""
        return self._gather(weight).flatten(1, 2)

    def _gather(self, weight: Tensor) -> Tensor:  # index_select, since indexing has a slow backward pass
        return weight.index_select(0, self.chosen.flatten()).unflatten(0, self.chosen.shape)

    def units(self, rank: int) -> Tensor:
        """The gates of the units between the two, [batch, 1, active * rank]."""
        return self.gates.repeat_interleave(rank, -1).unsqueeze(1)


def few_experts(hidden_states: Tensor, gates: Tensor, active: int | None) -> Few | None:
    """The experts of each example, where their gates depend on the task alone and are few.

    Their weights are then gathered, which costs as much as one adapter does. A single token an example, as in decoding,
    is cheaper through all experts than gathering weights for it.
    """
    if active is None or active == gates.shape[-1] or gates.shape[1] != 1 or hidden_states.shape[1] == 1:
        return None
    kept, chosen = gates.squeeze(1).topk(active, dim=-1)
    return Few(chosen, kept)
