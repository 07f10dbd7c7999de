"""Stage 2's gate of the authors' released code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class FirstPositionGate(Router):
    """A gate that reads ``[e; S_1..S_K]`` at a sequence's first position and holds for all of it.

    ``a = softmax(V relu(U x_0))``, without biases and from random weights, whatever the prior. The released code of
    arXiv 2309.11042 reads ``x_0`` anew at each step of cached decoding, where it is another token; here the gates of the
    first position are kept for the steps that follow, so that decoding computes what training did.

    Args:
        hidden: units between the two layers; None for ``hidden_size / experts``: in stage 2 the backbone's width.
    """

    reads_task = False
    reads_sequence = True
    starts_at_prior = False

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = hidden
        self._kept: Tensor | None = None

    def check(self) -> None:
        self._require("hidden", self.hidden is None or self.hidden >= 1, "give 1 or more, or none")

    def build(self, shape: RouterShape) -> None:
        hidden = self.hidden or shape.hidden_size // shape.num_experts
        self.inner = nn.Linear(shape.hidden_size, hidden, bias=False)
        self.outer = nn.Linear(hidden, shape.num_experts, bias=False)

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        rows = len(hidden_states)
        if routing.cached and self._kept is not None:  # beams or choices may have joined since; they stand together
            return self._kept.repeat_interleave(rows // len(self._kept), 0)
        # One path for all: activation checkpointing runs a layer again when another stack has noted its own start. While
        # training every start is 0, since training batches are padded on the right.
        start = torch.zeros_like(hidden_states[:, 0, 0], dtype=torch.long) if routing.first is None else routing.first
        first = hidden_states[torch.arange(rows, device=hidden_states.device), start].unsqueeze(1)
        gates = self.outer(self.inner(first).relu()).softmax(-1)
        self._kept = gates.detach()
        return gates
