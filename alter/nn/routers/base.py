"""What every router is: the interface, and what it may look at."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alter.nn.template import Template


@dataclass
class Routing:
    """What routers may look at beside the hidden states; one object, shared by all layers of a model.

    Attributes:
        task_ids: [batch], the task of each example.
        positions: [batch, n], the positions whose output matters after the last block, while training; None for all.
        cached: tokens that came before the hidden states, in the cache of the stack that runs; 0 at a sequence's start.
        first: [rows], where each row of the hidden states starts behind padding on its left; None means all at 0, or a
            step that goes on from a cache.
    """

    task_ids: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    positions: Tensor | None = None
    cached: int = 0
    first: Tensor | None = None

    def rows(self, count: int) -> Tensor:
        """The task of each of ``count`` rows: beams or choices of one example stand next to each other."""
        return self.task_ids.repeat_interleave(count // len(self.task_ids))


@dataclass(frozen=True)
class RouterShape:
    """The sizes that a router is built for.

    Attributes:
        num_tasks: tasks of the model.
        num_experts: experts to choose from.
        hidden_size: width of the router's input.
        prior: [tasks, experts], the gates to start from, each row summing to one.
    """

    num_tasks: int
    num_experts: int
    hidden_size: int
    prior: Tensor


class Router(Template):
    """Maps a token, or its task, to a weight for every expert.

    Attributes:
        normalised: whether the gates of a token sum to one.
        reads_sequence: whether a token's gates depend on other tokens too, so that the layer must always hand over all.
        auxiliary_loss: set by ``forward`` where the design has a loss of its own; added to the training loss.
    """

    normalised = True
    reads_sequence = False
    auxiliary_loss: Tensor | None = None

    @property
    def active(self) -> int | None:
        """How many experts a token uses, where that is fewer than all; None for all."""
        return None

    @abstractmethod
    def build(self, shape: RouterShape) -> None:
        """Makes the parameters."""

    def join_shared(self) -> None:
        """Told to the task experts' router when stage 2's shared experts join, and again when such a model is loaded."""

    @abstractmethod
    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Returns the gates.

        Args:
            hidden_states: [batch, seq, hidden_size].
            routing: the tasks of the batch.

        Returns:
            [batch, seq, experts], or [batch, 1, experts] where they depend on the task alone.
        """
