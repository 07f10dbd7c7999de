"""A short trial of a run in a process of its own: what it takes of memory and time.

    python -m alter.doctor.trial OUTPUT.json --config RECIPE ...

A few real steps of every stage, the largest batches first, a few validation batches and answers; all of it in a temporary
folder. What a whole run takes is then counted from the plan of its batches.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from alter import references
from alter.data import MultiTaskDataModule, eval_batches
from alter.data.module import example_lengths
from alter.loading import load
from alter.machine import peak_device_memory_bytes, peak_memory_bytes
from alter.nn.backbone import is_seq2seq, resolve_backbone
from alter.recipe import Recipe, read_recipe
from alter.run import quiet
from alter.stage_settings import stage_epochs
from alter.strategy import ONE_DEVICE
from alter.training import StageCLI, release
from alter.writing import write_json

LARGEST, DRAWN = 2, 6  # batches: for the memory, and for the time of a step


class Sample(MultiTaskDataModule):
    """The recipe's data, with a few of the batches that a stage will take: the largest, then some drawn.

    Attributes:
        limits: Lightning's limits of a stage's batches, by split.
        batches: that the stage will take in an epoch, by split.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.limits: dict[str, int | float | None] = {}
        self.batches: dict[str, int] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """A few training batches."""
        return self._some(super().train_dataloader(), "train")

    def val_dataloader(self) -> DataLoader[Any]:
        """A few validation batches."""
        return self._some(super().val_dataloader(), "validation")

    def _some(self, loader: DataLoader[Any], split: str) -> DataLoader[Any]:
        batches: list[Any] = list(loader.batch_sampler or ())
        batches = batches[: _share(self.limits.get(split), len(batches))]
        self.batches[split] = len(batches)
        lengths = [example_lengths(self.examples(task.name, split), apart=False) for task in self.tasks]

        def size(batch: Sequence[tuple[int, int]]) -> int:
            return len(batch) * max(lengths[task][row] for task, row in batch)

        largest = sorted(range(len(batches)), key=lambda i: size(batches[i]), reverse=True)[:LARGEST]
        rest = sorted(set(range(len(batches))) - set(largest))
        drawn = random.Random(self.seed).sample(rest, min(DRAWN, len(rest)))
        return self._loader(split, [batches[i] for i in largest + drawn])


class Clock(Callback):
    """Times the steps that follow the largest, and the validation.

    Attributes:
        steps: seconds of each step, loading the batch included.
        validation: seconds of each validation batch.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validation: list[float] = []
        self._last = 0.0

    def on_train_epoch_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Notes a step."""
        self._note(self.steps)

    def on_validation_epoch_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_validation_batch_end(self, *args: Any) -> None:
        """Notes a batch."""
        self._note(self.validation)

    def _note(self, seconds: list[float]) -> None:
        now = time.perf_counter()
        seconds.append(now - self._last)
        self._last = now


@dataclass
class Estimate:
    """What a run takes.

    Attributes:
        memory: bytes of the host at the peak.
        device_memory: bytes of the CUDA device at the peak, or None.
        seconds: of each stage and of the test; None for a stage whose end neither max_epochs nor max_steps tells.
        trainable: parameters that train, by stage.
    """

    memory: int
    device_memory: int | None
    seconds: dict[str, float | None]
    trainable: dict[str, int]


def trial(recipe: Recipe, inside: Path | None = None) -> Estimate:
    """Trains and answers a little in a temporary folder, and counts what all of it would take.

    Args:
        recipe: of the run.
        inside: where the folder is made, such as one that whoever may kill this process removes.
    """
    quiet()
    with tempfile.TemporaryDirectory(prefix="alter-doctor-", dir=inside) as folder:
        begun = recipe.run
        recipe.config["run"] = folder
        cache = recipe.config["trunk_cache"]
        if cache["enabled"]:
            recipe.config["trunk_cache"] = {**cache, "folder": str(Path(folder, "trunk"))}
        backbone = resolve_backbone(recipe.config["backbone"])
        data = Sample(**recipe.data_args(str(backbone), is_seq2seq(backbone)))
        data.setup()
        seconds: dict[str, float | None] = {}
        trainable, mapped = {}, 0
        start = Path(folder) if "stage1" in recipe.config["stages"] else begun
        for stage in recipe.config["stages"]:
            seconds[stage], trainable[stage], kept = _stage(stage, recipe, str(backbone), data, Path(folder), start)
            mapped = max(mapped, kept)
            release(data)  # as a run does
        if recipe.config["test"] and trainable:
            seconds["test"] = _test(Path(folder), recipe, data)
        return Estimate(peak_memory_bytes() + mapped, peak_device_memory_bytes(), seconds, trainable)


