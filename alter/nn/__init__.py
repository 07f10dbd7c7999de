"""Plain PyTorch: experts, routers, the layer and the model. Knows nothing of Lightning or of the data package."""

from alter.nn.experts import Bottleneck, Expert, FFNCopy, HydraLoRA, LoRA, MTLLoRA
from alter.nn.model import MTAModel
from alter.nn.mta import MixtureOfTaskAdapters
from alter.nn.routers import (
    AdjacentSelector,
    Description,
    FirstPositionGate,
    ModSquad,
    MOELoRA,
    Polytropon,
    Router,
    RouterShape,
    Routing,
    SharedGate,
    TaskGate,
    TaskSelector,
    TokenGate,
    TopK,
)
from alter.nn.trunk_cache import TrunkCache

__all__ = [
    "AdjacentSelector",
    "Bottleneck",
    "Description",
    "Expert",
    "FFNCopy",
    "FirstPositionGate",
    "HydraLoRA",
    "LoRA",
    "MOELoRA",
    "MTAModel",
    "MTLLoRA",
    "MixtureOfTaskAdapters",
    "ModSquad",
    "Polytropon",
    "Router",
    "RouterShape",
    "Routing",
    "SharedGate",
    "TaskGate",
    "TaskSelector",
    "TokenGate",
    "TopK",
    "TrunkCache",
]
