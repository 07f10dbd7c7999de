"""Stage 1's selector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class TaskSelector(Router):
    """Stage 1's Task Weights Selector: ``g = softmax(theta_t / temperature)``, theta one row a task.

    Starts at the prior (mostly the task's own expert). Source: arXiv 2309.11042.

    Args:
        temperature: below 1 sharpens, and speeds up how fast theta moves the gates.
        hard: the likeliest expert alone, nothing to learn; one expert a token runs.
    """

    reads_tokens = False

    def __init__(self, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.hard = hard

    @property
    def active(self) -> int | None:
        return 1 if self.hard else None

    def check(self) -> None:
        self._require_temperature()

    def first_gates(self, prior: Tensor) -> Tensor:
        return _largest_alone(prior) if self.hard else prior

    def build(self, shape: RouterShape) -> None:
        theta = shape.prior.clamp_min(1e-6).log() * self.temperature
        self.theta = nn.Parameter(theta, requires_grad=not self.hard)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        theta = self.theta[routing.rows(hidden_states.shape[0])].unsqueeze(1)
        if self.hard:
            return _largest_alone(theta)
        return (theta / self.temperature).softmax(-1)


def _largest_alone(values: Tensor) -> Tensor:
    """1 at the largest of the last dimension, 0 elsewhere."""
    return torch.zeros_like(values).scatter(-1, values.argmax(-1, keepdim=True), 1.0)
