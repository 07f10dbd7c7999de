"""The processes that train together, where there are several."""

from __future__ import annotations

from typing import Any

import torch


def world_size() -> int:
    """How many there are."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def gather_objects(own: Any) -> list[Any]:
    """Each one's object, by rank; all must ask."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, own)
    return found
