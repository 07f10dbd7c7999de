"""Strategies: what the overlays do on two processes, against one."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alter.cli import main
from alter.recipe import read_recipe
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project, refused  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("warm")


def curve(run, stages=("stage1", "stage2")):
    """Every logged value by stage, step and metric."""
    found = {}
    for stage in stages:
        with (run / stage / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                found[stage, int(row["step"]), row["metric"]] = float(row["value"])
    return found


def on_processes(*flags, count=2, overlay="ddp"):
    command = [
        sys.executable,
        "-m",
        "alter",
        "fit",
        "--config",
        "recipe.yaml",
        "--config",
        str(ROOT / f"recipes/strategies/{overlay}.yaml"),
    ]
    flags = ["--trainer.accelerator", "cpu", "--trainer.devices", str(count), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("project", "overlay"), [("llama", "ddp"), ("t5", "fsdp")], indirect=["project"])
def test_two_processes_learn_what_one_does_on_the_same_global_batches(project, overlay):  # noqa: F811
    change(project, data__examples_per_epoch=45, trainer__max_epochs=1)
    fit("--run", "one", "--trainer.accumulate_grad_batches", "2", "--test", "false")
    on_processes("--run", "two", "--test", "false", overlay=overlay)
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
    read = [json.loads((project / run / "progress.json").read_text())["stage1"]["tokens"] for run in ("one", "two")]
    assert read[0] == read[1]


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "a command on each node"])
def test_two_nodes_train_one_run_together(project, starter):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    trainer = {"strategy": "ddp", "accelerator": "cpu", "devices": 1, "num_nodes": 2, "max_epochs": 1}
    command = [sys.executable, "-m", "alter", "fit", "--config", "recipe.yaml", "--run", "run"]
    command += [f"--trainer.{key}={value}" for key, value in trainer.items()]
    nodes = []
    for node in ("0", "1"):
        places = {"NODE_RANK": node}
        if starter == "torchrun":
            places = {"RANK": node, "GROUP_RANK": node, "LOCAL_RANK": "0"}
            places |= {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **group, **places}
        nodes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (project / "run" / "report.html").is_file()
    assert set(json.loads((project / "run" / "results.json").read_text())["tasks"]) == {"sort", "echo"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_adapters_learn_beside_a_quantised_backbone_and_two_processes_agree(project, precision, capsys):  # noqa: F811
    """Rounding the backbone moves the losses a little; adapters stay fp32, and over processes nothing changes."""
    change(
        project,
        data__examples_per_epoch=45,
        trainer__max_epochs=1,
        stage2__model__init_args__expert={"class_path": "alter.nn.LoRA", "init_args": {"rank": 4}},
    )
    flags = ("--trainer.accumulate_grad_batches", "2", "--test", "false")
    fit("--run", "plain", *flags)
    overlay = str(ROOT / f"recipes/strategies/{precision}.yaml")
    fit("--config", overlay, "--run", "one", *flags)
    plain, one = curve(project / "plain"), curve(project / "one")
    assert one.keys() == plain.keys()
    losses = [key for key in plain if key[2] == "val/loss"]
    assert all(one[key] == pytest.approx(plain[key], rel=0.1) for key in losses)
    assert any(one[key] != plain[key] for key in losses)  # it is not the plain one
    first = min(key for key in one if key[0] == "stage1" and key[2] == "train/loss")
    assert one["stage2", losses[-1][1], "val/loss"] < one[first]
    adapters = load_file(project / "one" / "model" / "adapters.safetensors")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    on_processes("--run", "two", "--precision", precision, "--test", "false", overlay="int8_ddp")
    two = curve(project / "two")
    assert two == pytest.approx(one, abs=1e-4)
    main(["test", "--run", "one"])
    assert "sort" in capsys.readouterr().out


@pytest.mark.slow
def test_experts_without_an_example_in_a_batch_hold_nobody_up(project):  # noqa: F811
    """Batches of one task, and hard routes: in most steps a process has no gradient for some expert, and learns as one would."""
    hard = {"class_path": "alter.nn.TaskSelector", "init_args": {"hard": True}}
    change(
        project,
        data__examples_per_epoch=45,
        data__mixed_batches=False,
        trainer__max_epochs=1,
        stage1__model__init_args__router=hard,
    )
    flags = ("--test", "false")
    fit("--run", "one", "--trainer.accumulate_grad_batches", "2", *flags)
    on_processes("--run", "two", *flags)
    ours, theirs = (load_file(project / run / "model" / "adapters.safetensors") for run in ("one", "two"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=1e-5, rtol=1e-5)
    assert curve(project / "two") == pytest.approx(curve(project / "one"), abs=1e-5)


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


@pytest.mark.slow
def test_what_one_strategy_began_goes_on_under_another(project):  # noqa: F811
    """Killed after the first epoch, and after the second: weights, moments and losses go on as if nothing had been."""
    keeper = {
        "monitor": "val/loss",
        "filename": "{epoch}",
        "save_top_k": -1,
        "save_last": True,
        "enable_version_counter": False,
    }
    change(
        project,
        data__examples_per_epoch=45,
        trainer__max_epochs=3,
        trainer__gradient_clip_val=0.5,
        trainer__callbacks=[
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
        ],
    )
    flags = ("--test", "false", "--stages", "[stage1]")
    on_processes("--run", "whole", *flags)
    before = "whole"
    for epoch, goes_on in enumerate(("fsdp", "ddp")):
        run = project / goes_on
        shutil.copytree(project / before, run)
        (run / "progress.json").unlink()
        checkpoints = run / "stage1" / "checkpoints"
        shutil.copy(checkpoints / f"epoch={epoch}.ckpt", checkpoints / "last.ckpt")
        later = [checkpoints / f"epoch={number}.ckpt" for number in range(epoch + 1, 3)]
        for file in later:  # which were not there yet
            file.rename(file.with_suffix(".later"))
        done = on_processes("--run", goes_on, *flags, overlay=goes_on)
        assert "stage1: goes on from" in done.stdout
        for file in later:
            file.with_suffix(".later").rename(file)
        if goes_on == "fsdp":
            held, whole = re.search(r"holds ([\d,]+) of ([\d,]+)", done.stdout).groups()
            assert int(held.replace(",", "")) <= 0.55 * int(whole.replace(",", ""))
        states = [
            torch.load(project / name / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
            for name in ("whole", goes_on)
        ]
        for key, tensor in states[0]["state_dict"].items():
            torch.testing.assert_close(states[1]["state_dict"][key], tensor, atol=1e-5, rtol=1e-5)
        moments = [state["optimizer_states"][0]["state"] for state in states]
        assert moments[0].keys() == moments[1].keys()
        for index, moment in moments[0].items():
            torch.testing.assert_close(moments[1][index], moment, atol=1e-6, rtol=1e-4)
        assert curve(run, ["stage1"]) == pytest.approx(curve(project / "whole", ["stage1"]), abs=1e-5)
        before = goes_on


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then", "at"), [(1, 2, "middle"), (2, 1, "middle"), (1, 2, "end"), (2, 1, "end")])
def test_an_epoch_goes_on_with_another_number_of_processes_from_the_batch_it_had_come_to(project, first, then, at):  # noqa: F811
    keeper = {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1, "enable_version_counter": False}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper}
    settings = {"data__examples_per_epoch": 60, "data__max_tokens": 32, "trainer__max_epochs": 2}
    change(project, **settings, trainer__callbacks=[callback])
    start, flags = {1: fit, 2: on_processes}, ("--test", "false", "--stages", "[stage1]")
    steps = {}  # an epoch has
    for count, begin in start.items():
        begin("--run", f"of{count}", *flags)
        steps[count] = last_step(project / f"of{count}") // 2
    assert steps[2] == -(-steps[1] // 2) > 3
    run = (project / f"of{first}").rename(project / "run")
    (run / "progress.json").unlink()
    checkpoints = run / "stage1" / "checkpoints"
    stopped, left = {"middle": (2, steps[then] - 2 * first // then), "end": (steps[first], 0)}[at]  # of the first epoch
    shutil.copy(checkpoints / f"step={stopped}.ckpt", checkpoints / "last.ckpt")
    for file in checkpoints.iterdir():
        if not file.name.startswith("last"):
            file.unlink()
    start[then]("--run", "run", *flags)
    assert last_step(run) == stopped + left + steps[then]
    validated = [step for _, step, name in curve(run, ["stage1"]) if name == "val/loss"]
    assert len(validated) >= 2
    assert json.loads((run / "progress.json").read_text())["stage1"]["validation_loss"] > 0


def last_step(run):
    return torch.load(run / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
def test_a_whole_backbone_trains_in_slices(project):  # noqa: F811
    """With activations computed again in the backward pass, and answers at validation."""
    change(
        project,
        data__examples_per_epoch=24,
        trainer__max_epochs=1,
        trainer__callbacks=[{"class_path": "alter.callbacks.TaskMetrics", "init_args": {"rows": 3}}],
        stage1__model__init_args__backbone_lr=0.1,
        stage1__model__init_args__gradient_checkpointing=True,
    )
    flags = ("--test", "false", "--stages", "[stage1]")
    fit("--run", "one", "--trainer.accumulate_grad_batches", "2", *flags)
    on_processes("--run", "two", *flags, overlay="fsdp")
    one, two = (load_file(project / run / "stage1" / "model" / "adapters.safetensors") for run in ("one", "two"))
    assert any(key.startswith("backbone.") for key in one)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=1e-5)
    one, two = (curve(project / run, ["stage1"]) for run in ("one", "two"))
    assert "val/score" in {name for _, _, name in one}
    assert two == pytest.approx(one, abs=1e-5)


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
        (
            ["--precision", "nf4", "--config", str(ROOT / "recipes/strategies/fsdp.yaml")],
            "precision nf4 cannot be sharded",
        ),
        (["--trainer.strategy", "fsdp"], "write fsdp2"),
        (["--trainer.strategy", "ddp_spawn"], "ddp_spawn"),
        (["--trainer.strategy", "dpp"], "Did you mean 'ddp'?"),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_written(project, capsys, flags, words_of_it):  # noqa: F811
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *flags)
    assert "trainer.strategy" in sentence
    assert words_of_it in sentence
    assert not Path("run").exists()
