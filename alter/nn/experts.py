"""Experts: E adapters of one shape, stacked in one tensor each, so that no loop runs over experts or examples.

An expert A_k adds to the frozen feed-forward F of a block: the layer computes ``F(x) + sum_k g_k A_k(x)``. Experts of
the kind that varies F itself (``LoRA``, ``FFNCopy``) have ``A_k(x) = F_k(x) - F(x)``; they return F_k(x) whole and say so
by ``contains_ffn``, so that F need not be computed where it cancels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter.nn.feed_forward import dense_weight
from alter.nn.frozen import FrozenFeedForward
from alter.nn.template import Template


class Expert(Template):
    """A stack of experts for one feed-forward block.

    Attributes:
        contains_ffn: whether ``mix`` and ``each`` return whole feed-forward outputs F_k(x) rather than additions to F(x).
        blends_parameters: whether ``mix`` blends the experts' weights, so that gates need not sum to one.
    """

    contains_ffn = False
    blends_parameters = False

    @abstractmethod
    def build(self, ffn: FrozenFeedForward, num_experts: int) -> None:
        """Makes the parameters for ``num_experts`` experts beside the frozen block ``ffn``."""

    @abstractmethod
    def mix(self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None = None) -> Tensor:
        """Returns the experts' mixture ``sum_k g_k A_k(x)``.

        Args:
            hidden_states: [batch, seq, d], the block's input.
            gates: [batch, seq or 1, experts].
            ffn: the frozen block.
            active: how many gates of a token are not zero, where the router knows; None for all.

        Returns:
            [batch, seq, d].
        """

    @abstractmethod
    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward) -> Tensor:
        """Returns every expert's output by itself, [batch, seq, experts, d]."""


class _Few(NamedTuple):
    """The few experts that each example of a batch uses.

    Attributes:
        chosen: [batch, active], the experts.
        gates: [batch, active], their gates.
    """

    chosen: Tensor
    gates: Tensor

    def inputs(self, weight: Tensor) -> Tensor:
        """[in, experts, rank] -> [batch, in, active * rank]."""
        return self._gather(weight.movedim(1, 0)).transpose(1, 2).flatten(2)

    def outputs(self, weight: Tensor) -> Tensor:
        """[experts, rank, out] -> [batch, active * rank, out]."""
        return self._gather(weight).flatten(1, 2)

    def _gather(self, weight: Tensor) -> Tensor:  # index_select, since indexing has a slow backward pass
        return weight.index_select(0, self.chosen.flatten()).unflatten(0, self.chosen.shape)

    def units(self, rank: int) -> Tensor:
        """The gates of the units between the two, [batch, 1, active * rank]."""
        return self.gates.repeat_interleave(rank, -1).unsqueeze(1)


def _few_experts(hidden_states: Tensor, gates: Tensor, active: int | None) -> _Few | None:
    """The experts of each example, where their gates depend on the task alone and are few.

    Their weights are then gathered, which costs as much as one adapter does. A single token an example, as in decoding,
    is cheaper through all experts than gathering weights for it.
    """
    if active is None or active == gates.shape[-1] or gates.shape[1] != 1 or hidden_states.shape[1] == 1:
        return None
    kept, chosen = gates.squeeze(1).topk(active, dim=-1)
    return _Few(chosen, kept)


class Bottleneck(Expert):
    """Parallel bottleneck adapters: ``A_k(x) = up_k(act(down_k(x)))``.

    All experts together are one wide bottleneck of ``experts * rank`` units whose activations are scaled by the gates:
    ``up(gate * act(down(x)))``. Starts at zero. Source: Houlsby et al., arXiv 1902.00751; parallel form He et al.,
    arXiv 2110.04366.

    Args:
        rank: units of each expert.
        activation: gelu, relu or silu.
    """

    def __init__(self, rank: int = 64, activation: Literal["gelu", "relu", "silu"] = "gelu") -> None:
        super().__init__()
        self.rank = rank
        self.activation = activation

    def build(self, ffn: FrozenFeedForward, num_experts: int) -> None:
        d = ffn.hidden_size
        self.down = nn.Parameter(torch.randn(d, num_experts, self.rank) * d**-0.5)
        self.up = nn.Parameter(torch.zeros(num_experts, self.rank, d))

    def _units(self, hidden_states: Tensor) -> Tensor:
        return getattr(F, self.activation)(hidden_states @ self.down.flatten(1)).unflatten(-1, self.down.shape[1:])

    def mix(self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None = None) -> Tensor:
        if few := _few_experts(hidden_states, gates, active):
            units = getattr(F, self.activation)(torch.bmm(hidden_states, few.inputs(self.down)))
            return torch.bmm(units * few.units(self.rank), few.outputs(self.up))
        return (self._units(hidden_states) * gates.unsqueeze(-1)).flatten(-2) @ self.up.flatten(0, 1)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward) -> Tensor:
        return torch.einsum("bsek,ekd->bsed", self._units(hidden_states), self.up)


