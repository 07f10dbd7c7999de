"""What is handed over to AdapterFusion; and, where its environment is, the method itself."""

import copy
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from alter.cli import main
from alter.compare import handover
from alter.compare.grid import Planner
from alter.compare.methods import METHODS, Budget
from alter.data import MultiTaskDataModule
from alter.nn.backbone import is_seq2seq, load_tokenizer
from alter.recipe import read_recipe
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project, refused  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get(handover.INTERPRETER)
needs_adapters = pytest.mark.skipif(not PYTHON, reason=f"{handover.INTERPRETER} names no environment with adapters")


@pytest.fixture
def compared(project, monkeypatch):  # noqa: F811
    change(
        project,
        trainer__max_epochs=1,
        trainer__val_check_interval=0.5,
        trainer__accumulate_grad_batches=2,
        stage2__trainer={"limit_train_batches": 0.5},
    )
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return project


@pytest.fixture
def planned(compared, monkeypatch, tmp_path):
    """The method's recipe and its data."""
    (tmp_path / "python").touch()
    monkeypatch.setenv(handover.INTERPRETER, PYTHON or str(tmp_path / "python"))
    recipe = read_recipe(["--config", "recipe.yaml"])
    planner = Planner(recipe)
    (run,) = METHODS["adapter_fusion"].plan(copy.deepcopy(recipe.config), planner.budget)
    planner.match(run)
    Path("fusion.yaml").write_text(yaml.safe_dump(run.config))
    recipe = read_recipe(["--config", "fusion.yaml"])
    data = MultiTaskDataModule(**recipe.data_args("backbone", is_seq2seq("backbone")))
    data.prepare_data()
    data.setup()
    return recipe, data, planner


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def examples(batches):
    return Counter(
        (tuple(prompt), tuple(target))
        for batch in batches
        for prompt, target in zip(batch["prompts"], batch["targets"], strict=True)
    )


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_what_is_handed_over_is_what_the_loaders_and_the_predictor_take(planned, tmp_path):
    recipe, data, planner = planned
    tokenizer = load_tokenizer("backbone")
    handover.write_files(tmp_path / "handover", recipe, data, tokenizer, "test")
    read = {file.stem: lines(file) for file in (tmp_path / "handover").glob("*.jsonl")}
    plan = json.loads((tmp_path / "handover" / "plan.json").read_text())

    # the mixture: batches of the loader's second epoch, token by token
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(handover.FUSION)
    for batch, line in zip(loader, read["fusion"], strict=True):
        expected = loader.collate_fn(
            [
                {"prompt_ids": p, "target_ids": t, "task_id": k}
                for p, t, k in zip(line["prompts"], line["targets"], batch["task_ids"].tolist(), strict=True)
            ]
        )
        assert all(torch.equal(batch[name], expected[name]) for name in batch)

    # the tasks alone: what the first epoch draws of each, in batches of the same budget
    sampler = loader.batch_sampler
    drawn = sampler.draws(handover.ADAPTERS)
    for i, task in enumerate(recipe.tasks):
        rows = data.examples(task.name, "train")
        wanted = Counter((tuple(rows[r]["prompt_ids"]), tuple(rows[r]["target_ids"])) for k, r in drawn if k == i)
        assert examples(read[f"task{i}"]) == wanted
        for batch in read[f"task{i}"]:
            longest = max(len(p) + len(t) for p, t in zip(batch["prompts"], batch["targets"], strict=True))
            assert longest * len(batch["prompts"]) <= data.max_tokens
        rows = data.examples(task.name, "validation")
        wanted = Counter((tuple(r["prompt_ids"]), tuple(r["target_ids"])) for r in rows)
        assert examples(read[f"validation{i}"]) == wanted
        asked = {r: p for b in read[f"questions{i}"] for r, p in zip(b["rows"], b["prompts"], strict=True)}
        assert asked == dict(enumerate(data.examples(task.name, "test")["prompt_ids"][:]))
    count = sum(
        len(batch["prompts"]) for name, batches in read.items() if name[:3] in ("tas", "fus") for batch in batches
    )
    assert planner.budget.draws - 1 <= count <= planner.budget.draws

    echo, sort = plan["tasks"]
    assert echo == {"name": "echo", "choices": None, "max_new_tokens": 4}
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in sort["choices"]] == ["yes", "no"]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in sort["choices"])
    assert plan["validations"] == 2
    assert plan["accumulate_grad_batches"] == 2
    assert plan["optimizer"] == "AdamW"
    assert plan["fusion_optimizer_args"] == {**plan["optimizer_args"], "lr": plan["optimizer_args"]["lr"] * 0.1}
    stacks = ["encoder.block", "decoder.block"] if data.seq2seq else ["model.layers"]
    last = [1, 2] if data.seq2seq else [2, 3]
    assert plan["blocks"] == [f"{stack}.{i}" for stack in stacks for i in last]


