"""Ctrl+C, or SIGTERM from outside: the batch is finished, a checkpoint written, and the run ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

TOLD = "alter: stops after this batch, or the validation that runs, with a checkpoint; a second time, at once."
SAME_SIGNAL_SECONDS = 1.0  # within which several are one: a terminal or a launcher and a parent may send it both


def is_over(trainer: Trainer) -> bool:
    """Whether the last step is done, so that what validation there is still to be would not follow in a run that goes on."""
    stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
    return stopped or trainer.global_step >= trainer.max_steps > 0


class Interruption(Checkpoint):
    """Lets all processes write a checkpoint after the same batch and stop.

    Lightning alone ends wherever it is, and what was done since the last validation is lost.

    Args:
        file: the checkpoint.
        signals: which to take.
    """

    def __init__(self, file: Path, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.file = file
        self.signals = signals
        self._asked: float | None = None  # when
        self._tells = True
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals, but for those that are ignored, as Ctrl+C is by what runs in the background."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._tells = trainer.is_global_zero
        for number in self.signals:
            if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is not None:
            if now - self._asked > SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt
            return
        self._asked = now
        if self._tells:
            # Above the progress bar, which takes what is printed; not from here, where a print may be under way.
            threading.Thread(target=lambda: print(TOLD, file=sys.stderr, flush=True)).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where any process has been signalled, all stop here.

        Raises:
            KeyboardInterrupt: then.
        """
        if self._any_asked(trainer) and not is_over(trainer):
            trainer.save_checkpoint(self.file)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back.

        Raises:
            KeyboardInterrupt: one came after the last batch; the stage is trained, and its checkpoint is there.
        """
        self._give_back()
        if self._any_asked(trainer):
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _any_asked(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._signalled:  # else Lightning, which ends, has ignored it
                signal.signal(number, handler)
        self._before = {}
