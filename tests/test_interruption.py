"""Ctrl+C and SIGTERM while a stage trains: no batch is lost."""

import os
import random
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from alter import cli
from alter.callbacks import Interruption, interruption
from alter.callbacks.preemption import KEPT
from alter.stopping import GOES_ON, STATUS, STOPPED
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.held import hold, let_go, until_held
from tests.test_cli import change, project  # noqa: F401 (a fixture)
from tests.test_kills import Runs
from tests.test_resume import ends_as

SEED = 13
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def trainer():
    """What the callback asks of a trainer of one process; the signals' handlers end with the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    saved = []
    yield SimpleNamespace(
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        save_checkpoint=saved.append,
        saved=saved,
        is_global_zero=True,
        should_stop=False,
        global_step=1,
        max_steps=-1,
    )
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("verb", "said"), [("fit", GOES_ON), ("add-task", GOES_ON), ("export", STOPPED), ("ls", STOPPED)]
)
def test_a_verb_that_does_not_go_on_does_not_say_so(verb, said, capsys, monkeypatch):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main([verb])
    assert stop.value.code == STATUS
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_batch_is_finished_and_kept_and_a_later_signal_ends_it_at_once(trainer, number, capfd, monkeypatch):
    callback = Interruption("kept.ckpt")
    callback.on_train_start(trainer, None)
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert not trainer.saved
    others = set(threading.enumerate())
    signal.raise_signal(number)
    signal.raise_signal(number)  # from a launcher too: still the same one
    for thread in set(threading.enumerate()) - others:  # what is read while it prints may be lost
        thread.join()
    assert capfd.readouterr().err.count("alter: stops after this batch") == 1
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_batch_end(trainer, None, None, None, 1)
    assert trainer.saved == ["kept.ckpt"]
    monkeypatch.setattr(interruption, "SAME_SIGNAL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_one_that_comes_after_the_last_batch_ends_the_run_between_the_stages(trainer):
    callback = Interruption("kept.ckpt")
    callback.on_train_start(trainer, None)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(trainer, None)
    assert not trainer.saved


def test_all_processes_stop_where_another_has_been_signalled(trainer, capfd):
    trainer.strategy.reduce_boolean_decision = lambda decision, all: not all
    trainer.is_global_zero = False
    callback = Interruption("kept.ckpt")
    callback.on_train_start(trainer, None)
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(trainer, None)
    assert not capfd.readouterr().err


def test_signals_are_given_back_and_what_is_ignored_stays_so(trainer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a shell runs in the background
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for end in (
        lambda callback: callback.on_train_end(trainer, None),
        lambda callback: callback.on_exception(trainer, None, ValueError()),
    ):
        callback = Interruption("kept.ckpt")
        callback.on_train_start(trainer, None)
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == callback._signalled
        end(callback)
        assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_what_lightning_ignores_while_it_ends_stays_ignored(trainer):
    callback = Interruption("kept.ckpt", [signal.SIGINT])
    callback.on_train_start(trainer, None)
    assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler  # not asked for
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# A terminal signals a whole group, and so does a launcher.
SETTINGS = {
    "Ctrl+C": ({"trainer__accumulate_grad_batches": 2}, 1, lambda run: os.killpg(run[0].pid, signal.SIGINT)),
    "SIGTERM to all, with workers": ({"data__num_workers": 2}, 1, lambda run: os.killpg(run[0].pid, signal.SIGTERM)),
    "the second of two processes": (
        {"trainer__accumulate_grad_batches": 2}, 2, lambda run: os.kill(run[1].pid, signal.SIGTERM)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_stopped_keeps_its_last_step_and_ends_as_an_uninterrupted_one(project, name):  # noqa: F811
    changes, processes, send = SETTINGS[name]
    change(project, data__max_tokens=64, trainer__callbacks=[{"class_path": "tests.held.Held"}], **changes)
    runs = Runs(project, processes)
    runs.finish("whole")
    draw = random.Random(SEED)
    run = project / "cut"
    for stage in ("stage1", "stage2"):
        hold(project, stage, project / "whole", draw)
        started = runs.start("cut")
        until_held(project)(started[0].is_alive)
        send(started)
        let_go(project)
        for process in started:
            process.join(60)
            assert process.exitcode == STATUS, (project / "log.txt").read_text()[-3000:]
        kept = torch.load(run / stage / "checkpoints" / KEPT, weights_only=True)
        steps = [int(line.split(",")[0]) for line in (run / stage / "metrics.csv").read_text().splitlines()[1:]]
        assert kept["global_step"] in (max(steps), max(steps) + 1)
    said = (project / "log.txt").read_text()
    assert said.count(GOES_ON) == 2 * processes
    assert "Traceback" not in said
    runs.finish("cut")
    ends_as(run, project / "whole")
    assert not list(run.rglob(KEPT))
