"""What a recipe says of one of its stages, its own section and those of both together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def stage_trainer(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The trainer's arguments in a stage."""
    return {**config["trainer"], **config[stage]["trainer"]}


def named_callbacks(trainer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The class path and the arguments of each callback among a trainer's arguments.

    The arguments are a mapping, or the parser's namespace.
    """
    given = trainer.get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        if isinstance(callback, str):  # of a class alone
            yield callback, {}
        else:
            yield str(callback.get("class_path", "")), callback.get("init_args") or {}


def stage_epochs(trainer: Mapping[str, Any]) -> int | None:
    """The epochs that a trainer's arguments ask for; None where max_steps or max_time is to end it."""
    epochs = trainer.get("max_epochs")
    return None if epochs == -1 else epochs


def trunk_cache(config: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk cache as an argument of a stage's module."""
    return {"class_path": "alter.nn.TrunkCache", "init_args": config["trunk_cache"]}
