"""Plain PyTorch: experts, routers, the layer and the model. Knows nothing of Lightning or of the data package."""

from alter.nn.experts import Bottleneck, Expert, FFNCopy, LoRA
from alter.nn.model import MTAModel
from alter.nn.mta import MixtureOfTaskAdapters
from alter.nn.routers import (
    AdjacentSelector,
    FirstPositionGate,
    Router,
    RouterShape,
    Routing,
    SharedGate,
    TaskGate,
    TaskSelector,
    TokenGate,
)
from alter.nn.trunk_cache import TrunkCache

__all__ = [
    "AdjacentSelector",
    "Bottleneck",
    "Expert",
    "FFNCopy",
    "FirstPositionGate",
    "LoRA",
    "MTAModel",
    "MixtureOfTaskAdapters",
    "Router",
    "RouterShape",
    "Routing",
    "SharedGate",
    "TaskGate",
    "TaskSelector",
    "TokenGate",
    "TrunkCache",
]