def test_without_its_environment_the_method_is_refused_before_anything_is_trained(compared, capsys, monkeypatch):
    methods = "stage1,adapter_fusion"
    arguments = ["compare", "--config", "recipe.yaml", "--out", "out", "--methods", methods, "--seeds", "1"]
    monkeypatch.delenv(handover.INTERPRETER, raising=False)
    (line,) = refused(capsys, *arguments)
    assert "nox -s fusion" in line
    assert handover.INTERPRETER in line
    monkeypatch.setenv(handover.INTERPRETER, "nowhere/python")
    (line,) = refused(capsys, *arguments)
    assert "nowhere/python" in line
    assert not list(Path("out").rglob("stage1/checkpoints"))


def test_an_optimizer_that_the_script_does_not_know_is_refused(compared, capsys, monkeypatch, tmp_path):
    (tmp_path / "python").touch()
    monkeypatch.setenv(handover.INTERPRETER, str(tmp_path / "python"))
    change(compared, stage1__model__init_args__optimizer={"class_path": "transformers.Adafactor", "init_args": {}})
    (line,) = refused(
        capsys, "compare", "--config", "recipe.yaml", "--out", "out", "--methods", "adapter_fusion", "--seeds", "1"
    )
    assert "torch.optim" in line


@needs_adapters
def test_a_rate_at_which_it_diverges_is_not_taken(compared, cells_here):
    tune = ("--tune", "1e20,1", "--split", "validation")
    main(["compare", "--config", "recipe.yaml", "--out", "out", "--methods", "adapter_fusion", "--seeds", "1", *tune])
    method = json.loads(Path("out/compare.json").read_text())["methods"]["adapter_fusion"]
    assert method["learning_rate_factor"] == 1
    assert (
        json.loads(Path("out/cells/adapter_fusion/seed13-lr1e+20/trained.json").read_text())["validation_loss"] is None
    )


def test_the_bottleneck_meets_the_budget_or_is_small(planned):
    recipe, _, planner = planned
    width, blocks, tasks = 32, 2, 2

    def count(rank):
        return tasks * blocks * (2 * width * rank + rank + width) + blocks * (3 * width**2 + 2 * width)

    def matched(parameters):
        (run,) = METHODS["adapter_fusion"].plan(copy.deepcopy(recipe.config), Budget(100, parameters, {}))
        planner.match(run)
        return run.config["stage1"]["model"]["init_args"]["expert"]["init_args"]["rank"]

    for budget in (8000, 12345, 50000):
        rank = matched(budget)
        assert abs(count(rank) - budget) <= min(abs(count(rank - 1) - budget), abs(count(rank + 1) - budget))
    assert matched(100) == 1


@needs_adapters
@pytest.mark.slow
@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cell_is_trained_answered_and_measured_as_every_other(compared, capsys, precision):
    change(compared, precision=precision)
    methods = "untouched,two_stage,adapter_fusion"
    arguments = ["--config", "recipe.yaml", "--out", "out", "--methods", methods, "--seeds", "1"]
    main(["compare", *arguments])
    result = json.loads(Path("out/compare.json").read_text())["methods"]
    fusion = result["adapter_fusion"]
    assert fusion["baseline"]
    assert fusion["tokens"] == pytest.approx(result["two_stage"]["tokens"], rel=0.15)
    assert fusion["tokens_per_second"] > 0
    assert fusion["peak_memory_bytes"] > 10**8
    cell = Path("out/cells/adapter_fusion/seed13")
    found = json.loads((cell / "test.json").read_text())
    theirs = json.loads(Path("out/cells/two_stage/seed13/test.json").read_text())
    assert found.keys() == theirs.keys() - {"best"}  # it always chooses by the loss
    assert 0 < found["validation_loss"] < 20
    other = lines(Path("out/cells/two_stage/seed13/test.jsonl"))
    assert [(r["task"], r["target"]) for r in lines(cell / "test.jsonl")] == [(r["task"], r["target"]) for r in other]
    assert all(r["answer"] in ("yes", "no") for r in lines(cell / "test.jsonl") if r["task"] == "sort")

    # what was trained is not trained again, and answers the same; nor are the adapters where the fusion was cut short
    answers, stamps = (cell / "test.jsonl").read_text(), {f: f.stat().st_mtime_ns for f in cell.rglob("*.pt")}
    assert {f.name for f in stamps} == {"task0.pt", "task1.pt", "fusion.pt"}
    (cell / "test.json").unlink()
    if precision == "fp32":
        fusion = next(f for f in stamps if f.name == "fusion.pt")
        fusion.unlink()
        del stamps[fusion]
    main(["compare", *arguments])
    assert (cell / "test.jsonl").read_text() == answers
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps


