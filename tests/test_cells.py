"""Cells are processes: they end with the command that has started them."""

import os
import signal
import threading
import time

import pytest

from alter.cells import LOG, _shares, run_cells
from alter.stopping import stoppable

CELL = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(number, frame):
    print("has ended itself", flush=True)
    sys.exit({status})
signal.signal(signal.SIGTERM, end)
(folder / "started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("status", "told"), [(130, "stopped"), (3, "failed: has ended itself")])
def test_a_sigterm_ends_the_cells_that_run_and_starts_no_other(tmp_path, capsys, status, told):
    cells = [tmp_path / name for name in "abc"]
    for cell in cells:
        cell.mkdir()
    over = threading.Event()

    def stop():
        while sum((cell / "started").exists() for cell in cells) < 2 and not over.is_set():
            time.sleep(0.02)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with stoppable(), pytest.raises(KeyboardInterrupt):
            run_cells(
                cells, lambda cell: ["-c", CELL.format(status=status), str(cell)], lambda cell: cell.name, processes=2
            )
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert [(cell / LOG).exists() and (cell / LOG).read_text() for cell in cells] == ["has ended itself\n"] * 2 + [
        False
    ]
    assert sorted(capsys.readouterr().out.splitlines()) == [f"a: {told}", f"b: {told}"]


SHARE = 'import os; print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"))'


@pytest.mark.parametrize(
    ("gpus", "processes", "shares"),
    [
        ([], 2, {"None"}),
        (["0"], 2, {"None"}),
        (["0", "1", "2", "3"], 1, {"None"}),
        (["0", "1", "2", "3"], 2, {"0,1", "2,3"}),
        (["GPU-a", "GPU-b", "GPU-c"], 2, {"GPU-a", "GPU-b"}),
        (["4", "7"], 4, {"4", "7"}),
    ],
)
def test_cells_that_run_at_once_share_the_gpus_and_the_cores(tmp_path, monkeypatch, gpus, processes, shares):
    monkeypatch.setattr("alter.cells.visible_gpus", lambda: gpus)
    monkeypatch.setattr("alter.cells.cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [tmp_path / str(number) for number in range(3 * processes)]
    for cell in cells:
        cell.mkdir()
    assert run_cells(cells, lambda cell: ["-c", SHARE], lambda cell: cell.name, processes) == []
    told = [(cell / LOG).read_text().split() for cell in cells]
    assert {share for share, _ in told} <= shares
    assert {threads for _, threads in told} == {"None" if processes == 1 else str(8 // processes)}
    assert {share["CUDA_VISIBLE_DEVICES"] for share in _shares(processes) if len(share) > 1} == shares - {"None"}


def test_a_cell_is_the_first_of_its_processes_and_has_the_threads_that_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cells = [tmp_path / "a", tmp_path / "b"]
    for cell in cells:
        cell.mkdir()
    code = 'import os; print(os.environ.get("NODE_RANK"), os.environ["OMP_NUM_THREADS"])'
    run_cells(cells, lambda cell: ["-c", code], lambda cell: cell.name, 2)
    assert {(cell / LOG).read_text() for cell in cells} == {"None 7\n"}


def test_a_cell_that_is_killed_is_told_so_and_not_by_its_last_words(tmp_path, capsys):
    cell = tmp_path / "a"
    cell.mkdir()
    code = "import os, signal; print('all is well', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    (failed,) = run_cells([cell], lambda cell: ["-c", code], lambda cell: cell.name, 1)
    assert failed == f"{cell / LOG}: killed by SIGKILL"
