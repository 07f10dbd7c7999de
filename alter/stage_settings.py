"""What a recipe says of one of its stages, its own section and those of both together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def stage_trainer(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The trainer's arguments in a stage."""
    return {**config["trainer"], **config[stage]["trainer"]}


def named_callbacks(trainer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The class path and the arguments of each callback among a trainer's arguments.

    The arguments are a mapping, or the parser's namespace.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, str):  # of a class alone
            yield callback, {}
        else:
            yield str(callback.get("class_path", "")), callback.get("init_args") or {}


def _callbacks(trainer: Mapping[str, Any]) -> list[Any]:
    given = trainer.get("callbacks") or []
    return given if isinstance(given, list) else [given]


def for_tasks(trainer: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Any]:
    """A trainer's arguments where these tasks alone train: without callbacks that watch ``val/loss/NAME`` of another, say."""
    given = _callbacks(trainer)
    monitors = [str(arguments.get("monitor")) for _, arguments in named_callbacks(trainer)]
    # A metric's name may hold a slash, a task's none.
    watched = [name.rpartition("/")[2] if name.count("/") > 1 else None for name in monitors]
    kept = [callback for callback, task in zip(given, watched, strict=True) if task is None or task in tasks]
    return {**trainer, "callbacks": kept} if len(kept) < len(given) else dict(trainer)


def stage_epochs(trainer: Mapping[str, Any]) -> int | None:
    """The epochs that a trainer's arguments ask for; None where max_steps or max_time is to end it."""
    epochs = trainer.get("max_epochs")
    return None if epochs == -1 else epochs


def trunk_cache(config: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk cache as an argument of a stage's module."""
    return {"class_path": "alter.nn.TrunkCache", "init_args": config["trunk_cache"]}
