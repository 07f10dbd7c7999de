"""What every router is: the interface, and what it may look at."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from alter.errors import AlterError
from alter.nn.template import Template


@dataclass
class Routing:
    """What routers may look at beside the hidden states; one object, shared by all layers of a model.

    Attributes:
        task_ids: [batch], the task of each example.
        only_task: the task of all rows, where that is told apart from ``task_ids``, whose values an exporter's trace does not know.
        prompt: [batch, prompt_size], the mean of each prompt's input embeddings, where a router reads it.
        positions: [batch, n], the positions whose output matters after the last block, while training; None for all.
        cached: tokens that came before the hidden states, in the cache of the stack that runs; 0 at a sequence's start.
        first: [rows], where each row of the hidden states starts behind padding on its left; None means all at 0, or a
            step that goes on from a cache.
        masks: while training, which tokens count in the routers' own losses: those of the ``encoder`` and the
            ``decoder`` [batch, seq], and of ``positions`` [batch, n].
        mask: the one of them that fits the hidden states, in what a layer hands its routers; None where all count.
        losses: collects the routers' own losses during a forward pass that trains; None at other times, such as the
            second forward pass of activation checkpointing.
        known: gates that depend on the task alone, by router and rows, which every step of decoding would compute anew.
    """

    task_ids: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    only_task: int | None = None
    prompt: Tensor = field(default_factory=lambda: torch.zeros(1, 0))
    positions: Tensor | None = None
    cached: int = 0
    first: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    losses: list[Tensor] | None = None
    known: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)

    def announce(self, task_ids: Tensor, prompt: Tensor) -> None:
        """Says whom the next calls are about, of all of whose tokens the output matters; forgets the last ones.

        Args:
            task_ids: [batch].
            prompt: [batch, prompt_size], or [1, prompt_size] where no router reads it.
        """
        self.task_ids, self.prompt, self.only_task = task_ids, prompt, None
        self.positions, self.masks, self.known = None, {}, {}

    def seen_at(self, place: str) -> Self:
        """The same with the mask of ``place``, a key of ``masks``."""
        return replace(self, mask=self.masks[place]) if place in self.masks else self

    def rows(self, count: int) -> Tensor:
        """The task of each of ``count`` rows: beams or choices of one example stand next to each other.

        Give ``tensor.shape[0]`` and not ``len(tensor)``, which an exporter's trace would take for a constant.
        """
        return self.task_ids.repeat_interleave(count // len(self.task_ids))

    def prompt_rows(self, count: int) -> Tensor:
        """The prompt of each of ``count`` rows, [count, prompt_size]."""
        return self.prompt.repeat_interleave(count // len(self.prompt), 0)

    def of_rows(self, index: Tensor, count: int) -> Self:
        """The same for some of ``count`` rows alone, those in ``index``."""

        def own(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(count // len(values), 0)[index]

        tasks, prompt = self.rows(count)[index], self.prompt_rows(count)[index]
        return replace(self, task_ids=tasks, prompt=prompt, first=own(self.first), mask=own(self.mask), known={})

    def add_loss(self, loss: Tensor) -> None:
        """Adds a router's own loss, a scalar, to the batch's.

        Routers compute it whenever they train, since activation checkpointing's second pass has to do as the first did;
        only the first counts.
        """
        if self.losses is not None:
            self.losses.append(loss)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of [batch, seq, ...] over the tokens that count."""
        if self.mask is None:
            return values.flatten(0, 1).mean(0)
        shares = (self.mask / self.mask.sum().clamp_min(1)).to(values.dtype)
        return (values * shares.view(*shares.shape, *[1] * (values.dim() - 2))).sum((0, 1))


@dataclass(frozen=True)
class RouterShape:
    """The sizes that a router is built for.

    Attributes:
        num_tasks: tasks of the model.
        num_experts: experts to choose from.
        hidden_size: width of the router's input.
        prior: [tasks, experts], the gates to start from, each row summing to one.
        own: [tasks], each task's own expert; in stage 2 always 0, the task experts' mixture.
        prompt_size: width of ``Routing.prompt``.
    """

    num_tasks: int
    num_experts: int
    hidden_size: int
    prior: Tensor
    own: Tensor
    prompt_size: int = 0


