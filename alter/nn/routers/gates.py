"""Linear gates that read every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class TokenGate(Router):
    """One linear gate for all tasks, read at every token: ``g = softmax((W x + b) / temperature)``.

    Starts at the tasks' mean prior. Source: Shazeer et al., arXiv 1701.06538, without noise or top-k.

    Args:
        temperature: below 1 sharpens.
    """

    reads_task = False

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def check(self) -> None:
        self._require_temperature()

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

    def check(self) -> None:
        self._require_temperature()

    def build(self, shape: RouterShape) -> None:
        self.weight = nn.Parameter(torch.zeros(shape.num_tasks, shape.hidden_size, shape.num_experts))
        self.bias = nn.Parameter(shape.prior.clamp_min(1e-6).log() * self.temperature)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        tasks = routing.rows(hidden_states.shape[0])
        logits = torch.bmm(hidden_states, self.weight[tasks]) + self.bias[tasks].unsqueeze(1)
        return (logits / self.temperature).softmax(-1)
