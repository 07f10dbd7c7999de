"""MOELoRA's gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.routers.base import Router, RouterShape, Routing


class MOELoRA(Router):
    """A gate that reads an embedding of the task: ``g = softmax(W e_t)``.

    It depends on the task alone. Unlike ``TaskSelector``, tasks share W. Starts at the prior, where the embedding is at
    least as wide as there are tasks. Source: Liu et al., arXiv 2310.18339, with ``LoRA`` experts.

    Args:
        embedding_size: width of the task embeddings.

    Raises:
        AlterError: by ``check``, where the embedding has no width.
    """

    reads_tokens = False

    def __init__(self, embedding_size: int = 64) -> None:
        super().__init__()
        self.embedding_size = embedding_size

    def check(self) -> None:
        self._require("embedding_size", self.embedding_size > 0, "give 1 or more, best at least the number of tasks")

    def build(self, shape: RouterShape) -> None:
        self.embedding = nn.Embedding(shape.num_tasks, self.embedding_size)
        self.gate = nn.Linear(self.embedding_size, shape.num_experts, bias=False)
        self.starts_at_prior = self.embedding_size >= shape.num_tasks
        log_prior = shape.prior.clamp_min(1e-6).log()
        self.gate.weight.data = (torch.linalg.pinv(self.embedding.weight.detach()) @ log_prior).T.contiguous()

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        embedded = self.embedding(routing.rows(hidden_states.shape[0]))
        return self.gate(embedded).softmax(-1).unsqueeze(1)
