"""Stage 2's gate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.outputs import Outputs
from alter.nn.routers.base import Router, RouterShape, Routing


class SharedGate(Router):
    """Stage 2's gate over ``[e; S_1..S_K]``: two linear layers with a ReLU between, read at every token.

    ``a = softmax(V relu(norm(U [e; S_1..S_K] + c)) + b)``; V starts at zero and b at the prior. The norm, that of a layer without
    weights, is ours: a feed-forward's outputs are a hundred times larger in some blocks than in others, where the gate
    closed for good within three steps. The authors' code reads the first position only, which is wrong under cached
    decoding, where a step sees no first position. Source: arXiv 2309.11042.

    Args:
        hidden: units between the two layers.
    """

    reads_task = False
    reads_linearly = True

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden

    def check(self) -> None:
        self._require("hidden", self.hidden >= 2, "give 2 or more")

    def build(self, shape: RouterShape) -> None:
        self.inner = nn.Linear(shape.hidden_size, self.hidden)
        self.outer = nn.Linear(self.hidden, shape.num_experts)
        nn.init.zeros_(self.outer.weight)
        self.outer.bias.data = shape.prior.mean(0).clamp_min(1e-6).log()

    def forward(self, hidden_states: Tensor | Outputs, routing: Routing) -> Tensor:
        units = hidden_states.read(self.inner) if isinstance(hidden_states, Outputs) else self.inner(hidden_states)
        return self.outer(F.layer_norm(units, units.shape[-1:]).relu()).softmax(-1)
