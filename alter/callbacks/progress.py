"""How far a stage is: a live bar in a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from alter.callbacks.throughput import Throughput
from alter.machine import peak_memory_bytes
from alter.stages.base import StageModule

LINE_SECONDS = 30.0
TASKS = 4  # named in a line
ALL_TASKS = 24  # below a bar, where there is room


class Bar(Progress):
    """The bar with steps, times, speed and memory, and below it the losses; both fit 80 columns."""

    def __init__(self, console: Console) -> None:
        wide = console.width >= 100
        columns = [
            TextColumn("[bold]{task.description}"), BarColumn(24 if wide else 12), MofNCompleteColumn(),
            *([TimeElapsedColumn()] if wide else []), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        ]  # fmt: skip
        super().__init__(*columns, console=console, refresh_per_second=2)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn: rich's table of bars, and the losses."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["losses"]) for task in self.tasks)


class StageProgress(ProgressBar):
    """Tells stage, step, time left, loss over all and per task, tokens a second and memory; on the first process alone.

    Args:
        name: of the stage.
        throughput: that counts its tokens.
        console: where to; by default standard error.
    """

    def __init__(self, name: str, throughput: Throughput, console: Console | None = None) -> None:
        super().__init__()
        self.name, self.throughput = name, throughput
        self.console = console or Console(stderr=True)
        self._enabled = True
        self._bar: Bar | None = None
        self._told = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether this process tells anything."""
        return self._enabled

    def disable(self) -> None:
        """Asked for by Lightning on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar, where there is a terminal."""
        self._total = int(trainer.estimated_stepping_batches)
        self._started, self._first = time.monotonic(), trainer.global_step
        if not (self._enabled and self.console.is_terminal):
            return
        self._bar = Bar(self.console)
        self._row = self._bar.add_task(self.name, total=self._total, completed=trainer.global_step, facts="", losses="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves on."""
        if not self._enabled:
            return
        if self._bar is not None:
            losses = _losses(trainer, cast(StageModule, pl_module), "train/loss", ALL_TASKS)
            self._bar.update(self._row, completed=trainer.global_step, facts=self._facts(), losses=losses)
        elif time.monotonic() - max(self._told, self._started) > LINE_SECONDS:
            self._tell(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the losses of validation."""
        if not self._enabled or trainer.sanity_checking:
            return
        losses = _losses(trainer, cast(StageModule, pl_module), "val/loss")
        self.console.print(
            f"{self.name}: step {trainer.global_step}, validation {losses}", highlight=False, soft_wrap=True
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled:
            self._tell(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the bar, so that what is wrong can be read."""
        if self._bar is not None:
            self._bar.stop()

    def _tell(self, trainer: Trainer, module: LightningModule) -> None:
        self._told = time.monotonic()
        done = trainer.global_step - self._first
        left = (self._told - self._started) / max(done, 1) * (self._total - trainer.global_step)
        share = trainer.global_step / max(self._total, 1)
        self.console.print(
            f"{self.name}: step {trainer.global_step} of {self._total} ({share:.0%}), {left / 60:.1f} min left, "
            f"{_losses(trainer, cast(StageModule, module), 'train/loss')}, {self._facts()}",
            highlight=False,
            soft_wrap=True,
        )

    def _facts(self) -> str:
        speed = self.throughput.tokens / max(self.throughput.seconds, 1e-9)
        return f"{speed:,.0f} tokens/s, {peak_memory_bytes() / 2**30:.1f} GiB"


def _losses(trainer: Trainer, module: StageModule, name: str, most: int = TASKS) -> str:
    """The loss over all, and in brackets the tasks', the highest first, as far as they have been logged."""
    known = trainer.callback_metrics
    losses = {task: float(known[key]) for task in module.model.tasks if (key := f"{name}/{task}") in known}
    highest = sorted(losses, key=lambda task: -losses[task])
    tasks = [f"{task} {losses[task]:.3f}" for task in highest[:most]]
    if len(highest) > most:
        tasks.append(f"{len(highest) - most} lower")
    whole = f"{float(known[name]):.3f}" if name in known else "-"
    return f"loss {whole} ({', '.join(tasks)})" if tasks else f"loss {whole}"
