"""A checkpoint at the end of the step in which SLURM's signal comes, and the end of the job."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from alter.callbacks.interruption import is_over
from alter.requeue import Requeue

KEPT = "preempted.ckpt"
SECONDS = 300.0  # within which SLURM ends a job that it has requeued


class Preemption(Checkpoint):
    """Lets all processes write a checkpoint after the same batch, and the first one requeue the job.

    Lightning's own way saves from within the signal handler, wherever each process is. This is a ``Checkpoint`` because
    Lightning calls those last: what the others have done after the batch is in it.

    Args:
        file: the checkpoint.
        requeue: of this process.
    """

    def __init__(self, file: Path, requeue: Requeue) -> None:
        self.file = file
        self.requeue = requeue

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets SIGTERM end a process of a SLURM job at once, as SIGKILL would a little later.

        Lightning would have the processes meet first, which are at different places.
        """
        if self.requeue.listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where any process has been signalled, all stop here."""
        if not self.requeue.listens or is_over(trainer):
            return
        if trainer.strategy.reduce_boolean_decision(self.requeue.asked, all=False):
            trainer.save_checkpoint(self.file)
            if trainer.strategy.broadcast(self.requeue.requeue()):
                time.sleep(SECONDS)
                raise SystemExit("alter: SLURM has requeued this job and has not ended it.")
            self.requeue.asked = False
