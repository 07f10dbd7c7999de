"""Runs that are killed at any moment, and started again by the same command, end as if they had not been."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.killed import fit
from tests.test_cli import change, project  # noqa: F401 (a fixture)

SETTINGS = {  # and how often each is killed; a worker takes seconds to start
    "accumulated": (
        {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 4, "trainer__max_epochs": 3},
        10,
    ),
    "workers": ({"data__num_workers": 1, "trainer__val_check_interval": 0.25, "trainer__max_epochs": 1}, 2),
}


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alter.run", "alter.recipe", "alter.cli", "transformers"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), before]))
    first = context.Process(target=int)  # the server's own start is no part of a run
    first.start()
    first.join()
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def start(processes, home):
    process = processes.Process(target=fit, args=(str(home), "log.txt"))
    process.start()
    return process


def kill(process):
    """With whatever it has started, at once."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        process.kill()  # it has not made its group yet
    process.join()


def told(run):
    """What a run leaves: its weights, and its log without times."""
    logs = {}
    for stage in ("stage1", "stage2"):
        lines = (run / stage / "metrics.csv").read_text().splitlines()
        logs[stage] = [line for line in lines if not any(word in line for word in ("second", "per_s", "memory"))]
        steps = [tuple(line.split(",")[:2]) for line in lines[1:]]
        assert len(steps) == len(set(steps))  # no double
    weights = load_file(run / "model" / "adapters.safetensors")
    return {key: value.numpy().tobytes() for key, value in weights.items()}, logs


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_whenever_it_is_killed_it_ends_as_if_it_had_not_been(project, processes, tmp_path, name):  # noqa: F811
    changes, enough = SETTINGS[name]
    change(project, **changes, run="reference", test=False)
    reference = start(processes, tmp_path / "home0")
    started = time.monotonic()
    reference.join(240)
    took = time.monotonic() - started
    assert reference.exitcode == 0, Path("log.txt").read_text()[-2000:]
    expected = told(project / "reference")

    drawn, kills, attempt = random.Random(f"{name} 13"), 0, 0
    while kills < enough:
        attempt += 1
        change(project, run=f"run{attempt}")
        finished = False
        while not finished:
            started = time.monotonic()
            process = start(processes, tmp_path / f"home{attempt}")
            process.join(took * drawn.uniform(0.02, 1.0) if kills < enough else 240)
            finished = process.exitcode is not None
            if finished:
                assert process.exitcode == 0, Path("log.txt").read_text()[-2000:]
                took = min(took, time.monotonic() - started)  # the first was slowed by whatever is done once
            else:
                kill(process)
                kills += 1
        assert told(project / f"run{attempt}") == expected


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_being_written_it_ends_as_if_it_had_not_been(project, processes, tmp_path):  # noqa: F811
    change(project, trainer__max_epochs=2, trainer__val_check_interval=2, run="reference", test=False)
    reference = start(processes, tmp_path / "home0")
    reference.join(240)
    expected = told(project / "reference")
    change(project, run="run")
    kills = 0
    for _ in range(30):
        process = start(processes, tmp_path / "home1")
        while process.is_alive():
            if kills < 4 and any(Path("run").glob("stage*/checkpoints/.*.part")):
                kill(process)
                kills += 1
            time.sleep(0.0005)
        process.join()
        if process.exitcode == 0:
            break
    assert kills >= 2
    assert told(project / "run") == expected
