"""Products of a few rows with a weight, as decoding makes them, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MOST_ROWS = 64  # of more rows both orders take as long


class ThinProducts(TorchFunctionMode):
    """Within it, ``F.linear`` of 2 to 64 rows without a bias multiplies as ``(W x^T)^T``, on a CPU without gradients.

    A step of decoding multiplies each weight of the backbone with as many rows as the batch has. The libraries' kernels are
    made for a tall left side; with the weight there, a step of four rows takes two thirds of the time, and of sixteen nine
    tenths (``benchmarks/generation.py``). One row is a matrix-vector product already.

    Rows that do not lie together in memory, as the last position's before the head, are copied first: torch would make a
    batched product of them and copy the weight for each, which takes hundreds of times as long in bf16.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _is_plain(*args):
            rows, weight = args[:2]
            if rows.shape[-1] < rows.numel() <= MOST_ROWS * rows.shape[-1]:
                return (weight @ rows.flatten(0, -2).t()).t().contiguous().unflatten(0, rows.shape[:-1])
            return F.linear(rows.contiguous(), weight)
        return func(*args, **(kwargs or {}))


def _is_plain(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        bias is None
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
    )
