"""A loader whose workers no signal ends that is meant for the process that reads from them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset

GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def make_loader(
    dataset: Dataset[Any], batches: Any, collate: Callable[[list[Any]], Any], num_workers: int
) -> DataLoader[Any]:
    """A loader that keeps its workers from epoch to epoch.

    Args:
        dataset: what is loaded.
        batches: the batch sampler.
        collate: makes a batch of its examples.
        num_workers: processes that load; 0 for none of their own.
    """
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # as Python did by itself up to 3.13: at once, and with the examples that are open here
        multiprocessing_context="fork" if num_workers > 0 and sys.platform == "linux" else None,
        worker_init_fn=_leave_group,
    )


class _Loader(DataLoader[Any]):
    """Forks its workers where no signal ends them before they have left the group (see `_leave_group`)."""

    def _get_iterator(self) -> Any:  # and not __iter__, which may wait for workers that run
        if self.multiprocessing_context is None:
            return super()._get_iterator()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)  # a fork inherits it
        try:
            return super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_group(worker: int) -> None:
    """What a terminal or a launcher sends to the whole group is for the process that reads from the workers, and then ends them."""
    os.setpgrp()
    for number in signal.sigpending() & GROUP_SIGNALS:  # came while the worker was still of the group
        signal.sigwait({number})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
