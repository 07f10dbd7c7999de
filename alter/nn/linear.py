"""Linear maps of any kind: ``nn.Linear``, GPT-2's, quantised ones."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear map, quantised or not; None for another module."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if type(module).__name__ == "Conv1D":  # GPT-2's linear map, which keeps its weight as [in, out]
        fan_in, fan_out = weight_of(module).shape
        return fan_in, fan_out
    return None


def weight_of(linear: nn.Module) -> Tensor:
    """The weight, in the layout of its kind."""
    return cast(Tensor, linear.weight)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of what is known to be a linear map."""
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The weight [out, in] itself, for computing with it; None where it is quantised."""
    weight = weight_of(linear)
    if not weight.is_floating_point():
        return None
    return weight.t() if type(linear).__name__ == "Conv1D" else weight


def dense_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear map as plain tensors, whatever its precision.

    Args:
        linear: what ``linear_shape`` knows.

    Returns:
        copies of the weight [out, in] and the bias [out] or None, in fp32.
    """
    bias = None if linear.bias is None else cast(Tensor, linear.bias).detach().float().clone()
    if (plain := plain_weight(linear)) is not None:
        return plain.detach().float().clone(memory_format=torch.contiguous_format), bias
    # Quantised weights have layouts of their own; the map itself says what it computes.
    with torch.no_grad():
        unit = torch.eye(sizes(linear)[0], device=weight_of(linear).device)
        weight = linear(unit).float() - linear(torch.zeros_like(unit[:1])).float()
    return weight.t().contiguous(), bias
