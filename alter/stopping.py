"""Ctrl+C and SIGTERM: what a command does then, and says."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GOES_ON = "alter: stopped; the same command goes on from the last checkpoint."
STOPPED = "alter: stopped."
STATUS = 130  # of a command that was stopped


@contextmanager
def stoppable(said: str = GOES_ON) -> Iterator[None]:
    """Lets SIGTERM stop a command as Ctrl+C does, by a KeyboardInterrupt, and so what it has started too; then says ``said``."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(said, file=sys.stderr)
        sys.exit(STATUS)
