"""Weights cut over processes by FSDP2, and put together again for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alter.errors import AlterError

if TYPE_CHECKING:
    from alter.nn.model import MTAModel


def shard(model: MTAModel, mesh: DeviceMesh) -> None:
    """Cuts every weight along its first dimension, so that each process holds one slice of it.

    A block's weights are put together for as long as it runs; those outside the blocks (embeddings, norms, head) for as
    long as the model runs. Source: arXiv 2304.11277, as torch's ``fully_shard``.

    Args:
        model: the same on every process.
        mesh: the processes, one dimension.

    Raises:
        AlterError: a weight stayed whole.
    """
    # Where Hugging Face's own device maps never cut.
    blocks = set(cast("list[str] | None", model.backbone._no_split_modules) or ())
    for module in model.backbone.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        most = -(-parameter.shape[0] // mesh.size()) * parameter[0].numel()
        if not isinstance(parameter, DTensor) or parameter.to_local().numel() > most:
            raise AlterError(f"trainer.strategy: the weight {name} stayed whole on every process; write ddp instead.")


def local_numel(model: torch.nn.Module) -> int:
    """How many weights this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts slices together, on the CPU; every process must call it, with the same names.

    Tensors that are whole stay as they are.
    """
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def slice_like(value: Tensor, own: Tensor) -> Tensor:
    """This process's slice of a whole tensor, where ``own`` is one; every process has the whole."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def put_away(model: torch.nn.Module) -> None:
    """Cuts weights again that a run without a backward pass left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
