"""Cells are processes: they end with the command that has started them."""

import os
import signal
import threading
import time

import pytest

from alter.cells import LOG, only_one, run_cells

CELL = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(number, frame):
    print("has ended itself", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
(folder / "started").touch()
time.sleep(60)
"""


def test_a_sigterm_ends_the_cells_that_run_and_starts_no_other(tmp_path, capsys):
    cells = [tmp_path / name for name in "abc"]
    for cell in cells:
        cell.mkdir()

    def stop():
        end = time.monotonic() + 60
        while sum((cell / "started").exists() for cell in cells) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, lambda cell: ["-c", CELL, str(cell)], lambda cell: cell.name, processes=2)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [(cell / LOG).exists() and (cell / LOG).read_text() for cell in cells] == ["has ended itself\n"] * 2 + [
        False
    ]
    assert "a: failed: has ended itself" in capsys.readouterr().out


def test_a_cell_that_is_stopped_says_so_in_its_last_line(tmp_path):
    with pytest.raises(SystemExit, match="stopped; the same command goes on"), only_one(tmp_path):
        raise KeyboardInterrupt
    with only_one(tmp_path):  # the lock is free again
        pass