class LoRA(Expert):
    """Low-rank changes of the feed-forward's own linear maps: ``F_k`` is F with ``W + (alpha / rank) B_k A_k``.

    A mixture blends the changes, ``W + sum_k g_k (alpha / rank) B_k A_k``, as one wide pair of matmuls a linear map.
    B starts at zero, so F_k starts as F. Source: Hu et al., arXiv 2106.09685.

    Args:
        rank: of each change.
        alpha: the changes are scaled by ``alpha / rank``; None means alpha = rank.
    """

    contains_ffn = True
    blends_parameters = True

    def __init__(self, rank: int = 32, alpha: float | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha

    def build(self, ffn: FrozenFeedForward, num_experts: int) -> None:
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for role, (fan_in, fan_out) in ffn.shapes.items():
            self.a[role] = nn.Parameter(torch.empty(fan_in, num_experts, self.rank).uniform_(-1, 1) * fan_in**-0.5)
            self.b[role] = nn.Parameter(torch.zeros(num_experts, self.rank, fan_out))
        self.scale = 1.0 if self.alpha is None else self.alpha / self.rank

    def mix(self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None = None) -> Tensor:
        few = _few_experts(hidden_states, gates * self.scale, active)
        scaled = few.units(self.rank) if few else (gates * self.scale).repeat_interleave(self.rank, -1)

        def linear(role: str, x: Tensor) -> Tensor:
            a, b = self.a[role], self.b[role]
            a, b = (few.inputs(a), few.outputs(b)) if few else (a.flatten(1), b.flatten(0, 1))
            change = (x.to(scaled.dtype) @ a * scaled) @ b
            frozen = ffn.linear(role, x)
            return frozen + change.to(frozen.dtype)

        return ffn.run(hidden_states, linear)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward) -> Tensor:
        experts = next(iter(self.b.values())).shape[0]

        def linear(role: str, x: Tensor) -> Tensor:  # x is [batch, seq, 1 or experts, width]
            frozen = ffn.linear(role, x)
            x = x.to(self.a[role].dtype).expand(*x.shape[:-2], experts, x.shape[-1])
            low = torch.einsum("bsed,der->bser", x, self.a[role])
            change = torch.einsum("bser,ero->bseo", low * self.scale, self.b[role])
            return frozen + change.to(frozen.dtype)

        return ffn.run(hidden_states.unsqueeze(-2), linear)


class FFNCopy(Expert):
    """Full trainable copies of the frozen feed-forward, the experts of the authors' released code (arXiv 2309.11042).

    Where a router uses few experts a token (``active``), tokens are sorted by expert and each runs through its own
    expert alone, as one grouped matmul; otherwise all experts run and are weighted.
    """

    contains_ffn = True

    def build(self, ffn: FrozenFeedForward, num_experts: int) -> None:
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for role in ffn.shapes:
            weight, bias = dense_weight(ffn.module(role))
            # contiguous [experts, in, out]: what grouped matmul reads
            self.weight[role] = nn.Parameter(weight.t().unsqueeze(0).repeat(num_experts, 1, 1).contiguous())
            if bias is not None:
                self.bias[role] = nn.Parameter(bias.unsqueeze(0).repeat(num_experts, 1))

    def mix(self, hidden_states: Tensor, gates: Tensor, ffn: FrozenFeedForward, active: int | None = None) -> Tensor:
        tokens = hidden_states.flatten(0, 1)
        weights = gates.expand(*hidden_states.shape[:2], -1).flatten(0, 1)
        mixed = self._dense(tokens, weights, ffn) if active is None else self._sparse(tokens, weights, ffn, active)
        return mixed.view_as(hidden_states)

    def each(self, hidden_states: Tensor, ffn: FrozenFeedForward) -> Tensor:
        outputs = ffn.run(hidden_states.flatten(0, 1), self._all_experts)
        return outputs.transpose(0, 1).unflatten(0, hidden_states.shape[:2])

    def _all_experts(self, role: str, x: Tensor) -> Tensor:
        """[tokens, in] or [experts, tokens, in] -> [experts, tokens, out]."""
        y = x @ self.weight[role]
        return y + self.bias[role].unsqueeze(1) if role in self.bias else y

    def _dense(self, tokens: Tensor, weights: Tensor, ffn: FrozenFeedForward) -> Tensor:
        return torch.einsum("etd,te->td", ffn.run(tokens, self._all_experts), weights)

    def _sparse(self, tokens: Tensor, weights: Tensor, ffn: FrozenFeedForward, active: int) -> Tensor:
        kept, chosen = weights.topk(active, dim=-1)  # [tokens, active]
        order = chosen.flatten().argsort(stable=True)
        source = order // active
        counts = torch.bincount(chosen.flatten(), minlength=weights.shape[-1])
        outputs = ffn.run(tokens[source], self._grouped(counts, chosen.flatten()[order]))
        weighted = outputs * kept.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, source, weighted.to(tokens.dtype))

    def _grouped(self, counts: Tensor, expert: Tensor) -> Callable[[str, Tensor], Tensor]:
        ends = counts.cumsum(0).to(torch.int32)

        def linear(role: str, x: Tensor) -> Tensor:
            y = F.grouped_mm(x.contiguous(), self.weight[role].to(x.dtype), offs=ends)
            return y + self.bias[role][expert] if role in self.bias else y

        return linear
