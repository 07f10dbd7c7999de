"""Routers: who answers. One interface for both stages: ``forward(x, routing) -> gates``.

To add one, subclass ``Router``: keep the hyperparameters in ``__init__``, make the parameters in ``build``, return gates in
``forward``, and name the class in the recipe by ``class_path``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alter.nn.template import Template


@dataclass
class Routing:
    """What routers may look at beside the hidden states; one object, shared by all layers of a model.

    Attributes:
        task_ids: [batch], the task of each example.
        positions: [batch, n], the positions whose output matters after the last block, while training; None for all.
    """

    task_ids: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    positions: Tensor | None = None

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
        auxiliary_loss: set by ``forward`` where the design has a loss of its own; added to the training loss.
    """

    normalised = True
    auxiliary_loss: Tensor | None = None

    @property
    def active(self) -> int | None:
        """How many experts a token uses, where that is fewer than all; None for all."""
        return None

    @abstractmethod
    def build(self, shape: RouterShape) -> None:
        """Makes the parameters."""

    @abstractmethod
    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """Returns the gates.

        Args:
            hidden_states: [batch, seq, hidden_size].
            routing: the tasks of the batch.

        Returns:
            [batch, seq, experts], or [batch, 1, experts] where they depend on the task alone.
        """


class TaskSelector(Router):
    """Stage 1's Task Weights Selector: ``g = softmax(theta_t / temperature)``, theta one row a task.

    Starts at the prior (mostly the task's own expert). Source: arXiv 2309.11042.

    Args:
        temperature: below 1 sharpens, and speeds up how fast theta moves the gates.
        hard: the likeliest expert alone, nothing to learn; one expert a token runs.
    """

    def __init__(self, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.hard = hard

    @property
    def active(self) -> int | None:
        return 1 if self.hard else None

    def build(self, shape: RouterShape) -> None:
        theta = shape.prior.clamp_min(1e-6).log() * self.temperature
        self.theta = nn.Parameter(theta, requires_grad=not self.hard)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        theta = self.theta[routing.rows(len(hidden_states))].unsqueeze(1)
        if self.hard:
            return torch.zeros_like(theta).scatter(-1, theta.argmax(-1, keepdim=True), 1.0)
        return (theta / self.temperature).softmax(-1)


class TokenGate(Router):
    """One linear gate for all tasks, read at every token: ``g = softmax((W x + b) / temperature)``.

    Starts at the tasks' mean prior. Source: Shazeer et al., arXiv 1701.06538, without noise or top-k.

    Args:
        temperature: below 1 sharpens.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def build(self, shape: RouterShape) -> None:
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts)
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = shape.prior.mean(0).clamp_min(1e-6).log() * self.temperature

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        return (self.gate(hidden_states) / self.temperature).softmax(-1)


class TaskGate(Router):
    """A linear gate a task, read at every token: ``g = softmax((W_t x + b_t) / temperature)``.

    Starts at the prior. Source: Gupta et al., arXiv 2204.07689.

    Args:
        temperature: below 1 sharpens.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def build(self, shape: RouterShape) -> None:
        self.weight = nn.Parameter(torch.zeros(shape.num_tasks, shape.hidden_size, shape.num_experts))
        self.bias = nn.Parameter(shape.prior.clamp_min(1e-6).log() * self.temperature)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        tasks = routing.rows(len(hidden_states))
        logits = torch.bmm(hidden_states, self.weight[tasks]) + self.bias[tasks].unsqueeze(1)
        return (logits / self.temperature).softmax(-1)


class SharedGate(Router):
    """Stage 2's gate over ``[e; S_1..S_K]``: two linear layers with a ReLU between, read at every token.

    ``a = softmax(V relu(U [e; S_1..S_K]) + b)``; V starts at zero and b at the prior. The authors' code reads the first
    position only, which is wrong under cached decoding, where a step sees no first position. Source: arXiv 2309.11042.

    Args:
        hidden: units between the two layers.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden

    def build(self, shape: RouterShape) -> None:
        self.inner = nn.Linear(shape.hidden_size, self.hidden)
        self.outer = nn.Linear(self.hidden, shape.num_experts)
        nn.init.zeros_(self.outer.weight)
        self.outer.bias.data = shape.prior.mean(0).clamp_min(1e-6).log()

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        return self.outer(self.inner(hidden_states).relu()).softmax(-1)
