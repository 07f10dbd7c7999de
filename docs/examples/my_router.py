"""Gates by likeness: each expert has a learned key, and a token goes to the experts whose keys point its way."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn import Router, RouterShape, Routing


class CosineRouter(Router):
    """``g = softmax(cos(x, key_k) / temperature + bias_t)``, x a token's state and t its task.

    Args:
        temperature: below 1 lets likeness count for more.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature  # under its own name: the saved model describes the router by it

    def build(self, shape: RouterShape) -> None:
        """Makes random keys, and biases that start the gates near the prior."""
        self.keys = nn.Parameter(torch.randn(shape.num_experts, shape.hidden_size))
        self.bias = nn.Parameter(shape.prior.clamp_min(1e-6).log())

    def forward(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        """[batch, seq, hidden_size] -> gates [batch, seq, experts] that sum to one."""
        alike = F.normalize(hidden_states, dim=-1) @ F.normalize(self.keys, dim=-1).T
        tasks = routing.rows(hidden_states.shape[0])  # beams and choices have rows of their own
        return (alike / self.temperature + self.bias[tasks].unsqueeze(1)).softmax(-1)
