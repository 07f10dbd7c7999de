"""Polytropon: tasks as sets of skills."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class Polytropon(Router):
    """A matrix Z of tasks by skills (the experts): each task has some skills, which it uses alike.

    ``g = z / sum_s z_s``; while training ``z = sigmoid((Z_t + log u - log(1 - u)) / temperature)`` with u uniform and
    drawn for each example, a relaxed Bernoulli (Gumbel-sigmoid); in answers ``z = sigmoid(Z_t)``.

    Starts at the prior. Source: Ponti et al., arXiv 2202.13914.

    Args:
        temperature: of the relaxation; below 1 draws nearer to 0 and 1.

    Raises:
        AlterError: by ``check``, where the temperature is not above 0.
    """

    reads_tokens = False

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def check(self) -> None:
        self._require_temperature()

    def build(self, shape: RouterShape) -> None:
        self.skills = nn.Parameter(shape.prior.logit(eps=1e-3))

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        logits = self.skills[routing.rows(hidden_states.shape[0])].unsqueeze(1)
        if self.learning:
            logits = (logits + torch.rand_like(logits).logit(eps=1e-6)) / self.temperature
        # sigmoid(x) / sum sigmoid(x), also where every skill is nearly off
        return nn.functional.logsigmoid(logits).softmax(-1)
