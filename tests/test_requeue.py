"""SLURM's signal at drawn moments; SLURM itself is a script that notes what it is asked for (tests/slurm has a real one)."""

import contextlib
import os
import random
import signal
import time

import pytest
import torch

from alter import requeue
from alter.callbacks.preemption import KEPT
from alter.requeue import Requeue, leave_allocation
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.held import hold, let_go, until_held
from tests.test_cli import change, project  # noqa: F401 (a fixture)
from tests.test_kills import Runs, seen
from tests.test_resume import ends_as

SEED = 13


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in on the path; returns the file in which it notes its arguments."""
    script, noted = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {noted}\nexit ${{SCONTROL_FAILS:-0}}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return noted


@pytest.fixture
def job(monkeypatch):
    """A process of job 7, whose handlers end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", "0")
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled():
    signal.raise_signal(signal.SIGUSR1)


def test_a_signal_outside_training_requeues_the_job_at_once(job, scontrol, capfd):
    own = Requeue()
    own.listen()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signalled()
    signalled()  # once is enough
    assert scontrol.read_text() == "requeue 7\n"
    assert "job 7: its time is up" in capfd.readouterr().err


def test_of_an_array_the_one_task_is_requeued(job, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    Requeue().listen()
    signalled()
    assert scontrol.read_text() == "requeue 7_3\n"


def test_one_process_of_several_asks(job, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    own = Requeue()
    own.listen()
    signalled()
    assert own.asked
    assert not scontrol.exists()


def test_a_worker_that_inherits_the_handler_does_nothing(job, scontrol):
    Requeue().listen()
    child = os.fork()
    if child == 0:
        signalled()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not scontrol.exists()


def test_while_held_it_waits_and_not_for_ever(job, scontrol, monkeypatch):
    own = Requeue()
    own.listen()
    with own.held():
        signalled()
        time.sleep(0.2)
        assert not scontrol.exists()
    assert scontrol.read_text() == "requeue 7\n"
    monkeypatch.setattr(requeue, "PATIENCE", 0.1)
    other = Requeue()
    other.listen()
    with other.held():
        signalled()
        end = time.monotonic() + 10
        while scontrol.read_text().count("requeue") < 2:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_where_slurm_refuses_the_job_goes_on_and_can_be_signalled_again(job, scontrol, monkeypatch, capfd):
    monkeypatch.setenv("SCONTROL_FAILS", "1")
    own = Requeue()
    own.listen()
    signalled()
    assert not own.asked
    assert "does not requeue" in capfd.readouterr().err
    signalled()
    assert scontrol.read_text().count("requeue") == 2
    monkeypatch.setenv("PATH", "/nowhere")
    signalled()
    assert "No such file" in capfd.readouterr().err


def test_outside_a_job_the_signal_is_left_alone(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    own = Requeue()
    own.listen()
    assert not own.listens
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("step", "stays"), [("0", True), ("4294967290", False), (None, False)])
def test_a_shell_in_an_allocation_is_no_task_of_a_job(monkeypatch, step, stays):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    if step is None:
        monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    else:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    leave_allocation()
    assert ("SLURM_NTASKS" in os.environ) == stays


def interrupt(runs, run, when, asked, then=lambda: None):
    """Signals every process of a run at a moment, does what is to be done then, and ends it, once it is requeued, as SLURM does.

    Returns:
        whether it was still running.
    """
    processes = runs.start(run)
    when(lambda: any(process.is_alive() for process in processes))
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    then()
    end = time.monotonic() + 60
    while not asked.exists() and any(process.is_alive() for process in processes):
        assert time.monotonic() < end, "nobody has asked for a requeue"
        time.sleep(0.01)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(120)
        assert not process.is_alive(), "SIGTERM has not ended it"
    was = asked.exists()
    asked.unlink(missing_ok=True)
    return was


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_signalled_while_it_trains_keeps_its_last_step_and_ends_as_an_uninterrupted_one(
    project,  # noqa: F811
    scontrol,
    processes,
):
    """The log tells that no step is done twice: what the first turn wrote before the signal is all kept."""
    change(project, data__max_tokens=64, trainer__accumulate_grad_batches=2, trainer__val_check_interval=3)
    change(project, trainer__callbacks=[{"class_path": "tests.held.Held"}])
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "{rank}", "PATH": os.environ["PATH"]}
    runs = Runs(project, processes, environment)
    runs.finish("whole")
    draw = random.Random(SEED)
    run = project / "cut"
    for stage in ("stage1", "stage2"):
        hold(project, stage, project / "whole", draw)
        assert interrupt(runs, "cut", until_held(project), scontrol, lambda: let_go(project)), f"{stage}: over before"
        kept = torch.load(run / stage / "checkpoints" / KEPT, weights_only=True)
        steps = [int(line.split(",")[0]) for line in (run / stage / "metrics.csv").read_text().splitlines()[1:]]
        assert kept["global_step"] in (max(steps), max(steps) + 1)
    runs.finish("cut")
    ends_as(run, project / "whole")
    assert not list(run.rglob(KEPT))


@pytest.mark.slow
def test_a_run_signalled_at_any_time_goes_on_to_the_same_end(project, scontrol):  # noqa: F811
    change(project, data__max_tokens=64, data__num_workers=1)
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "PATH": os.environ["PATH"]}
    runs = Runs(project, 1, environment)
    runs.flags = []  # with the test
    runs.finish("whole")
    run = project / "cut"
    moments = {
        "before training": seen(run, "env.txt"),
        "between the stages": seen(run, "stage1/model/alter.json"),
        "in the test": seen(run, "model/calibration.json"),
    }
    for moment, when in moments.items():
        assert interrupt(runs, "cut", when, scontrol), f"{moment}: over before"
    assert not (run / "report.html").exists()
    runs.finish("cut")
    ends_as(run, project / "whole")
    assert (run / "report.html").is_file()


def test_in_an_allocations_shell_a_run_is_a_process_like_any_other(job, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")
    own = Requeue()
    own.listen()
    assert not own.listens
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    own.listen()
    assert own.listens
