"""The loss of target tokens, without ever holding all of their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24  # entries of one chunk: 64 MB in fp32


def token_losses(
    hidden_states: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    vocabulary: int,
    head_trains: bool = False,
) -> Tensor:
    """Cross-entropy of every target token, a chunk of logits at a time.

    A token's loss depends on its own hidden state alone, so the gradient of each chunk is taken while its logits are
    there, and only scaled in the backward pass. That holds for a frozen head; where it trains, each chunk's logits are
    made again in the backward pass.

    Args:
        hidden_states: [tokens, d], what enters the head at the target positions.
        targets: [tokens], token ids.
        logits: the head, [n, d] -> [n, vocabulary].
        vocabulary: how many logits a token has; sets the chunks.
        head_trains: whether the head's own parameters need a gradient.

    Returns:
        [tokens] in fp32, nats.
    """
    rows = max(1, MAX_LOGITS // vocabulary)
    if torch.is_grad_enabled() and hidden_states.requires_grad and not head_trains:
        return _chunked_loss(hidden_states, targets, logits, rows)
    chunks = zip(hidden_states.split(rows), targets.split(rows), strict=True)
    if head_trains and torch.is_grad_enabled():
        return torch.cat([checkpoint(_head_losses, logits, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([_head_losses(logits, *chunk) for chunk in chunks])


def _head_losses(logits: Callable[[Tensor], Tensor], hidden_states: Tensor, targets: Tensor) -> Tensor:
    return _losses(logits(hidden_states), targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _losses_and_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and its gradient, softmax minus one-hot, made in place of the logits: they are too many to copy."""
    wanted = targets.unsqueeze(1)
    logits -= logits.amax(1, keepdim=True)
    right = logits.gather(1, wanted)
    total = logits.exp_().sum(1, keepdim=True)
    logits /= total
    logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
    return (total.log() - right).squeeze(1), logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], rows: int
    ) -> Tensor:
        losses, gradients = [], []
        for states, wanted in zip(hidden_states.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                made = logits(states)
            edge = get_gradient_edge(made)  # after the change in place autograd would copy what flows into a view
            chunk, upstream = _losses_and_gradients(made.detach().float(), wanted)
            gradients += torch.autograd.grad(edge, states, upstream.to(made.dtype))
            losses.append(chunk)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * upstream.unsqueeze(1).to(gradients.dtype), None, None, None


_chunked_loss: Callable[..., Tensor] = _ChunkedLoss.apply
