"""Stage 1's selector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.routers.base import Router, RouterShape, Routing, keep_largest


class TaskSelector(Router):
    """Stage 1's Task Weights Selector: ``g = softmax(theta_t / temperature)``, theta one row a task.

    Starts at the prior (mostly the task's own expert). Source: arXiv 2309.11042.

    Args:
        temperature: below 1 sharpens, and speeds up how fast theta moves the gates.
        hard: the task's own expert alone, whatever the prior, and nothing to learn; one expert a token runs.
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
        return keep_largest(prior, 1) if self.hard else prior

    def build(self, shape: RouterShape) -> None:
        prior = F.one_hot(shape.own, shape.num_experts) if self.hard else shape.prior
        theta = prior.float().clamp_min(1e-6).log() * self.temperature
        self.theta = nn.Parameter(theta, requires_grad=not self.hard)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        theta = self.theta[routing.rows(hidden_states.shape[0])].unsqueeze(1)
        gates = (theta / self.temperature).softmax(-1)
        return keep_largest(gates, 1) if self.hard else gates
