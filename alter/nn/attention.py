"""Attention that trains as fast in bf16 as in fp32 on a processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def trainable_attention(weight: Tensor) -> AbstractContextManager[Any]:
    """``TrainableAttention`` where attention is computed in bf16 on a processor, else nothing, so that nothing is slower.

    Args:
        weight: of the backbone, wherever it is and of its precision.
    """
    bf16 = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return TrainableAttention() if bf16 and weight.device.type == "cpu" else nullcontext()


def recomputed_alike(weight: Tensor) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For ``torch.utils.checkpoint``: what the backward pass computes again is computed as it was, within the same attention.

    Args:
        weight: as for ``trainable_attention``.
    """
    return nullcontext(), trainable_attention(weight)


class TrainableAttention(TorchFunctionMode):
    """Within it a processor computes bf16 attention in fp32 where gradients pass through.

    torch's backward pass of attention takes 3 to 9 times as long in bf16 as in fp32 on a processor for the short sequences of
    a batch, where it was a fifth of a training step.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _is_slow(args):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):  # of a backbone that trains in bf16-mixed
            found = func(*map(_whole, args), **{name: _whole(value) for name, value in kwargs.items()})
        return found.to(torch.bfloat16)


def _is_slow(args: Sequence[Any]) -> bool:
    tensors = [value for value in args if isinstance(value, Tensor)]
    return (
        bool(tensors)
        and tensors[0].dtype == torch.bfloat16
        and tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)  # keys and values alone, where an adapted encoder made them
    )


def _whole(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
