"""Tasks, where their rows come from, and how they are mixed. Knows nothing of the model."""

from alter.data.collate import Collator
from alter.data.encode import encode_choices, encode_prompt
from alter.data.mixture import mixture_rates
from alter.data.module import MultiTaskDataModule
from alter.data.sampler import MixtureBatchSampler, eval_batches
from alter.data.sources import Files, Function, Hub, Source
from alter.data.task import Task, load_tasks

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
