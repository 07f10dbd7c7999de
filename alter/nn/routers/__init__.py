"""Routers: who answers. One interface for both stages: ``forward(x, routing) -> gates``.

To add one, subclass ``Router``: keep the hyperparameters in ``__init__``, make the parameters in ``build``, return gates in
``forward``, and name the class in the recipe by ``class_path``.
"""

from alter.nn.routers.adjacent_selector import AdjacentSelector
from alter.nn.routers.base import Router, RouterShape, Routing
from alter.nn.routers.description import Description
from alter.nn.routers.first_position_gate import FirstPositionGate
from alter.nn.routers.gates import TaskGate, TokenGate
from alter.nn.routers.mod_squad import ModSquad
from alter.nn.routers.moe_lora import MOELoRA
from alter.nn.routers.polytropon import Polytropon
from alter.nn.routers.shared_gate import SharedGate
from alter.nn.routers.task_selector import TaskSelector
from alter.nn.routers.top_k import TopK

__all__ = [
    "AdjacentSelector",
    "Description",
    "FirstPositionGate",
    "MOELoRA",
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
]
