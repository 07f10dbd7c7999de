"""Ctrl+C, or SIGTERM from outside: the step is finished, a checkpoint written, and the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOLD = "alter: stops after this step, with a checkpoint; a second time, at once."


class Interruption(Checkpoint):
    """Lets all processes write a checkpoint after the same batch and stop; in a job of SLURM, `Preemption` does.

    Lightning alone ends wherever it is, and up to half an epoch is lost since the last validation.

    Args:
        file: the checkpoint.
        enabled: False to leave the signals as they are.
    """

    def __init__(self, file: Path, enabled: bool = True) -> None:
        self.file = file
        self.enabled = enabled
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals, but for those that are ignored, as Ctrl+C is by what runs in the background."""
        if self.enabled:
            found = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Above the progress bar, which takes what is printed; not from here, where a print may be under way.
        threading.Thread(target=lambda: print(TOLD, file=sys.stderr, flush=True)).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where any process has been signalled, all stop here.

        Raises:
            KeyboardInterrupt: then.
        """
        if self.enabled and trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.save_checkpoint(self.file)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back.

        Raises:
            KeyboardInterrupt: one came after the last batch; the stage is trained, and its checkpoint is there.
        """
        self._give_back()
        if self.asked:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
