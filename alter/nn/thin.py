"""Products of a few rows with a weight, as decoding makes them, on a CPU."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_ROWS = 64  # of more rows both orders take as long
MKL_MOST_ROWS = 16  # so few MKL multiplies fast in the usual order, in fp32 on the processors that it is made for


class ThinProducts:
    """Lets a model's linear maps multiply few rows as ``(W x^T)^T``: on a CPU, without gradients, where they have no bias.

    A step of decoding multiplies each weight of the backbone with as many rows as the batch has. The libraries' kernels are
    made for a tall left side; with the weight there, a step of four rows takes two thirds of the time, and of sixteen nine
    tenths (``benchmarks/generation.py``, AMD EPYC). One row is a matrix-vector product already. In fp32 on Intel's processors
    up to 16 rows take half the time of the other order as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args: model: whose linear maps; one whose ``forward`` somebody has replaced keeps it."""
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        self._linears = [
            linear
            for linear in linears
            if type(linear) is nn.Linear  # not a kind with a product of its own
            and linear.bias is None
            and linear.weight.device.type == "cpu"
            and "forward" not in vars(linear)
        ]

    @contextmanager
    def of(self, rows: int) -> Iterator[None]:
        """Within it, the maps multiply so where a batch of ``rows`` gains from it."""
        changed = [linear for linear in self._linears if _fewest_rows(linear.weight.dtype) <= rows <= MOST_ROWS]
        # the maps' own forward and not a mode that looks at every call of torch: that takes a tenth of a step
        try:
            for linear in changed:
                linear.forward = functools.partial(_thin, linear)  # type: ignore[method-assign]
            yield
        finally:
            for linear in changed:
                vars(linear).pop("forward", None)


def _thin(linear: nn.Linear, rows: Tensor) -> Tensor:
    weight, size = linear.weight, rows.shape[-1]
    few = _fewest_rows(rows.dtype) * size <= rows.numel() <= MOST_ROWS * size  # a prompt's are many
    if not few or rows.dtype != weight.dtype or torch.is_grad_enabled():
        return F.linear(rows, weight)
    return (weight @ rows.flatten(0, -2).t()).t().contiguous().unflatten(0, rows.shape[:-1])


def _fewest_rows(dtype: torch.dtype) -> int:
    """The fewest rows that the weight on the left is faster for; more than ``MOST_ROWS`` where it never is."""
    if dtype not in (torch.float32, torch.bfloat16):
        return MOST_ROWS + 1
    return MKL_MOST_ROWS + 1 if dtype == torch.float32 and _is_intel() else 2


@functools.cache
def _is_intel() -> bool:
    # by the maker and not by a measurement, so that a machine always sums in the same order
    described = Path("/proc/cpuinfo")
    return "GenuineIntel" in (described.read_text() if described.is_file() else platform.processor())
