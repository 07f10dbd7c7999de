"""A gate that needs no task: it reads what the prompt asks for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.routers.base import Router, RouterShape, Routing, start_small


class Description(Router):
    """A linear gate that reads the prompt, so that it works where the task is unknown: ``g = softmax(h / temperature)``.

    ``h = W norm(m) + b``, m the mean of the backbone's frozen input embeddings over the prompt's tokens and norm a layer
    norm without weights. The same for all tokens of an example. Loss: ``-supervision * mean(log g_own)``, own the expert
    of the example's task; answers never look at the task.

    Starts near the tasks' mean prior. Source: ALTER's own, a linear text classifier over mean embeddings (Joulin et al.,
    arXiv 1607.01759) as the gate.

    Args:
        temperature: below 1 sharpens.
        supervision: weight of the loss; None for 0.01 where each task has an expert of its own, else 0.

    Raises:
        AlterError: by ``check``, where the temperature is not above 0, or the weight is negative.
    """

    reads_task = False
    reads_tokens = False
    reads_prompt = True
    own: Tensor

    def __init__(self, temperature: float = 1.0, supervision: float | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.supervision = supervision

    def check(self) -> None:
        self._require_temperature()
        if self.supervision is not None:
            self._require_weights("supervision")

    def build(self, shape: RouterShape) -> None:
        self.gate = nn.Linear(shape.prompt_size, shape.num_experts)
        start_small(self.gate.weight)
        self.gate.bias.data = shape.prior.mean(0).clamp_min(1e-6).log() * self.temperature
        self.register_buffer("own", shape.own, persistent=False)
        # Never so in stage 2, where all tasks have the same.
        apart = shape.num_tasks == shape.num_experts == len(self.own.unique())
        self.weight = self.supervision if self.supervision is not None else 0.01 * apart

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        prompt = routing.prompt_rows(hidden_states.shape[0])
        logits = self.gate(F.layer_norm(prompt, prompt.shape[-1:])).float() / self.temperature
        if self.learning and self.weight:
            own = self.own[routing.rows(hidden_states.shape[0])]
            routing.add_loss(self.weight * F.cross_entropy(logits, own))
        return logits.softmax(-1).unsqueeze(1)
