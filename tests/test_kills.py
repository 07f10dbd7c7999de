"""SIGKILL from outside, at drawn moments and at chosen ones; the same command then ends as if nothing had been."""

import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.data.conftest import task_dict, words  # noqa: F401 (a fixture)
from tests.test_cli import change, project  # noqa: F401 (a fixture)
from tests.test_resume import ends_as

SEED = 13
SERVER = multiprocessing.get_context("forkserver")  # imports once; each run is a fork of it
SERVER.set_forkserver_preload(["alter.run", "alter.recipe", "tests.test_kills", "transformers", "datasets"])


def _run(folder, arguments, environment):
    os.setsid()  # so that the workers die with it
    os.chdir(folder)
    os.environ.update(environment)
    with Path("log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from alter.cli import main

    main(["fit", "--config", "recipe.yaml", *arguments])


class Runs:
    """Starts runs in a project's folder, of one or more processes, and kills them."""

    def __init__(self, folder, processes=1, environment=None, flags=()):
        self.folder = folder
        self.environment = environment or {}
        self.flags = ["--test", "false", *flags]
        self.processes = processes
        if processes > 1:
            self.flags += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]

    def start(self, run):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.processes)}
        started = []
        for rank in range(self.processes):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "x", **group}
            environment = {
                "ALTER_HOME": str(self.folder / f"home-{run}"),
                "OMP_NUM_THREADS": "1",
                **{name: value.format(rank=rank) for name, value in self.environment.items()},
                **(places if self.processes > 1 else {}),
            }
            process = SERVER.Process(target=_run, args=(self.folder, ["--run", run, *self.flags], environment))
            process.start()
            started.append(process)
        return started

    def finish(self, run):
        """Runs to the end; returns the seconds it took."""
        began = time.perf_counter()
        processes = self.start(run)
        for process in processes:
            process.join(120)
            assert process.exitcode == 0, (self.folder / "log.txt").read_text()[-3000:]
        return time.perf_counter() - began

    def kill(self, run, when):
        """Kills a run when ``when`` returns; says whether it was still running."""
        processes = self.start(run)
        clean = when(lambda: any(process.is_alive() for process in processes))
        alive = any(process.is_alive() for process in processes)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(20)
        if clean is not None:
            clean()
        return alive


def after(seconds):
    return lambda alive: time.sleep(seconds)


def seen(folder, pattern):
    """Waits for a file to appear."""

    def wait(alive):
        while not list(folder.glob(pattern)) and alive():
            time.sleep(0.0005)

    return wait


def while_writing(file, begin=None):
    """Waits until a file is half written: in its place stands a pipe, of which 100 bytes are read and no more."""

    def wait(alive):
        if begin is not None:
            begin(alive)
        file.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(file)
        pipe = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)  # less than any of the files, so that the writer waits
        half = b""
        while alive() and not half:
            with contextlib.suppress(BlockingIOError):
                half = os.read(pipe, 100)
            time.sleep(0.001)

        def clean():
            """Puts the half file where the pipe was: a later run would wait at a pipe for its reader."""
            os.close(pipe)
            file.unlink()
            file.write_bytes(half)

        return clean

    return wait


def before_the_last_file(model):
    """Waits until a model lacks its last file alone: the writer waits at a pipe that stands in that file's place."""

    def wait(alive):
        model.mkdir(parents=True)
        file = model / ".alter.json.part"
        os.mkfifo(file)
        seen(model, "adapters.safetensors")(alive)

        def clean():
            file.unlink()
            file.write_text("{")

        return clean

    return wait


SETTINGS = {
    "steps in parts": ({"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 3}, 1, 4),
    "workers": ({"data__num_workers": 2, "stage1__trainer": {"limit_train_batches": 0.7}}, 1, 3),
    "budgets of tokens": ({"data__max_tokens": 200, "trainer__val_check_interval": 0.5}, 1, 3),
    "two processes": ({"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 3}, 2, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_at_drawn_moments_ends_as_an_uninterrupted_one(project, name):  # noqa: F811
    changes, processes, kills = SETTINGS[name]
    change(project, **{"data__max_tokens": 64, **changes})
    runs = Runs(project, processes)
    runs.finish("warm")  # what is imported late is imported now
    seconds = runs.finish("whole")
    draw = random.Random(f"{SEED} {name}")
    killed, run = 0, 0
    while killed < kills:
        if runs.kill(f"cut-{run}", after(seconds * draw.uniform(0.15, 0.8))):
            killed += 1
        else:  # the moment came when all was done
            ends_as(project / f"cut-{run}", project / "whole")
            run += 1
    runs.finish(f"cut-{run}")
    ends_as(project / f"cut-{run}", project / "whole")
    assert not list((project / f"cut-{run}").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="the size of a pipe can be set on Linux alone")
def test_a_run_killed_at_chosen_moments_ends_as_an_uninterrupted_one(project):  # noqa: F811
    task_dict(project, "sort", 6000)  # which take a moment to encode
    change(project, data__max_tokens=64, data__examples_per_epoch=60)
    runs = Runs(project)
    runs.finish("whole")
    shared = project / "cache"
    shared.rename(project / "cache-whole")
    run, trunk = project / "cut", project / "home-cut" / "trunk"
    moments = {
        "while tokens are prepared": seen(shared, ".sort-*.new/train/data.arrow"),
        "while the trunk is cached": seen(trunk, "*/*.index"),
        "while the first checkpoint is written": while_writing(run / "stage1/checkpoints/.best.ckpt.part", seen(trunk, "*/*.index")),
        "while a later one is written": while_writing(run / "stage1/checkpoints/.last.ckpt.part", seen(run, "stage1/checkpoints/last.ckpt")),
        "while stage 1's model is written": before_the_last_file(run / "stage1/model"),
        "between the stages": seen(run, "model/alter.json"),
        "in stage 2": seen(run, "stage2/checkpoints/best.ckpt"),
        "while the whole model is written": before_the_last_file(run / "stage2/model"),
    }  # fmt: skip
    for moment, when in moments.items():
        assert runs.kill("cut", when), f"{moment}: over before"
    assert not (run / "stage2" / "model" / "alter.json").exists()
    runs.finish("cut")
    ends_as(run, project / "whole")
    assert not list(run.rglob("*.part"))
    assert not list(shared.glob(".*.new"))
    assert {file.name for file in (run / "model").iterdir()} == {"adapters.safetensors", "alter.json"}
