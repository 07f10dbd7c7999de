"""Stage 2's gate."""

from __future__ import annotations

from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


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

    def check(self) -> None:
        self._require("hidden", self.hidden >= 1, "give 1 or more")

    def build(self, shape: RouterShape) -> None:
        self.inner = nn.Linear(shape.hidden_size, self.hidden)
        self.outer = nn.Linear(self.hidden, shape.num_experts)
        nn.init.zeros_(self.outer.weight)
        self.outer.bias.data = shape.prior.mean(0).clamp_min(1e-6).log()

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        return self.outer(self.inner(hidden_states).relu()).softmax(-1)
