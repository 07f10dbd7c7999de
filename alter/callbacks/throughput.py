"""How many tokens a stage has trained on, and in what time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from alter.nn.body import IGNORED
from alter.stages.base import StageModule


class Throughput(Callback):
    """Counts training tokens, padding apart, and the seconds of the steps; goes on counting after a resume.

    Validation, checkpoints and the waiting for the next batch are not in the seconds.

    Attributes:
        tokens: that all processes have read: prompts and targets.
        seconds: from the start to the end of each step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._before = 0.0
        self._begun = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds that the stage has taken in all; of a start before, up to the checkpoint from which this one went on."""
        return self._before + time.perf_counter() - self._begun

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Stops it, and counts."""
        self.seconds += time.perf_counter() - self._started
        tokens = batch["attention_mask"].sum()
        if cast(StageModule, module).model.is_seq2seq:  # else the targets stand in the same row
            tokens = tokens + (batch["labels"] != IGNORED).sum()
        tokens = (tokens * batch.get("counts", 1)).long()  # one that only keeps other processes company does not count
        self.tokens += int(trainer.strategy.reduce(tokens, reduce_op="sum"))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"tokens": self.tokens, "seconds": self.seconds, "elapsed": self.elapsed}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on from a checkpoint."""
        self.tokens, self.seconds = int(state_dict["tokens"]), state_dict["seconds"]
        self._before = state_dict["elapsed"]
