"""Cells of a grid: each a process of its own with its log, and run by one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from filelock import FileLock, Timeout

from alter.machine import GPUS, RANKS, cores, is_first, visible_gpus
from alter.slurm import outside
from alter.stopping import STATUS

BUSY = 75  # exit status where another process runs the cell
LOG = "log.txt"


@contextmanager
def only_one(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within, no other process runs the cell; where one does, waits for it or ends this one with `BUSY`.

    A process that a cell's training has started to help it is within already.
    """
    if not is_first():
        yield
        return
    try:
        held = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 2)  # longer than `is_running` holds it
    except Timeout:
        sys.exit(BUSY)
    with held:
        yield


def is_running(folder: Path) -> bool:
    """Whether a process runs the cell."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def run_cells(
    cells: Sequence[Path], command: Callable[[Path], list[str]], name: Callable[[Path], str], processes: int
) -> list[str]:
    """Runs cells, some at once; one that fails is told, and the others go on.

    Args:
        cells: their folders.
        command: what Python runs for one; it takes ``--wait`` too.
        name: of a cell.
        processes: cells run at once; each gets its share of the cores and of the GPUs.

    Returns:
        a line for each that failed.

    Raises:
        KeyboardInterrupt: when one came and the cells that ran have ended.
    """
    failed: list[str] = []
    busy: list[Path] = []
    children = _Children()
    shares = SimpleQueue[dict[str, str]]()
    for share in _shares(processes):
        shares.put(share)

    def run(cell: Path, wait: bool = False) -> None:
        started = time.perf_counter()
        share = shares.get()
        try:
            status, said = _child([*command(cell), *(["--wait"] if wait else [])], cell / LOG, share, children)
        finally:
            shares.put(share)
        if status == BUSY:
            busy.append(cell)
            print(f"{name(cell)}: another process is running it", flush=True)
        elif status == STATUS:
            failed.append(f"{cell / LOG}: stopped")
            print(f"{name(cell)}: stopped", flush=True)
        elif status:
            failed.append(f"{cell / LOG}: {said}")
            print(f"{name(cell)}: failed: {said}", flush=True)
        else:
            print(f"{name(cell)}: {time.perf_counter() - started:,.0f} s", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        try:
            list(pool.map(run, cells))
            list(pool.map(lambda cell: run(cell, wait=True), list(busy)))
        except KeyboardInterrupt:
            children.end()
            raise
    return failed


class _Children:
    """Processes that end together. A terminal's Ctrl+C reaches them by itself; a SIGTERM to this one alone does not."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Runs one to its end; returns its exit status."""
        with self._lock:
            if self._ended:
                return STATUS
            child = subprocess.Popen(command, **options)
            self._running.add(child)
        status = child.wait()
        with self._lock:
            self._running.remove(child)
        return status

    def end(self) -> None:
        """Tells all that run to end, and starts no other."""
        with self._lock:
            self._ended = True
            for child in self._running:
                child.terminate()


def _shares(processes: int) -> list[dict[str, str]]:
    """For each of the cells that run at once the variables that give it its share of the cores and of the GPUs."""
    if processes == 1:
        return [{}]
    given = os.environ.get("OMP_NUM_THREADS")
    threads = {"OMP_NUM_THREADS": given or str(max(1, cores() // processes))}
    gpus = visible_gpus()
    if len(gpus) < 2:
        return [threads] * processes
    each = max(1, len(gpus) // processes)
    firsts = [number * each % len(gpus) for number in range(processes)]
    return [{**threads, GPUS: ",".join(gpus[first : first + each])} for first in firsts]


def _child(command: Sequence[str], log: Path, share: Mapping[str, str], children: _Children) -> tuple[int, str]:
    """Runs a cell; returns the exit status and the last line that it wrote."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # a recipe's own classes are found as here
    # A process of its own, whatever number the one that starts it has among others.
    alone = {name: value for name, value in outside().items() if name not in RANKS}
    environment = {**alone, **paths, **share}
    with log.open("a", encoding="utf-8") as stream:
        status = children.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if status < 0:  # it had no time to say why
        return status, f"killed by {signal.Signals(-status).name}"
    return status, last_line(log) or f"no output, exit status {status}"


def last_line(log: Path) -> str:
    """What a cell said last."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
