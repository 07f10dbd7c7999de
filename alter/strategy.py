"""Which of Lightning's strategies a recipe may name, and with which precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from alter.errors import did_you_mean
from alter.nn.backbone import QUANTISED

ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # for what is not worth several processes
KNOWN = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2")
_SHARDED = ("fsdp", "model_parallel", "modelparallel", "deepspeed")
_FORKED = ("spawn", "fork", "notebook")


def devices(trainer: Mapping[str, Any]) -> Any:
    """A recipe's ``trainer.devices``, which Lightning takes for all there are: one where neither it nor what started this says several."""
    named, strategy = trainer.get("devices") or "auto", trainer.get("strategy") or "auto"
    launched = max(int(os.environ.get(count, "1")) for count in ("SLURM_NTASKS", "LOCAL_WORLD_SIZE"))
    several = launched > 1 or (trainer.get("num_nodes") or 1) > 1
    return 1 if (named, strategy) == ("auto", "auto") and not several else named


def check_strategy(strategy: str | Mapping[str, Any] | None, precision: str) -> list[str]:
    """What is wrong with a recipe's ``trainer.strategy``.

    Args:
        strategy: a name, or ``class_path`` and ``init_args``.
        precision: the recipe's.

    Returns:
        a sentence for each mistake; before anything is loaded.
    """
    name = (
        str(strategy.get("class_path", "")).rpartition(".")[2]
        if isinstance(strategy, Mapping)
        else str(strategy or "auto")
    )
    lower = name.lower()
    if any(part in lower for part in _SHARDED):
        if precision in QUANTISED:
            return [
                f"trainer.strategy: {name} cuts the weights over the processes, and precision {precision} cannot be sharded, "
                "since bitsandbytes keeps the scales of a quantised map beside it; write ddp, or precision bf16."
            ]
        if lower not in ("fsdp2", "fsdp2strategy"):
            return [
                f"trainer.strategy: {name} is not the way ALTER cuts weights over processes; write fsdp2, or ddp where "
                "the backbone fits on one GPU."
            ]
    if any(part in lower for part in _FORKED):
        return [f"trainer.strategy: {name} copies a running process, which ALTER's stages cannot follow; write ddp."]
    if isinstance(strategy, str) and strategy not in KNOWN and not lower.startswith(("ddp_find", "single", "xla")):
        return [f"trainer.strategy: '{name}' is not one of {', '.join(KNOWN)}.{did_you_mean(name, KNOWN)}"]
    return []
