"""Runs and sweeps on a real SLURM of two nodes."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alter.cli import main
from tests.data.conftest import make_words
from tests.slurm.cluster import Cluster, missing
from tests.test_cli import change, make_project
from tests.test_kills import Runs
from tests.test_resume import ends_as
from tests.test_scale import curve

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One project for all, in a folder whose name has a space, and a run of it that nothing interrupts."""
    folder = tmp_path_factory.mktemp("a project")
    make_project(folder, make_words(folder / "words"))
    change(folder, data__max_tokens=24, data__examples_per_epoch=90, trainer__max_epochs=3, test=False)
    Runs(folder).finish("whole")
    return folder


@pytest.fixture(autouse=True)
def here(cluster, place, monkeypatch):
    """The user's shell."""
    monkeypatch.chdir(place)
    for name, value in {**cluster.environment, "OMP_NUM_THREADS": "1", "ALTER_HOME": str(place / "home")}.items():
        monkeypatch.setenv(name, value)


def submit(capfd, run, *flags):
    """Returns the job's number."""
    main(["submit", "--config", "recipe.yaml", "--run", run, *flags])
    return re.search(r"Job (\d+)", capfd.readouterr().out)[1]


def until(true, cluster, job, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.02)


def lines(file):
    return file.read_text().count("\n") if file.exists() else 0


def goes_on(cluster, job):
    """Waits for the end of a job that has been put back into the queue, and returns what it said."""
    cluster.wait(job)
    assert cluster.fact(job, "Restarts") == "1"
    return Path(cluster.fact(job, "StdOut")).read_text()


def test_two_nodes_learn_what_one_process_does_and_go_on_exactly_when_preempted(cluster, place, capfd):
    job = submit(capfd, "two", "--nodes", "2", "--time", "30:00")
    Runs(place, flags=("--trainer.accumulate_grad_batches", "2")).finish("one")
    cluster.wait(job)
    assert cluster.fact(job, "NumNodes") == "2"
    one, two = curve(place / "one"), curve(place / "two")
    assert one == pytest.approx(two, abs=1e-5)
    ours, theirs = (load_file(place / run / "model" / "adapters.safetensors") for run in ("one", "two"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=1e-5, rtol=1e-5)

    job = submit(capfd, "preempted", "--nodes", "2", "--time", "30:00")
    log = place / "preempted" / "stage1" / "metrics.csv"
    until(lambda: lines(log) > 0.3 * lines(place / "two" / "stage1" / "metrics.csv"), cluster, job)
    cluster.run("scancel", "--signal=USR1", job)
    said = goes_on(cluster, job)
    assert "it has been requeued" in said
    assert re.search(r"stage1: goes on from .*preempted.ckpt", said)
    ends_as(place / "preempted", place / "two")


def test_a_job_requeued_in_mid_run_and_one_whose_node_failed_go_on_exactly(cluster, place, capfd):
    jobs = {}
    for run in ("requeued", "failed"):  # one after the other, so that neither ends its stage before it is interrupted
        job = jobs[run] = submit(capfd, run, "--time", "30:00")
        until((place / run / "stage1" / "checkpoints" / "last.ckpt").exists, cluster, job)
        if run == "requeued":
            cluster.run("scontrol", "requeue", job)
        else:
            node = cluster.fact(job, "NodeList")
            cluster.fail(node, job)
    for run, job in jobs.items():
        assert "stage1: goes on from" in goes_on(cluster, job)
        ends_as(place / run, place / "whole")
    cluster.start_node(node)
    cluster.until_idle()


def test_a_sweep_is_an_array_that_shows_the_cell_that_failed_and_tries_it_again(cluster, place, capfd):
    rates = ("--set", "stage1.model.optimizer.lr=1e-3,1e-2,1e30", "--stages", "[stage1]", "--out", "sweep")
    main(["sweep", "--config", "recipe.yaml", *rates, "--slurm", "--time", "10:00"])
    array = re.search(r"Job array (\d+): 3 of 3 cells", capfd.readouterr().out)[1]
    main(["sweep", "status", "sweep"])
    assert re.search(r"(pending|running|configuring|completing) of 3", capfd.readouterr().out)
    until(lambda: not cluster.run("squeue", "-h", "-j", array), cluster, array, 300)
    main(["sweep", "results", "sweep"])
    out = capfd.readouterr().out
    assert "2 done, 1 failed of 3" in out
    assert "cell 003 failed: The loss is" in out
    losses = {n: json.loads(Path(f"sweep/cells/{n}/result.json").read_text())["value"] for n in ("001", "002")}
    best = min(losses, key=losses.get)
    assert out.splitlines()[1].split()[:2] == ["1", best]
    recipe = yaml.safe_load(Path("sweep/best.yaml").read_text())
    assert recipe["stage1"]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == {"001": 1e-3, "002": 1e-2}[best]
    main(["sweep", "retry", "sweep", "--slurm", "--time", "10:00"])
    again = re.search(r"Job array (\d+): 1 of 3 cells", capfd.readouterr().out)[1]
    assert json.loads(Path("sweep/jobs.json").read_text()) == {"1": f"{array}_1", "2": f"{array}_2", "3": f"{again}_3"}
    cluster.run("scancel", again)


def test_in_the_shell_of_an_allocation_lightning_waits_for_nobody(cluster):
    """The shell is no task, though the allocation has two."""
    code = (
        "import os; from alter.requeue import leave_allocation; leave_allocation(); "
        "from lightning.fabric.plugins.environments import SLURMEnvironment; print(SLURMEnvironment.detect())"
    )
    cluster.until_idle()
    said = cluster.run("salloc", "-N2", "-n2", "-J", "mine", sys.executable, "-W", "ignore", "-c", code, seconds=240)
    assert said.splitlines()[-1] == "False"
