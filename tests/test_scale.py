"""Strategies: what the overlays do on two processes, against one."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alter.recipe import read_recipe
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project, refused  # noqa: F401 (a fixture)

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


@pytest.mark.slow
def test_three_processes_share_fewer_batches_than_they_are_and_one_goes_on_from_their_checkpoint(project, capsys):  # noqa: F811
    """Seven batches make three steps; validation is one batch, and two processes keep it company."""
    change(project, data__examples_per_epoch=45, data__eval_max_tokens=100000, trainer__max_epochs=1)
    on_processes("--run", "three", "--test", "false", "--stages", "[stage1]", count=3)
    fit("--run", "one", "--trainer.accumulate_grad_batches", "3", "--test", "false", "--stages", "[stage1]")
    states = [
        torch.load(project / run / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
        for run in ("one", "three")
    ]
    assert states[0]["global_step"] == states[1]["global_step"]
    for key, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][key], tensor, atol=1e-5, rtol=1e-5)
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for index, moment in moments[0].items():
        torch.testing.assert_close(moments[1][index]["exp_avg"], moment["exp_avg"], atol=1e-6, rtol=1e-4)
    # what three processes began goes on with one
    fit("--run", "three", "--test", "false")
    assert "stage1: finished before" in capsys.readouterr().out
    assert (project / "three" / "stage2" / "model" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    "overlay", sorted((ROOT / "recipes" / "strategies").glob("*.yaml")), ids=lambda file: file.stem
)
def test_an_overlay_says_how_to_use_it_and_leaves_the_method_alone(overlay, project):  # noqa: F811
    text = overlay.read_text()
    assert f"--config recipes/strategies/{overlay.name}" in text
    assert set(yaml.safe_load(text)) <= {"precision", "trainer"}
    plain, laid = (read_recipe(["--config", "recipe.yaml", *more]) for more in ([], ["--config", str(overlay)]))
    for key in ("stage1", "stage2", "data", "backbone"):
        assert laid.config[key] == plain.config[key]


@pytest.mark.parametrize(
    ("flags", "words_of_it"),
    [
        (["--precision", "int8", "--trainer.strategy", "fsdp"], "precision int8 cannot be sharded"),
        (["--precision", "nf4", "--trainer.strategy", "fsdp"], "precision nf4 cannot be sharded"),
        (["--trainer.strategy", "ddp_spawn"], "ddp_spawn"),
        (["--trainer.strategy", "dpp"], "Did you mean 'ddp'?"),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_written(project, capsys, flags, words_of_it):  # noqa: F811
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *flags)
    assert "trainer.strategy" in sentence
    assert words_of_it in sentence
    assert not Path("run").exists()
