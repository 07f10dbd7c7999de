"""Mod-Squad: tasks and experts that depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing, keep_largest, start_small


class ModSquad(Router):
    """A noisy linear gate a task that keeps each token's k likeliest experts, and a loss that makes experts specialise.

    ``p = softmax(W_t x + b_t)`` (with noise added to the logits while training); the gates are the k largest p over
    their sum. The loss is the negative mutual information of tasks and experts,

    ``-weight * sum_{t,e} P(t,e) log(P(t,e) / (P(t) P(e)))``, ``P(t,e) = P(t) P(e|t)``, ``P(t) = 1 / tasks``,

    P(e|t) the mean of p over the task's tokens that are no padding. A batch holds few tasks, so P(e|t) is a moving average
    over batches, ``momentum * before + (1 - momentum) * batch`` for tasks in the batch; gradients flow through the
    batch's part, so that a batch moves the gates by ``(1 - momentum)`` of the weight. On several processes each takes its own
    batches' part, and under DDP all go on from the first one's average. Starts near the prior. Source: Chen et al.,
    arXiv 2212.08066.

    Args:
        k: experts of a token.
        mutual_information: weight of the loss.
        momentum: of the moving average, below 1.
        noise: standard deviation of the logits' noise while training.

    Raises:
        AlterError: by ``check`` and ``build``, where an argument is negative, momentum is not below 1, or there are fewer
            than k experts.
    """

    before: Tensor
    after: Tensor

    def __init__(self, k: int = 2, mutual_information: float = 0.01, momentum: float = 0.9, noise: float = 0.1) -> None:
        super().__init__()
        self.k = k
        self.mutual_information = mutual_information
        self.momentum = momentum
        self.noise = noise

    @property
    def active(self) -> int | None:
        return self.k

    def check(self) -> None:
        self._require_weights("mutual_information", "noise")
        self._require("momentum", 0 <= self.momentum < 1, "give 0 or more, and less than 1")

    def check_experts(self, num_experts: int) -> None:
        self._require("k", 1 <= self.k <= num_experts, f"give 1 to {num_experts}, the number of experts")

    def first_gates(self, prior: Tensor) -> Tensor:
        return keep_largest(prior, self.k)

    def build(self, shape: RouterShape) -> None:
        self.check_experts(shape.num_experts)
        self.weight = nn.Parameter(torch.empty(shape.num_tasks, shape.num_experts, shape.hidden_size))
        start_small(self.weight)
        self.bias = nn.Parameter(shape.prior.clamp_min(1e-6).log())
        # P(e|t) before the last batch and after it: activation checkpointing's second pass starts from the former again
        self.register_buffer("before", shape.prior.clone())
        self.register_buffer("after", shape.prior.clone())

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        tasks = routing.rows(hidden_states.shape[0])
        logits = (torch.bmm(hidden_states, self.weight[tasks].mT) + self.bias[tasks].unsqueeze(1)).float()
        if self.learning and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        probabilities = logits.softmax(-1)
        if self.learning:
            experts = self._experts_of_tasks(probabilities, tasks, routing)
            routing.add_loss(-self.mutual_information * _mutual_information(experts))
        return keep_largest(probabilities, self.k)

    def _experts_of_tasks(self, probabilities: Tensor, tasks: Tensor, routing: Routing) -> Tensor:
        """P(e|t) after this batch, [tasks, experts]."""
        if routing.losses is not None:
            self.before.copy_(self.after)
        mask = torch.ones_like(probabilities[..., 0]) if routing.mask is None else routing.mask.to(probabilities.dtype)
        sums = torch.zeros_like(self.before).index_add(0, tasks, (probabilities * mask.unsqueeze(-1)).sum(1))
        counts = torch.zeros_like(self.before[:, 0]).index_add(0, tasks, mask.sum(1)).unsqueeze(-1)
        share = (1 - self.momentum) * (counts > 0)
        after = (1 - share) * self.before + share * sums / counts.clamp_min(1)
        if routing.losses is not None:
            # A batch that is not finite, which may be left out, must not stay in the average. Detached before it is looked
            # at: what autograd keeps has to be the same in activation checkpointing's second pass.
            found = after.detach()
            self.after.copy_(torch.where(found.isfinite().all(-1, keepdim=True), found, self.before))
        return after


def _mutual_information(experts: Tensor) -> Tensor:
    """I(t; e) in nats for P(e|t) [tasks, experts] and tasks that are equally likely."""
    experts = experts.clamp_min(1e-9)
    return (experts * (experts.log() - experts.mean(0).log())).sum() / len(experts)
