"""Strategies: what the overlays do on two processes, against one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]


def curve(run):
    """Every logged value by stage, step and metric."""
    found = {}
    for stage in ("stage1", "stage2"):
        with (run / stage / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                found[stage, int(row["step"]), row["metric"]] = float(row["value"])
    return found


def on_processes(*flags, count=2):
    command = [
        sys.executable,
        "-m",
        "alter",
        "fit",
        "--config",
        "recipe.yaml",
        "--config",
        str(ROOT / "recipes/strategies/ddp.yaml"),
    ]
    flags = ["--trainer.accelerator", "cpu", "--trainer.devices", str(count), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_two_processes_learn_what_one_does_on_the_same_global_batches(project):  # noqa: F811
    change(project, data__examples_per_epoch=45, trainer__max_epochs=1)
    fit("--run", "one", "--trainer.accumulate_grad_batches", "2", "--test", "false")
    on_processes("--run", "two", "--test", "false")
    one, two = curve(project / "one"), curve(project / "two")
    names = {name for _, _, name in one}
    assert {"train/loss", "val/loss", "train/loss/sort", "val/loss/echo"} <= names
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5), key
    ours, theirs = (load_file(project / run / "model" / "adapters.safetensors") for run in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=1e-5, rtol=1e-5)