class Router(Template):
    """Maps a token, its task or its prompt to a weight for every expert.

    A design that has a loss of its own hands it, already weighted, to ``routing.add_loss`` in ``forward`` while it is
    ``learning``.

    Attributes:
        normalised: whether the gates of a token sum to one.
        reads_task: whether the gates depend on the task; a model all of whose routers say False answers whatever the task is.
        reads_tokens: whether a token's gates depend on its hidden state; False lets a model be collapsed to one task.
        reads_prompt: whether it needs ``Routing.prompt``, which is not made otherwise.
        reads_sequence: whether a token's gates depend on other tokens too, so that the layer must always hand over all.
        starts_at_prior: whether the first gates are the prior's, at least on average; known once it is built.
        reads_linearly: whether nothing but one linear map reads what stage 2's gate is given, which then is handed to it as
            ``alter.nn.outputs.Outputs``, whose ``read`` applies that map.
    """

    temperature: float
    normalised = True
    reads_task = True
    reads_tokens = True
    reads_prompt = False
    reads_sequence = False
    starts_at_prior = True
    reads_linearly = False

    def first_gates(self, prior: Tensor) -> Tensor:
        """The gates that a new router makes of its prior, [..., experts]: the prior, unless it leaves some experts out."""
        return prior

    @property
    def reads_task_alone(self) -> bool:
        """Whether the gates depend on nothing but the task."""
        return not (self.reads_tokens or self.reads_prompt or self.reads_sequence)

    @torch.no_grad()
    def task_gates(self, task_id: int) -> Tensor:
        """The gates of one task, [experts], of a built router in evaluation mode that reads the task alone.

        Raises:
            AlterError: it reads something else too, so that a task has no gates of its own.
        """
        if not self.reads_task_alone:
            what = "prompt" if self.reads_prompt else "first position" if self.reads_sequence else "token"
            raise AlterError(f"{type(self).__name__} reads every {what}, so a task has no fixed gates.")
        own = chain(self.parameters(), self.buffers(), [torch.empty(0)])  # fixed gates may be neither
        device = next(own).device
        return self(torch.zeros(1, 1, 1, device=device), Routing(torch.tensor([task_id], device=device))).flatten()

    @property
    def learning(self) -> bool:
        """Whether it trains now; only then does it draw noise and have losses, so a frozen router is what was saved."""
        return self.training and any(parameter.requires_grad for parameter in self.parameters())

    @property
    def active(self) -> int | None:
        """How many experts a token uses, where that is fewer than all; None for all."""
        return None

    def check_experts(self, num_experts: int) -> None:
        """Says what does not fit a number of experts; a recipe's stage 2 is asked before stage 1 trains.

        Raises:
            AlterError: an argument does not fit it.
        """

    @abstractmethod
    def build(self, shape: RouterShape) -> None:
        """Makes the parameters.

        Raises:
            AlterError: an argument does not fit these sizes.
        """

    def join_shared(self) -> None:
        """Told to the task experts' router when stage 2's shared experts join, and again when such a model is loaded."""

    @abstractmethod
    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Returns the gates.

        Args:
            hidden_states: [batch, seq, hidden_size].
            routing: the tasks of the batch.

        Returns:
            [batch, seq, experts], or [batch, 1, experts] where they depend on the task or the prompt alone.
        """

    def _require_weights(self, *keys: str) -> None:
        """Raises AlterError where one of these arguments is negative."""
        for key in keys:
            self._require(key, getattr(self, key) >= 0, "give 0 to leave it out, or more")

    def _require_temperature(self) -> None:
        self._require("temperature", self.temperature > 0, "give a number above 0, such as 1.0")


def start_small(weight: Tensor) -> None:
    """Fills [..., in] so that inputs of unit size move the logits by about 0.1: enough to tell experts apart."""
    nn.init.normal_(weight, std=0.1 * weight.shape[-1] ** -0.5)


def keep_largest(probabilities: Tensor, k: int) -> Tensor:
    """The k largest of [..., experts] over their sum, zero elsewhere."""
    kept, chosen = probabilities.topk(k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, chosen, kept / kept.sum(-1, keepdim=True))
