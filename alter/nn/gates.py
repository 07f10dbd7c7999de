"""Who answers what: the gates that routers return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alter.nn.model import MTAModel


@torch.inference_mode()
def mean_gates(model: MTAModel, batch: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The gates of every router, averaged over the tokens of one example.

    In the last block of a decoder-only model they are those of the tokens that are answered with, in the others those of
    the prompt too.

    Args:
        model: in evaluation mode.
        batch: a training batch of one example, so that nothing is padding.

    Returns:
        for ``experts`` and ``shared``, where the model has such a router: layer to gates, [experts].
    """
    with _noted(model) as noted:
        model(batch)
    found: dict[str, dict[str, Tensor]] = {}
    for (kind, layer), gates in noted.items():
        found.setdefault(kind, {})[layer] = gates.float().mean((0, 1)).cpu()
    return found


@contextmanager
def _noted(model: MTAModel) -> Iterator[dict[tuple[str, str], Tensor]]:
    """The gates that each router returns within the context."""
    noted: dict[tuple[str, str], Tensor] = {}
    handles = []
    for name, layer in model.layers.items():
        for kind, router in (("experts", layer.router), ("shared", layer.shared_router)):
            if router is not None:

                def note(module: nn.Module, args: Any, gates: Tensor, key: tuple[str, str] = (kind, name)) -> None:
                    noted[key] = gates

                handles.append(router.register_forward_hook(note))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