CHECKS = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch.nn import functional as F

spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
folder = Path(sys.argv[2])
plan = json.loads((folder / "plan.json").read_text())
model = script.load_model(plan)
names = {id(module): name for name, module in model.named_modules()}
adapted = [names[id(block)] for i, block in model.iter_layers() if any("adapters.task0" in n for n, _ in block.named_modules())]
assert adapted == plan["blocks"], adapted
assert len([n for n, m in model.named_modules() if type(m).__name__ == "BertFusion"]) == len(adapted)
before = {name: p.detach().clone() for name, p in model.named_parameters()}

script.train_all(model, plan, folder)
steps = {file.stem: torch.load(file)["state"] for file in (folder.parent / "model").glob("*.pt")}
after = dict(model.named_parameters())
trained = {name: step for step, state in steps.items() for name in state}
assert len(trained) == sum(map(len, steps.values()))  # no parameter trains twice
for name, value in before.items():
    if name not in trained:
        assert torch.equal(after[name], value), name
    else:
        assert torch.equal(after[name], steps[trained[name]][name]), name
        assert after[name].dtype == torch.float32
for step, state in steps.items():
    assert any(not torch.equal(value, before[name]) for name, value in state.items()), step
assert {name.split(".adapters.")[1].split(".")[0] for n in ("task0", "task1") for name in steps[n]} == {"task0", "task1"}
assert all("adapter_fusion_layer" in name for name in steps["fusion"])
print(sum(value.numel() for state in steps.values() for value in state.values()), "trained")

# scores of choices: the same numbers without caches, padding and sharing
batch = json.loads((folder / "questions1.jsonl").read_text().splitlines()[0])
choices = plan["tasks"][1]["choices"] + [[7, 8, 9, 1]]
with torch.no_grad():
    scores = script.log_likelihoods(model, plan, batch["prompts"], choices)
    for row, prompt in enumerate(batch["prompts"]):
        for column, choice in enumerate(choices):
            losses, _, _ = script.token_losses(model, plan, {"prompts": [prompt], "targets": [choice]})
            torch.testing.assert_close(scores[row, column], -losses.sum(), atol=1e-4, rtol=1e-4)

    # generation: the same tokens one by one without a cache
    batch = json.loads((folder / "questions0.jsonl").read_text().splitlines()[0])
    ends = {1, *plan["stop_tokens"]}
    for prompt, answer in zip(batch["prompts"], script.generate(model, plan, batch["prompts"], 6), strict=True):
        wanted = []
        while len(wanted) < 6:
            if plan["seq2seq"]:
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *wanted]]), use_cache=False).logits
            else:
                logits = model(input_ids=torch.tensor([prompt + wanted]), use_cache=False).logits
            token = logits[0, -1].argmax().item()
            if token in ends:
                break
            wanted.append(token)
        assert answer == wanted

# three batches, two a step: the mean gradient of the first two, then half of the last one's
batches = [json.loads(line) for line in (folder / "fusion.jsonl").read_text().splitlines()[:3]]
parameters = script.trainable(model)
start = {name: p.detach().clone() for name, p in parameters.items()}
plain = {**plan, "optimizer": "SGD", "optimizer_args": {"lr": 0.1}, "schedule": "constant", "warmup": 0, "clip": None, "validations": 0}
script.train(model, {**plain, "accumulate_grad_batches": 2}, batches, [])
reached = {name: p.detach().clone() for name, p in parameters.items()}
for name, p in parameters.items():
    p.data.copy_(start[name])
for window in (batches[:2], batches[2:]):
    losses = [script.token_losses(model, plan, batch)[0].mean() + model.get_fusion_regularization_loss() for batch in window]
    gradients = torch.autograd.grad(sum(losses) / 2, list(parameters.values()))
    for p, gradient in zip(parameters.values(), gradients):
        p.data.sub_(gradient, alpha=0.1)
for name, p in parameters.items():
    torch.testing.assert_close(p, reached[name])
"""


@needs_adapters
@pytest.mark.slow
@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_each_training_moves_its_own_parameters_alone_and_answers_are_likeliest(planned, tmp_path):
    recipe, data, planner = planned
    folder = tmp_path / "run" / "handover"
    handover.write_files(folder, recipe, data, load_tokenizer("backbone"), "test")
    command = [PYTHON, "-I", "-c", CHECKS, str(handover.SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = recipe.config["stage1"]["model"]["init_args"]
    width, blocks, rank = 32, len(planner.model.layers), arguments["expert"]["init_args"]["rank"]
    count = 2 * blocks * (2 * width * rank + rank + width) + blocks * (3 * width**2 + 2 * width)
    assert done.stdout.splitlines()[-1] == f"{count} trained"
