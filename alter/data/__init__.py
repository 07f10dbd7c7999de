"""Tasks, where their rows come from, and how they are mixed. Knows nothing of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alter.data.collate import Collator
from alter.data.encode import encode_choices, encode_prompt
from alter.data.mixture import mixture_rates
from alter.data.sampler import MixtureBatchSampler, eval_batches
from alter.data.sources import Files, Function, Hub, Source
from alter.data.task import Task, load_tasks

if TYPE_CHECKING:
    from alter.data.module import MultiTaskDataModule

__all__ = [
    "Collator",
    "Files",
    "Function",
    "Hub",
    "MixtureBatchSampler",
    "MultiTaskDataModule",
    "Source",
    "Task",
    "encode_choices",
    "encode_prompt",
    "eval_batches",
    "load_tasks",
    "mixture_rates",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: it needs Lightning, which takes a second, and answering does not.
    if name == "MultiTaskDataModule":
        from alter.data.module import MultiTaskDataModule

        return MultiTaskDataModule
    raise AttributeError(f"module 'alter.data' has no attribute '{name}'")
