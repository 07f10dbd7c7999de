"""What a recipe says of one of its stages, its own section and those of both together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def stage_trainer(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The trainer's arguments in a stage."""
    return {**config["trainer"], **config[stage]["trainer"]}


def stage_epochs(trainer: Mapping[str, Any]) -> int | None:
    """The epochs that a trainer's arguments ask for; None where max_steps or max_time is to end it."""
    epochs = trainer.get("max_epochs")
    return None if epochs == -1 else epochs


def trunk_cache(config: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk cache as an argument of a stage's module."""
    return {"class_path": "alter.nn.TrunkCache", "init_args": config["trunk_cache"]}
