"""Ctrl+C and SIGTERM: what a command does then, and says."""

from __future__ import annotations

import signal
import threading

STOPPED = "alter: stopped; the same command goes on from the last checkpoint."
STATUS = 130  # of a command that was stopped


def stop_at_sigterm() -> None:
    """Lets SIGTERM stop this command as Ctrl+C does, by a KeyboardInterrupt, and so what it has started too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