def _stage(
    stage: str, recipe: Recipe, backbone: str, data: Sample, run: Path, start: Path
) -> tuple[float | None, int, int]:
    """Seconds of the whole stage where its end is known, its trainable parameters, and the bytes that its trunk cache will have mapped.

    Stage 2 begins with the stage 1 of ``start``.
    """
    arguments = recipe.stage_args(stage, backbone)
    if stage == "stage2":
        arguments["model"]["init_args"]["start_from"] = str(start / "stage1" / "model")
    planned = arguments["trainer"]
    clock, started = Clock(), time.perf_counter()
    arguments["trainer"] = {**planned, **ONE_DEVICE, **ONE_EPOCH}
    cli = StageCLI(run / stage, arguments, interruptible=False)
    cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    data.limits = {"train": planned.get("limit_train_batches"), "validation": planned.get("limit_val_batches")}
    data.first_epoch = recipe.epochs_before(stage)
    cli.trainer.fit(cli.model, data)
    cli.model.model.save_pretrained(run / stage / "model", backbone)
    fixed = time.perf_counter() - started - sum(clock.steps) - sum(clock.validation)
    steps, checked = data.batches["train"], data.batches["validation"]
    epochs = _epochs(planned, steps)
    total = fixed + (epochs or 0) * steps * _typical(clock.steps)
    total += _validations(planned, steps, epochs or 0) * checked * _typical(clock.validation)
    mapped = cli.model.model.body.stored_bytes(*data.drawn_tokens(math.ceil(epochs or 1)))
    return None if epochs is None else total, cli.model.trainable_parameters(), mapped


ONE_EPOCH = {
    "max_epochs": 1,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "callbacks": None,
}


def _share(limit: int | float | None, batches: int) -> int:
    """How many batches a limit of Lightning leaves: a share of them, or a number."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else max(1, math.floor(batches * limit))


def _epochs(planned: Mapping[str, Any], batches: int) -> float | None:
    """Epochs of so many batches each, whole or in part; None where nothing bounds them that can be counted."""
    steps, together = planned.get("max_steps"), planned.get("accumulate_grad_batches") or 1
    bounds: list[float] = [] if (epochs := stage_epochs(planned)) is None else [epochs]
    if steps is not None and steps != -1:
        whole, more = divmod(steps, math.ceil(batches / together))
        bounds.append(whole + more * together / batches)
    return min(bounds, default=None)


def _validations(planned: Mapping[str, Any], steps: int, epochs: float) -> float:
    """Validations in some epochs of so many steps."""
    interval, every = planned.get("val_check_interval") or 1.0, planned.get("check_val_every_n_epoch", 1)
    if not isinstance(interval, int | float):  # a time
        return 0.0
    if every is None:  # the interval goes on over the epochs
        return math.floor(epochs * steps / interval)
    often = steps / interval if isinstance(interval, int) else 1 / interval
    whole, part = divmod(epochs, 1)
    return (whole * math.floor(often) + math.floor(part * often)) / every


def _typical(seconds: Sequence[float]) -> float:
    """Mean seconds of the drawn batches; of all where there are only the largest."""
    drawn = seconds[LARGEST:] or seconds
    return sum(drawn) / max(len(drawn), 1)


def _test(run: Path, recipe: Recipe, data: Sample) -> float:
    """Seconds of the whole test: the model, the untouched backbone, which takes as long, and TF-IDF."""
    last = run / recipe.config["stages"][-1] / "model"
    started = time.perf_counter()
    last.rename(run / "model")
    (run / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
    predictor = load(run)
    total = time.perf_counter() - started
    for task in data.tasks:
        rows = data.examples(task.name, "test")
        prompts = rows["prompt_ids"][:]
        room = 0 if task.choices else task.max_target_tokens
        chosen = eval_batches([len(prompt) + room for prompt in prompts], predictor.max_batch_tokens)[0]  # the longest
        started = time.perf_counter()
        predictor.answer(task.name, [prompts[i] for i in chosen], probabilities=False)
        total += 2 * (time.perf_counter() - started) * len(rows) / len(chosen)
        if task.choices:
            train = data.examples(task.name, "train")
            started = time.perf_counter()
            references.tfidf(train["prompt"], train["target"], rows["prompt"][:])
            total += time.perf_counter() - started
    return total


if __name__ == "__main__":
    found = trial(read_recipe(sys.argv[2:]), Path(sys.argv[1]).parent)
    write_json(sys.argv[1], vars(found))
