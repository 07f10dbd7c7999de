"""Sparse token-level gating."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing, keep_largest, start_small


class TopK(Router):
    """One linear gate for all tasks that keeps each token's k likeliest experts.

    ``p = softmax(h)``, ``h = W x + b`` (with noise added while training); the gates are the k largest p over their sum,
    the others are zero. Losses, over the tokens that are no padding:

    - ``load_balance * E sum_e f_e P_e``, f_e the share of the tokens' choices that fell on expert e, P_e the mean of p_e;
      it is ``load_balance`` where all are used alike,
    - ``z_loss * mean((log sum_e exp h_e)^2)``, which keeps logits small.

    Starts near the tasks' mean prior. Sources: Shazeer et al., arXiv 1701.06538; the losses Fedus et al. (Switch),
    arXiv 2101.03961, and Zoph et al. (ST-MoE), arXiv 2202.08906.

    Args:
        k: experts of a token. With 1 the gate is always one, so that only the losses train W.
        load_balance: weight of the first loss.
        z_loss: weight of the second.
        noise: standard deviation of the logits' noise while training.

    Raises:
        AlterError: by ``check`` and ``build``, where an argument is negative, or there are fewer than k experts.
    """

    reads_task = False

    def __init__(self, k: int = 2, load_balance: float = 0.01, z_loss: float = 0.001, noise: float = 0.0) -> None:
        super().__init__()
        self.k = k
        self.load_balance = load_balance
        self.z_loss = z_loss
        self.noise = noise

    @property
    def active(self) -> int | None:
        return self.k

    def check(self) -> None:
        self._require_weights("load_balance", "z_loss", "noise")

    def check_experts(self, num_experts: int) -> None:
        self._require("k", 1 <= self.k <= num_experts, f"give 1 to {num_experts}, the number of experts")

    def first_gates(self, prior: Tensor) -> Tensor:
        return keep_largest(prior, self.k)

    def build(self, shape: RouterShape) -> None:
        self.check_experts(shape.num_experts)
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts)
        start_small(self.gate.weight)
        self.gate.bias.data = shape.prior.mean(0).clamp_min(1e-6).log()

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        logits = self.gate(hidden_states).float()
        if self.learning and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        probabilities = logits.softmax(-1)
        gates = keep_largest(probabilities, self.k)
        if self.learning:
            chosen = routing.mean((gates > 0).float()) / self.k
            balance = gates.shape[-1] * (chosen * routing.mean(probabilities)).sum()
            size = routing.mean(logits.logsumexp(-1).square())
            routing.add_loss(self.load_balance * balance + self.z_loss * size)
        return gates
