"""A job that SLURM is about to end: it asks for another turn, and goes on from a checkpoint then.

SLURM tells by SIGUSR1 (``--signal=SIGUSR1@90``), to every process of a job step. While a stage trains, a checkpoint is
written first, by `alter.callbacks.Preemption`; at any other time what is on the disk is all there is to keep. Imports nothing
heavy, so that a command can listen before it loads anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 60.0  # seconds from the signal to the end of the step at most; SLURM's default lead here is 90
INTERACTIVE = 4294967280  # step ids from here on are SLURM's own
SHELL = "4294967290"  # that of an allocation's shell


def leave_allocation() -> None:
    """Outside a job step nothing has been started by ``srun``: a shell in an allocation is a shell as any other.

    Lightning would wait there for as many processes as the allocation has tasks.
    """
    if not _in_step():
        os.environ.pop("SLURM_NTASKS", None)


def _in_step() -> bool:
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < INTERACTIVE


class Requeue:
    """Listens for the signal, and asks SLURM to put the job back into its queue.

    Attributes:
        listens: whether this is a process of a SLURM job that has been told to listen.
        asked: whether the signal has come.
    """

    def __init__(self) -> None:
        self.listens = self.asked = False
        self._held = False
        self._process = 0
        self._timer: threading.Timer | None = None

    def listen(self) -> None:
        """Takes the signal from now on, in a job of SLURM; elsewhere, as in an allocation's shell, it stays what it was.

        SIGTERM, by which SLURM ends a job that has been requeued, then ends this process at once.
        """
        in_job = "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ
        if in_job and os.environ.get("SLURM_STEP_ID") != SHELL:
            self._process = os.getpid()
            self.listens, self.asked = True, False
            signal.signal(signal.SIGUSR1, self._signalled)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, the job is requeued by whoever has kept its state, or after `PATIENCE` all the same."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self.asked:
                self.requeue()

    def requeue(self) -> bool:
        """Asks SLURM for another turn of the job; the first process does. It then ends the job as it is.

        Returns:
            whether SLURM agrees; where it does not, the job has until its time is up.
        """
        self._stop_timer()
        if os.environ.get("SLURM_PROCID", "0") != "0":
            return True
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        # The first task of an array has the array's own number, by which all its tasks would be requeued.
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            refusal = done.stderr.strip() if done.returncode else None
        except OSError as error:
            refusal = str(error)
        if refusal is not None:
            _say(f"job {job}: SLURM does not requeue it ({refusal}); it goes on until its time is up.")
            self.asked = False
        else:
            _say(f"job {job}: its time is up or its place is needed; it has been requeued and goes on then.")
        return refusal is None

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.asked or os.getpid() != self._process:  # SLURM signals the workers of a data loader too
            return
        self.asked = True
        if self._held:
            self._timer = threading.Timer(PATIENCE, self.requeue)
            self._timer.daemon = True
            self._timer.start()
        else:
            self.requeue()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _say(text: str) -> None:
    os.write(2, f"alter: {text}\n".encode())  # print may be in use where the signal came


REQUEUE = Requeue()  # signals are a process's, so there is one
