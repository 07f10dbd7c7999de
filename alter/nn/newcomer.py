"""A task that joins a trained model: an expert of its own, and what it borrows from those that are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alter.nn.experts import Expert
from alter.nn.frozen import FrozenFeedForward
from alter.nn.routers import Routing


class Newcomer(nn.Module):
    """What one layer has for a task that was added after training; nothing of the layer's other parts changes.

    The layer's equations with rows of its own for the selector and the gate, which are the same for every token:
    ``e = sum_k g_k A_k(x) + g_own N(x)``, ``y = F(x) + a_0 e + sum_k a_k S_k(x)`` with ``g = softmax(selector)`` and
    ``a = softmax(gate)``. Experts that blend parameters are blended with ``g_k / (1 - g_own)``, and their mixture is
    weighted with ``1 - g_own``. Source: arXiv 2309.11042 for the layer; ALTER's own for its growth.

    Args:
        expert: template of N.
        frozen: the frozen block.
        num_experts: of the layer.
        num_shared: of the layer; 0 before stage 2.
        own: g_own at the start; the other experts share the rest alike.
        keep: a_0 at the start; the shared experts share the rest alike.
    """

    def __init__(
        self, expert: Expert, frozen: FrozenFeedForward, num_experts: int, num_shared: int, own: float, keep: float
    ) -> None:
        super().__init__()
        self.expert = expert.fresh()
        self.expert.build(frozen, 1, 1)
        self.rates = nn.ParameterDict({"selector": _log_shares(own, num_experts).roll(-1)})
        if num_shared:
            self.rates["gate"] = _log_shares(keep, num_shared)

    def gates(self) -> tuple[Tensor, Tensor]:
        """The shares of the layer's experts and of its own, [experts + 1], and of e and the shared experts, [1 + K]."""
        selector = self.rates["selector"]
        gate = self.rates["gate"] if "gate" in self.rates else selector.new_zeros(1)
        return selector.softmax(-1), gate.softmax(-1)

    def parts(self) -> dict[str, nn.Module]:
        """What trains: its expert, and its rates of the mixture."""
        return {"expert": self.expert, "rates": self.rates}

    def forward(
        self, x: Tensor, experts: Expert, shared: Expert | None, frozen: FrozenFeedForward, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """Returns what is added to, or stands for, F(x), and how much of F(x) it holds already.

        Args:
            x: [rows, seq, d], tokens of this task alone.
            experts: the layer's task experts.
            shared: its shared experts.
            frozen: the frozen block.
            routing: of these rows.

        Returns:
            [rows, seq, d] and a scalar.
        """
        g, a = self.gates()
        others, own = g[:-1].sum(), g[-1]
        borrowed = (g[:-1] / others).expand(x.shape[0], 1, -1)
        whole = torch.ones(x.shape[0], 1, 1, device=x.device)
        parts = [
            (a[0] * others, experts.mix(x, borrowed, frozen, None, routing), experts.contains_ffn),
            (a[0] * own, self.expert.mix(x, whole, frozen, None, routing), self.expert.contains_ffn),
        ]
        if shared is not None:
            outputs = shared.each(x, frozen, routing).unbind(-2)
            parts += [
                (share, output, shared.contains_ffn) for share, output in zip(a[1:].unbind(), outputs, strict=True)
            ]
        held = torch.stack([share * holds for share, _, holds in parts]).sum()
        added = torch.stack([share.to(output.dtype) * output for share, output, _ in parts]).sum(0)
        return added, held


def _log_shares(first: float, others: int) -> Tensor:
    """One share and the rest in equal parts, [1 + others]; of none there is a little, else it could not grow."""
    return torch.tensor([first, *[(1 - first) / others] * others]).clamp_min(1e-6).log()
