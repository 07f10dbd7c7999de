"""Losses and gradients that are not finite: told with task, step and batch, and left out up to a bound."""

import json

import pytest
import torch
from safetensors.torch import load_file

from alter.cli import main
from alter.nn.model import MTAModel
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project, refused  # noqa: F401 (a fixture)

FLAGS = ["--stages", "[stage1]", "--test", "false"]


@pytest.fixture
def spoil(monkeypatch):
    """Makes the losses of some training batches infinite; returns what they held."""
    forward, seen, spoilt = MTAModel.forward, [], []

    def choose(*numbers):
        def forwarded(self, batch):
            found = forward(self, batch)
            if torch.is_grad_enabled():
                seen.append(batch)
                if len(seen) - 1 in numbers:
                    spoilt.append(batch)
                    return found._replace(losses=found.losses * float("inf"))
            return found

        monkeypatch.setattr(MTAModel, "forward", forwarded)
        return spoilt

    return choose


def test_it_stops_and_names_step_batch_and_tasks_and_keeps_the_batch(project, capsys, spoil):  # noqa: F811
    spoilt = spoil(4)
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *FLAGS)
    assert "The loss is inf at step 4 of Stage1Module, batch 4 (tasks in the batch:" in sentence
    (file,) = (project / "run" / "stage1").glob("bad_batch.*.json")
    assert str(file.relative_to(project)) in sentence
    kept, (batch,) = json.loads(file.read_text()), spoilt
    assert (kept["step"], kept["batch"], kept["epoch"], kept["loss"]) == (4, 4, 0, "inf")
    assert [example["task"] for example in kept["examples"]] == [["echo", "sort"][i] for i in batch["task_ids"]]
    for example, ids, mask in zip(kept["examples"], batch["input_ids"], batch["attention_mask"], strict=True):
        assert example["input_ids"] == ids[mask.bool()].tolist()
        assert example["task"] in sentence


@pytest.mark.parametrize(("allowed", "accumulate"), [(2, 1), (2, 2), (1, 1)])
def test_some_may_be_left_out_and_no_more(project, capsys, spoil, allowed, accumulate):  # noqa: F811
    spoil(2, 5)
    change(project, stage1__model__init_args__skip_bad_batches=allowed, trainer__accumulate_grad_batches=accumulate)
    if allowed == 1:
        (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *FLAGS)
        assert "skip_bad_batches (now 1)" in sentence
        return
    with pytest.warns(UserWarning, match="left out, 2 of 2"):
        main(["fit", "--config", "recipe.yaml", *FLAGS])
    weights = load_file(project / "run" / "model" / "adapters.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    checkpoint = torch.load(project / "run" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["skipped"] == 2


def test_a_gradient_that_explodes_takes_no_step(project, capsys, monkeypatch):  # noqa: F811
    from alter.stages import Stage1Module

    before = Stage1Module.on_before_optimizer_step
    weights = []

    def exploding(self, optimizer):
        if self.global_step == 3 and not weights:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            weights.append([p.detach().clone() for p in self.parameters() if p.requires_grad])
        elif len(weights) == 1:
            weights.append([p.detach().clone() for p in self.parameters() if p.requires_grad])
        before(self, optimizer)

    monkeypatch.setattr(Stage1Module, "on_before_optimizer_step", exploding)
    change(project, stage1__model__init_args__skip_bad_batches=1)
    with pytest.warns(UserWarning, match="The gradient's norm is nan at step 3 of Stage1Module; left out, 1 of 1"):
        main(["fit", "--config", "recipe.yaml", *FLAGS])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    weights.clear()
    change(project, run="other", stage1__model__init_args__skip_bad_batches=0)
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *FLAGS)
    assert "The gradient's norm is nan at step 3" in sentence


def test_what_overflows_in_fp16_is_left_to_the_scaler(project):  # noqa: F811
    """The scale doubles at every step until a gradient is infinite; the scaler then halves it and takes no step."""
    scaler = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "growth_interval": 1}}
    mixed = {"precision": "16-mixed", "device": "cpu", "scaler": scaler}
    change(
        project,
        trainer__max_epochs=6,
        trainer__plugins=[{"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": mixed}],
    )
    main(["fit", "--config", "recipe.yaml", *FLAGS])
    checkpoint = torch.load(project / "run" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["skipped"] == 0
    assert checkpoint["MixedPrecision"]["scale"] < 2.0 ** (16 + checkpoint["global_step"])  # it did overflow
    weights = load_file(project / "run" / "model" / "adapters.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
