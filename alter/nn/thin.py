"""Products of a few rows with a weight, as decoding makes them, on a CPU."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MOST_ROWS = 64  # of more rows both orders take as long
MKL_MOST_ROWS = 16  # so few MKL multiplies fast in the usual order, in fp32 on the processors that it is made for


def thin_products(rows: int, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """``ThinProducts`` where it is of use: it looks at every call, which takes a tenth of a step.

    Args:
        rows: of the batch that is decoded.
        dtype: of the backbone.
        device: of the backbone.
    """
    return ThinProducts() if device.type == "cpu" and rows >= fewest_rows(dtype) else nullcontext()


class ThinProducts(TorchFunctionMode):
    """Within it, ``F.linear`` of few rows without a bias multiplies as ``(W x^T)^T``, on a CPU without gradients.

    A step of decoding multiplies each weight of the backbone with as many rows as the batch has. The libraries' kernels are
    made for a tall left side; with the weight there, a step of four rows takes two thirds of the time, and of sixteen nine
    tenths (``benchmarks/generation.py``, AMD EPYC). One row is a matrix-vector product already. In fp32 on Intel's processors
    up to 16 rows take half the time of the other order as they are.
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
            if fewest_rows(rows.dtype) * rows.shape[-1] <= rows.numel() <= MOST_ROWS * rows.shape[-1]:
                return (weight @ rows.flatten(0, -2).t()).t().contiguous().unflatten(0, rows.shape[:-1])
        return func(*args, **(kwargs or {}))


def fewest_rows(dtype: torch.dtype) -> int:
    """The fewest rows that the weight on the left is faster for."""
    return MKL_MOST_ROWS + 1 if dtype == torch.float32 and _is_intel() else 2


@functools.cache
def _is_intel() -> bool:
    # by the maker and not by a measurement, so that a machine always sums in the same order
    described = Path("/proc/cpuinfo")
    return "GenuineIntel" in (described.read_text() if described.is_file() else platform.processor())


def _is_plain(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        bias is None
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
    )
