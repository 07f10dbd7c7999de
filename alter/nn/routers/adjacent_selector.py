"""The selector of the authors' released code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class AdjacentSelector(Router):
    """A Task Weights Selector that starts on two adjacent experts, ``g = softmax(theta_t / temperature)``.

    Task t starts on experts ``t % E`` and ``(t + 1) % E``, whatever the prior. Once shared experts join in stage 2, these
    two alone answer, with their two weights of the E as they are: the mixture is ``w_t E_t + w_{t+1} E_{t+1}``, whose
    weights sum to less than one, and nothing stands in for the rest. Source: the released code of arXiv 2309.11042.

    Args:
        temperature: below 1 sharpens.
        pair: where theta starts for the task's two experts.
        others: where it starts for the other experts.
    """

    reads_tokens = False
    starts_at_prior = False
    own: Tensor

    def __init__(self, temperature: float = 0.1, pair: float = 0.22, others: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature
        self.pair = pair
        self.others = others
        self._pair_alone = False

    @property
    def active(self) -> int | None:
        return min(2, self.theta.shape[1]) if self._pair_alone else None

    def check(self) -> None:
        self._require_temperature()

    def build(self, shape: RouterShape) -> None:
        task = torch.arange(shape.num_tasks).unsqueeze(1)
        two = torch.cat([task, task + 1], dim=1) % shape.num_experts
        own = torch.zeros(shape.num_tasks, shape.num_experts, dtype=torch.bool).scatter(1, two, True)
        self.theta = nn.Parameter(torch.where(own, self.pair, self.others))
        self.register_buffer("own", own, persistent=False)

    def join_shared(self) -> None:
        self._pair_alone = True

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        tasks = routing.rows(hidden_states.shape[0])
        gates = (self.theta[tasks] / self.temperature).softmax(-1)
        if self._pair_alone:
            gates = gates * self.own[tasks]
        return gates.unsqueeze(1)
