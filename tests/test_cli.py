"""The command as a user calls it, on a tiny backbone."""

import json
import math
import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import alter
from alter import run_folder
from alter.callbacks.preemption import Preemption
from alter.cli import main
from alter.data import MultiTaskDataModule
from alter.data.sampler import MixtureBatchSampler
from alter.errors import AlterError
from alter.nn.backbone import is_seq2seq
from alter.recipe import read_recipe
from tests.data.conftest import task_dict, words  # noqa: F401 (a fixture)
from tests.nn.tiny import tiny_model

KEEPER = "lightning.pytorch.callbacks.ModelCheckpoint"
STOPPER = "lightning.pytorch.callbacks.EarlyStopping"


def tiny_backbone(folder, words, family):  # noqa: F811
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words)
    model = tiny_model(family)
    model.resize_token_embeddings(max(510, len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(params=["llama"])
def project(request, tmp_path, words, monkeypatch):  # noqa: F811
    """A folder as a user has it: task files, labelled data, a recipe and a backbone."""
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, words, request.param)
    return tmp_path


def make_project(tmp_path, words, family="llama"):  # noqa: F811
    tiny_backbone(tmp_path / "backbone", words, family)
    (tmp_path / "tasks").mkdir()
    tasks = {
        "sort": task_dict(tmp_path, "sort", 60),
        "echo": task_dict(tmp_path, "echo", 30, choices=None, metrics=["rougeL", "exact_match"]),
    }
    for name, task in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "run": "run",
        "backbone": "backbone",
        "data": {"tasks": ["tasks/*.yaml"], "max_tokens": 128, "cache_dir": "cache"},
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1},
        "stage1": {"model": {"init_args": {"layers": "last:2", "expert": {"class_path": "alter.nn.LoRA", "init_args": {"rank": 4}}}}},
        "stage2": {"model": {"init_args": {"expert": {"class_path": "alter.nn.Bottleneck", "init_args": {"rank": 4}}}}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def change(project, **changes):
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        section = recipe
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def fit(*flags):
    main(["fit", "--config", "recipe.yaml", *flags])


def refused(capsys, *arguments):
    """Runs a command that has to be refused, and returns its sentences."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments) or ["fit", "--config", "recipe.yaml"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return [line for line in error.splitlines() if line.startswith("alter: ")]


def test_modules_are_looked_for_beside_the_recipes_in_their_order(project, monkeypatch):
    folders = [Path(f"over{i}") for i in range(8)]
    for folder in folders:
        folder.mkdir()
        (folder / "o.yaml").write_text("test: false\n")
    looked = []
    monkeypatch.setattr("alter.recipe.find_classes_in", looked.append)
    files = [Path("recipe.yaml"), *(folder / "o.yaml" for folder in folders)]
    read_recipe([part for file in files for part in ("--config", str(file))])
    assert looked == [Path(), *folders]


def test_a_validation_that_would_never_come_is_a_sentence(project, capsys):
    change(project, trainer__val_check_interval=1000)
    (sentence,) = refused(capsys)
    assert sentence.startswith("alter: trainer: `val_check_interval` (1000) must be less than or equal to the number")


def test_what_ends_stage_two_before_it_begins_is_mended_without_training_stage_one_again(project, capsys):
    change(project, trainer__val_check_interval=2, stage2__trainer={"limit_train_batches": 1})
    assert "`val_check_interval` (2) must be less than" in refused(capsys)[0]
    trained = (project / "run" / "stage1" / "model" / "adapters.safetensors").stat().st_mtime_ns
    change(project, stage1__model__init_args__own=0.5)
    assert "it differs in stage1.model.init_args.own" in refused(capsys)[0]
    change(
        project,
        stage1__model__init_args={
            "layers": "last:2",
            "expert": {"class_path": "alter.nn.LoRA", "init_args": {"rank": 4}},
        },
    )
    change(
        project,
        stage2__trainer={"limit_train_batches": 1, "val_check_interval": 1.0},
        stage2__model__init_args__keep=0.7,
    )
    fit("--test", "false")
    assert (project / "run" / "stage1" / "model" / "adapters.safetensors").stat().st_mtime_ns == trained
    kept = yaml.safe_load((project / "run" / "recipe.yaml").read_text())["stage2"]
    assert (kept["trainer"]["val_check_interval"], kept["model"]["init_args"]["keep"]) == (1.0, 0.7)
    change(project, stage2__model__init_args__keep=0.9)
    assert "it differs in stage2.model.init_args.keep" in refused(capsys)[0]  # which has begun


def test_checkpoints_for_safety_do_not_choose_the_model(project):
    """One without a monitor keeps its newest, which need be neither the best nor the last."""
    keeper = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    change(project, trainer__callbacks=[{"class_path": KEEPER, "init_args": keeper}], trainer__log_every_n_steps=0)
    fit("--test", "false", "--stages", "[stage1]")
    checkpoints = project / "run" / "stage1" / "checkpoints"
    assert {"best.ckpt", "last.ckpt", "step=3.ckpt"} <= {file.name for file in checkpoints.glob("*.ckpt")}
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)["state_dict"]
    kept = load_file(project / "run" / "stage1" / "model" / "adapters.safetensors")
    assert kept.keys() == best.keys()
    assert all(torch.equal(kept[name], best[name]) for name in kept)
    assert json.loads((project / "run" / "progress.json").read_text())["stage1"]["validation_loss"] > 0


def test_a_progress_bar_may_be_another(project, capsys):
    bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}
    change(project, trainer__callbacks=[bar], trainer__enable_progress_bar=True, trainer__max_epochs=1)
    fit("--test", "false", "--stages", "[stage1]")
    assert "Epoch 0: 100%" in capsys.readouterr().out


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_fit_runs_both_stages_tests_and_leaves_the_run_folder(project, capsys):
    fit()
    out = capsys.readouterr().out
    run = project / "run"
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "env.txt", "stage1", "stage2", "model", "results.json"}
    files = {"adapters.safetensors", "alter.json", "calibration.json", "task_predictor.safetensors"}
    assert {p.name for p in (run / "model").iterdir()} == files
    for stage in ("stage1", "stage2"):
        assert list((run / stage).glob("events.out.tfevents*"))
        lines = (run / stage / "metrics.csv").read_text().splitlines()
        assert lines[0] == "step,metric,value"
        assert {"train/loss", "val/loss", "val/loss/sort", "train/loss/echo"} <= {line.split(",")[1] for line in lines}
        assert (run / stage / "checkpoints" / "last.ckpt").is_file()
    results = json.loads((run / "results.json").read_text())
    assert set(results["tasks"]) == {"echo", "sort"}
    accuracy = results["tasks"]["sort"]["accuracy"]
    assert accuracy["n"] == 6
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert all(set(accuracy["references"][r]) == {"value", "low", "high"} for r in ("majority", "backbone", "tfidf"))
    references = results["tasks"]["echo"]["rougeL"]["references"]
    assert references["majority"] is None
    assert references["tfidf"] is None
    assert references["backbone"]["value"] >= 0
    assert set(results["seconds"]) == {"data", "stage1", "stage2", "test"}
    assert results["peak_memory_bytes"] > 10**8
    assert results["trainable_parameters"] > 0
    assert "accuracy" in out
    assert "run folder: run\n" in out
    for stage in ("stage1", "stage2"):
        assert f"{stage}: trains in run/{stage}" in out
    assert re.search(r"^backbone +[\d,]+ +no$", out, re.MULTILINE)
    assert re.search(r"^experts +[\d,]+ +yes$", out, re.MULTILINE)
    end = "\nReport:  run/report.html\nResults: run/results.json\nNext:    alter predict --run run --task echo --input FILE\n"
    assert end in out
    fit()
    assert end in capsys.readouterr().out  # all was done before
    assert str(run.relative_to(project) / "results.json") in out

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert [task["name"] for task in recipe["data"]["tasks"]] == ["echo", "sort"]
    assert recipe["stage1"]["model"]["init_args"]["expert"]["init_args"] == {"rank": 4, "alpha": None}
    assert "torch==" in (run / "env.txt").read_text()

    model = alter.load(run)
    assert model.tasks == ["echo", "sort"]


def test_what_lightning_finds_wrong_with_the_trainer_is_one_sentence(project, capsys):
    change(project, trainer__limit_val_batches=0.001)
    (sentence,) = refused(capsys)
    assert sentence.startswith("alter: trainer: ")
    assert "limit_val_batches" in sentence


def test_of_small_data_a_share_of_the_batches_is_one_at_least_and_is_logged(project, recwarn):
    change(
        project, trainer__max_epochs=1, trainer__log_every_n_steps=50, stage2__trainer={"limit_train_batches": 0.001}
    )
    fit("--test", "false")
    for stage in ("stage1", "stage2"):
        lines = (project / "run" / stage / "metrics.csv").read_text().splitlines()
        assert any(line.split(",")[1] == "train/loss" for line in lines)
    assert json.loads((project / "run" / "progress.json").read_text())["stage2"]["tokens"] <= 128
    assert not any("logging interval" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    ("given", "flags", "temperature"),
    [
        ({}, [], 0.1),  # its own default, not TaskSelector's
        ({"temperature": 0.7}, [], 0.7),
        ({}, ["--stage1.model.router.temperature", "0.3"], 0.3),
        ({}, ["--stage1.model.init_args.router.init_args.temperature", "1.0"], 1.0),
        (
            {},
            ["--stage1.model.router", '{"class_path": "alter.nn.AdjacentSelector", "init_args": {"temperature": 1.0}}'],
            1.0,
        ),
        ({"temperature": 1.0}, ["--stage1.model.router", "alter.nn.AdjacentSelector"], 1.0),
    ],
)
def test_a_class_without_arguments_has_its_own_defaults(project, given, flags, temperature):
    router = {"class_path": "alter.nn.AdjacentSelector", **({"init_args": given} if given else {})}
    change(project, stage1__model__init_args__router=router)
    config = read_recipe(["--config", "recipe.yaml", *flags]).config
    assert config["stage1"]["model"]["init_args"]["router"]["init_args"]["temperature"] == temperature


@pytest.mark.parametrize(
    ("overlay", "flags", "expected"),
    [
        ({"class_path": "alter.nn.HydraLoRA"}, [], 32),
        ({"class_path": "alter.nn.LoRA"}, ["--stage1.model.expert", "alter.nn.HydraLoRA"], 32),
        ({"class_path": "alter.nn.HydraLoRA"}, ["--stage1.model.expert.rank", "3"], 3),
        ({"class_path": "alter.nn.LoRA"}, ["--stage1.model.expert", '{"class_path": "alter.nn.HydraLoRA"}'], 32),
        (
            {"class_path": "alter.nn.LoRA"},
            ["--stage1.model", "{init_args: {expert: {class_path: alter.nn.HydraLoRA, init_args: {rank: 6}}}}"],
            6,
        ),
        ({"class_path": "alter.nn.HydraLoRA", "init_args": {"rank": 5}}, [], 5),
        ({"class_path": "alter.nn.LoRA", "init_args": {"alpha": 2.0}}, [], 4),
        ({"class_path": "alter.nn.experts.LoRA"}, [], 4),
    ],
)
def test_another_class_in_an_overlay_or_a_flag_leaves_the_first_ones_arguments(project, overlay, flags, expected):
    """The recipe has LoRA with rank 4. An overlay of a comparison or a sweep means the same."""
    Path("o.yaml").write_text(yaml.safe_dump({"stage1": {"model": {"init_args": {"expert": overlay}}}}))
    config = read_recipe(["--config", "recipe.yaml", "--config", "o.yaml", *flags]).config
    assert config["stage1"]["model"]["init_args"]["expert"]["init_args"]["rank"] == expected


OWN_EXPERT = """
from alter.nn import LoRA

class Gained(LoRA):
    def __init__(self, gain: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.gain = gain
"""


def test_an_expert_that_hands_its_arguments_on_is_the_same_in_both_stages_and_in_a_file(project, monkeypatch):
    (project / "handing_on.py").write_text(OWN_EXPERT)
    monkeypatch.syspath_prepend(str(project))
    change(
        project,
        stage1__model__init_args__expert={"class_path": "handing_on.Gained", "init_args": {"gain": 2.0, "rank": 3}},
    )
    fit("--test", "false")
    parts = json.loads((project / "run" / "model" / "alter.json").read_text())["parts"]
    assert parts["experts"]["init_args"] == {"gain": 2.0, "rank": 3, "alpha": None}
    assert alter.load(project / "run").classify(["w1 w2"], task="sort")


def test_an_optimizer_that_does_not_fit_is_one_sentence(project, capsys):
    change(project, stage1__model__init_args__optimizer={"class_path": "torch.optim.LBFGS"})
    (sentence,) = refused(capsys)
    assert "optimizer: it does not fit this model (LBFGS doesn't support per-parameter options" in sentence


@pytest.mark.parametrize("settings", [{"limit_train_batches": 3}, {"accumulate_grad_batches": 4}])
def test_every_stage_has_a_line_in_the_log(project, settings):
    given = {f"trainer__{key}": value for key, value in settings.items()}
    change(project, trainer__max_epochs=1, trainer__log_every_n_steps=50, **given)
    fit("--test", "false")
    for stage in ("stage1", "stage2"):
        assert ",train/loss," in (project / "run" / stage / "metrics.csv").read_text()


def test_what_ends_a_stage_by_its_own_word_is_not_taken_for_an_interruption(project, monkeypatch):
    def requeued(*args):
        raise SystemExit("alter: SLURM has requeued this job.")

    monkeypatch.setattr(Preemption, "on_train_batch_end", requeued)
    with pytest.raises(SystemExit, match="has requeued"):
        fit()


@pytest.mark.parametrize("project", ["llama", "t5"], indirect=True)
def test_runs_that_start_from_the_trunk_cache_end_as_one_without(project, capsys, monkeypatch):
    drawn = MultiTaskDataModule.drawn_tokens
    monkeypatch.setattr(  # GB in place of kB
        MultiTaskDataModule, "drawn_tokens", lambda *given: [10**6 * tokens for tokens in drawn(*given)]
    )
    files = [project / f"{task}.{split}.jsonl" for task in ("sort", "echo") for split in ("train", "validation")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if is_seq2seq("backbone"):  # the encoder's states alone: adapters there move what the decoder reads
        tokens = sum(len(f"{row['text']} : </s>".split()) for row in rows)
    else:
        tokens = sum(len(f"{row['text']} : {row['label']} </s>".split()) for row in rows)
    width = 32
    fit("--test", "false", "--run", "plain", "--trunk_cache.enabled", "false")
    assert "trunk cache: off (trunk_cache.enabled is false)" in capsys.readouterr().out
    weights = {"plain": load_file(project / "plain" / "model" / "adapters.safetensors")}
    for run in ("cold", "warm"):
        fit("--test", "false", "--run", run, "--trunk_cache.folder", "trunk")
        first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trunk cache: ")]
        for line in (first, second):  # how much it may become, before it is there
            told = float(re.search(r"up to ([\d.]+) GB in trunk", line)[1])
            assert told == pytest.approx(10**6 * tokens * width * 4 / 2**30, abs=0.005)
        known = [int(line.split(", ")[-1].split()[0]) for line in (first, second)]
        if run == "cold":
            assert known[0] == 0
            examples = known[1]  # stage 2 finds what stage 1 has read
            assert examples > 50
        assert run == "cold" or known == [examples, examples]
        weights[run] = load_file(project / run / "model" / "adapters.safetensors")
    for name, value in weights["cold"].items():
        assert torch.equal(weights["warm"][name], value), name
        # an example's last bits depend on the rows beside it, which in a later epoch are others
        torch.testing.assert_close(weights["plain"][name], value, atol=1e-6, rtol=0)


def test_the_same_command_skips_what_is_finished_and_says_so(project, capsys):
    fit()
    stamps = {p: p.stat().st_mtime_ns for p in (project / "run").rglob("*.safetensors")}
    capsys.readouterr()
    fit()
    text = "".join(capsys.readouterr())
    assert "stage1: finished before" in text
    assert "stage2: finished before" in text
    assert "test: finished before" in text
    assert "accuracy" in text
    assert {p: p.stat().st_mtime_ns for p in (project / "run").rglob("*.safetensors")} == stamps


def test_stages_can_be_run_one_by_one(project, capsys):
    assert (
        "stage2 needs a finished stage1" in refused(capsys, "fit", "--config", "recipe.yaml", "--stages", "[stage2]")[0]
    )
    fit("--stages", "[stage1]", "--test", "false")
    assert not (project / "run" / "stage2").exists()
    first = load_file(project / "run" / "model" / "adapters.safetensors")
    fit("--stages", "[stage2]")
    second = load_file(project / "run" / "model" / "adapters.safetensors")
    assert first.keys() < second.keys()
    for key, value in first.items():  # the task experts stayed, divided by `keep`
        assert torch.equal(second[key], value * (1 / 0.9) if ".experts.b." in key else value), key
    assert any("shared" in key for key in second)


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(project):
    program = f"""
import sys
sys.path.insert(0, {str(sys.path[0])!r})
from alter.stages.base import StageModule
import os
kept = StageModule.training_step
def step(self, batch, index):
    if self.global_step == int(sys.argv[1]) and type(self).__name__ == sys.argv[2]:
        os._exit(9)
    return kept(self, batch, index)
StageModule.training_step = step
from alter.cli import main
from alter.data.sampler import MixtureBatchSampler
main(["fit", "--config", "recipe.yaml", "--run", sys.argv[3], "--test", "false"])
"""
    change(project, trainer__callbacks=None, trainer__val_check_interval=3)

    def call(step, stage, run):
        return subprocess.run([sys.executable, "-c", program, str(step), stage, run], capture_output=True, text=True)

    whole = call(-1, "", "whole")
    assert whole.returncode == 0, whole.stderr
    assert call(5, "Stage1Module", "cut").returncode == 9
    assert call(7, "Stage2Module", "cut").returncode == 9
    last = call(-1, "", "cut")
    assert last.returncode == 0, last.stderr
    assert "stage1: finished before" in last.stderr + last.stdout
    assert "goes on from" in last.stderr + last.stdout
    expected, got = (load_file(project / run / "model" / "adapters.safetensors") for run in ("whole", "cut"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for stage in ("stage1", "stage2"):
        assert (project / "cut" / stage / "metrics.csv").read_text() == (
            project / "whole" / stage / "metrics.csv"
        ).read_text()


def test_a_run_folder_of_another_recipe_is_not_overwritten(project, capsys):
    fit("--test", "false")
    before = (project / "run" / "recipe.yaml").read_text()
    sentence = refused(capsys, "fit", "--config", "recipe.yaml", "--data.temperature", "5")[0]
    assert "data.temperature" in sentence
    assert "--run" in sentence
    assert (project / "run" / "recipe.yaml").read_text() == before


def test_a_run_that_another_process_changes_is_left_alone(project, capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0)
    fit("--test", "false")
    before = {file: file.stat().st_mtime_ns for file in (project / "run").rglob("*")}
    verbs = [
        ["fit", "--config", "recipe.yaml"],
        ["add-task", "--run", "run", "--task", "tasks/sort.yaml"],
        ["remove-task", "--run", "run", "--task", "echo"],
    ]
    sentence = "run: another process is changing this run; wait until it has ended, or take another run folder."
    with run_folder.changing(project / "run"):
        for verb in verbs:
            assert refused(capsys, *verb) == [f"alter: {sentence}"]
    assert {file: file.stat().st_mtime_ns for file in (project / "run").rglob("*")} == before
    main(verbs[-1])
    assert "echo is no longer answered" in capsys.readouterr().out


def test_a_recipe_mended_after_a_failed_start_is_taken(project, capsys):
    change(project, data__tasks=["tasks/sort.yaml"])
    task = yaml.safe_load((project / "tasks" / "sort.yaml").read_text())
    (project / "tasks" / "sort.yaml").write_text(yaml.safe_dump({**task, "max_target_tokens": 1}))
    assert "max_target_tokens" in refused(capsys)[0]
    (project / "tasks" / "sort.yaml").write_text(yaml.safe_dump(task))
    fit("--test", "false")
    assert yaml.safe_load((project / "run" / "recipe.yaml").read_text())["data"]["tasks"][0]["max_target_tokens"] == 4


def test_every_field_is_a_flag(project):
    fit("--stage2.model.router.init_args.hidden", "7", "--stage1.model.own", "0.5", "--test", "false")
    config = json.loads((project / "run" / "model" / "alter.json").read_text())
    assert config["parts"]["shared_router"]["init_args"] == {"hidden": 7}


def test_print_config_shows_the_whole_recipe_with_comments(project, capsys):
    with pytest.raises(SystemExit) as stop:
        fit("--print_config")
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert "# T of the rates; 1 draws in proportion to size" in text
    config = yaml.safe_load(text)
    assert config["seed_everything"] == 13
    assert config["stage2"]["model"]["class_path"] == "alter.stages.Stage2Module"


def test_what_ends_a_stage_may_be_steps_and_has_to_be_something(project, capsys):
    length = ("--trainer.max_epochs", "-1", "--test", "false")
    fit(*length, "--trainer.max_steps", "3")
    assert json.loads((project / "run" / "progress.json").read_text()).keys() >= {"stage1", "stage2"}
    change(project, run="other")
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", *length, "--trainer.max_time", "00:00:00:05")
    assert "give max_epochs or max_steps" in sentence


def test_predict_streams_answers_as_json_lines(project, capsys, monkeypatch):
    fit("--test", "false")
    capsys.readouterr()
    (project / "rows.jsonl").write_text('{"text": "w1 w2"}\n\n{"text": "w3"}\n')
    main(["predict", "--run", "run", "--task", "sort", "--input", "rows.jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["probabilities"][line["answer"]] >= max(line["probabilities"].values()) - 1e-6
        assert math.isclose(sum(line["probabilities"].values()), 1, abs_tol=1e-4)
    monkeypatch.setattr("sys.stdin", (project / "rows.jsonl").open())
    main(["predict", "--run", "run", "--task", "echo", "--input", "-"])
    assert [set(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [{"answer"}, {"answer"}]
    with monkeypatch.context() as patch:  # a terminal that is not UTF-8, and half an emoji
        patch.setattr("sys.stdin", TextIOWrapper(BytesIO('\ufeff{"text": "\u00fc \\ud83d"}'.encode()), "ascii"))
        terminal = TextIOWrapper(written := BytesIO(), "ascii")
        patch.setattr("sys.stdout", terminal)
        main(["predict", "--run", "run", "--task", "echo", "--input", "-"])
    assert json.loads(written.getvalue().decode("ascii")).keys() == {"answer"}
    (project / "rows.csv").write_text("number,text\n1,w1 w2\n2,w3\n")
    main(["predict", "--run", "run", "--task", "sort", "--input", "rows.csv"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_a_run_on_few_shots_learns_from_them_alone_and_tests_on_all(project, capsys):
    fit("--data.shots", "4", "--data.seed", "21")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "generation" in line]
    assert table[0][:5] == ["echo", "generation", "4", "4", "6"]
    results = json.loads((project / "run" / "results.json").read_text())
    assert results["tasks"]["sort"]["accuracy"]["n"] == 6
    main(["test", "--run", "run"])
    again = json.loads((project / "run" / "results.json").read_text())
    assert again["tasks"] == results["tasks"]


ROUTER = '''
import torch
from alter.nn import Router


class Fixed(Router):
    """Gates that are the same for every token."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def build(self, shape):
        self.logits = torch.nn.Parameter(shape.prior.mean(0).log() * self.sharpness)

    def forward(self, hidden_states, routing):
        return self.logits.softmax(-1).expand(len(hidden_states), 1, -1)
'''


def test_a_router_from_a_users_own_file_trains_and_is_imported_only_when_asked_for(project, capsys, monkeypatch):
    (project / "own_router.py").write_text(ROUTER)
    (project / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    router = {"class_path": "own_router.Fixed", "init_args": {"sharpness": 2.0}}
    change(project, stage2__model__init_args__router=router)
    fit("--test", "false")
    assert json.loads((project / "run/model/alter.json").read_text())["parts"]["shared_router"] == router
    monkeypatch.delitem(sys.modules, "own_router")
    predict = ("predict", "--run", "run", "--task", "sort", "--input", "rows.jsonl")
    assert "'own_router.Fixed' is not part of ALTER; import its module" in refused(capsys, *predict)[0]
    assert "'no_router' cannot be imported" in refused(capsys, *predict, "--import", "no_router")[0]
    main([*predict, "--import", "own_router"])
    assert json.loads(capsys.readouterr().out)["answer"] in ("yes", "no")


def template(name, **arguments):
    return {"class_path": f"alter.nn.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"router": template("TopK", k=2, load_balance=0.02, z_loss=0.01, noise=0.1), "num_experts": 3},
            {"router": template("Description", temperature=0.5, supervision=0.2)},
        ),
        (
            {
                "router": template("ModSquad", k=1, mutual_information=0.1, momentum=0.5, noise=0.2),
                "expert": template("HydraLoRA", rank=4, alpha=None),
            },
            {"router": template("TopK", k=2, load_balance=0.1, z_loss=0.0, noise=0.0)},
        ),
        (
            {"router": template("Description", temperature=1.0, supervision=0.1)},
            {"router": template("Polytropon", temperature=0.5), "expert": template("MTLLoRA", rank=4, alpha=None)},
        ),
    ],
    ids=["TopK", "ModSquad", "Description"],
)
def test_routers_and_experts_named_in_the_recipe_with_their_weights_train_and_answer(project, first, second):
    for stage, arguments in (("stage1", first), ("stage2", second)):
        change(project, **{f"{stage}__model__init_args__{key}": value for key, value in arguments.items()})
    fit()
    config = json.loads((project / "run" / "model" / "alter.json").read_text())
    assert config["parts"]["router"] == first["router"]
    assert config["parts"]["shared_router"] == second["router"]
    assert config["num_experts"] == first.get("num_experts", 2)
    metrics = [line.split(",")[1] for line in (project / "run" / "stage1" / "metrics.csv").read_text().splitlines()]
    assert "train/auxiliary" in metrics
    assert set(json.loads((project / "run" / "results.json").read_text())["tasks"]) == {"echo", "sort"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"router": template("TopK", k=3)},
            "stage1.model.init_args: TopK: k is 3; give 1 to 2, the number of experts.",
        ),
        (
            {"router": template("TopK", load_balance=-1.0)},
            "TopK: load_balance is -1.0; give 0 to leave it out, or more.",
        ),
        ({"num_experts": 0}, "num_experts: 0 is below 1; give a positive number, or none for one a task."),
        ({"own": 1.5}, "stage1.model.init_args.own: 1.5 is no share; give 0 to 1, such as 0.9."),
        ({"expert": template("LoRA", rank=0)}, "stage1.model.init_args: LoRA: rank is 0; give 1 or more."),
        ({"expert": template("Bottleneck", rank=-1)}, "Bottleneck: rank is -1; give 1 or more."),
        ({"expert": template("LoRA", alpha=0.0)}, "LoRA: alpha is 0.0; give a number above 0, or none for the rank."),
        ({"expert": template("MTLLoRA", rank=0, alpha=8.0)}, "MTLLoRA: rank is 0; give 1 or more."),
    ],
)
def test_arguments_of_stage_one_that_do_not_fit_are_one_sentence(project, capsys, arguments, message):
    change(project, **{f"stage1__model__init_args__{key}": value for key, value in arguments.items()})
    (sentence,) = refused(capsys)
    assert message in sentence
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shared": 0}, "stage2.model.init_args.num_shared: 0 is below 1; give a positive number"),
        ({"keep": -0.5}, "stage2.model.init_args.keep: -0.5 is no share"),
        ({"router": template("SharedGate", hidden=0)}, "stage2.model.init_args: SharedGate: hidden is 0"),
        ({"expert": template("HydraLoRA", rank=0)}, "stage2.model.init_args: HydraLoRA: rank is 0"),
    ],
)
def test_arguments_of_stage_two_are_checked_before_stage_one(project, capsys, arguments, message):
    change(project, **{f"stage2__model__init_args__{key}": value for key, value in arguments.items()})
    (sentence,) = refused(capsys)
    assert message in sentence
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--task", "sorted"], "", "there is no task 'sorted'; it is one of echo, sort. Did you mean 'sort'?"),
        (["--task", "sort"], '{"txt": "w1"}', "the template names 'txt'|names 'text', which is not a field of the row"),
        (["--task", "sort"], "not json", "rows.jsonl, line 1: not JSON"),
        (["--task", "sort"], b'{"text": "\xff"}', "rows.jsonl: not UTF-8 text"),
        (["--task", "sort"], "[1]", "rows.jsonl, line 1: expected an object"),
        (["--task", "sort", "--run", "nowhere"], "", "nowhere: no run here"),
        (["--task", "sort", "--input", "nofile"], "", "nofile cannot be read"),
    ],
)
def test_predict_refuses_bad_input(project, capsys, arguments, content, message):
    fit("--test", "false")
    (project / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    defaults = ["predict", "--run", "run", "--input", "rows.jsonl"]
    sentence = refused(capsys, *defaults, *arguments)[0]
    assert any(part in sentence for part in message.split("|"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__temperature": 0}, "data.temperature: 0.0 is not above 0"),
        ({"data__cap": 0}, "data.cap: 0 is below 1"),
        ({"data__max_tokens": 0}, "data.max_tokens: 0 is below 1"),
        ({"data__num_workers": -1}, "data.num_workers: -1 is below 0"),
        ({"seed_everything": -1}, "seed_everything: -1 is no seed"),
        ({"trunk_cache__max_gb": float("inf")}, "trunk_cache.max_gb: inf is no number above 0"),
        ({"trainer__callbacks": [{"class_path": KEEPER, "init_args": {"dirpath": "kept"}}]}, "trainer.callbacks: a stage's checkpoints lie in its own folder"),
        ({"stage2__trainer__callbacks": [{"class_path": KEEPER, "init_args": {"dirpath": "kept"}}]}, "stage2.trainer.callbacks: a stage's"),
        ({"trunk_cache__max_gb": 0}, "trunk_cache.max_gb: 0.0 is no number above 0; to keep nothing, write trunk_cache.enabled: false"),
        ({"trainer__val_check_interval": 0}, "trainer.val_check_interval: 0 is not above 0"),
        ({"stage2__trainer__accumulate_grad_batches": 0}, "stage2.trainer.accumulate_grad_batches: 0 is not above 0"),
        ({"stage1__trainer": {"check_val_every_n_epoch": 3}}, "trainer.check_val_every_n_epoch: 3 is more than the epochs of stage1, 2"),
        ({"trainer__limit_val_batches": 0}, "trainer.limit_val_batches: without a validation nothing says"),
        ({"trainer__callbacks": [{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}]}, "trainer.callbacks: lightning.pytorch.callbacks.EMAWeightAveraging averages weights"),
        ({"trainer__fast_dev_run": True}, "trainer.fast_dev_run: it would leave a run that counts as trained"),
        ({"trainer__overfit_batches": 1}, "trainer.overfit_batches: a mixture draws other batches in every epoch"),
        ({"trainer__enable_checkpointing": False}, "trainer.enable_checkpointing: without checkpoints there is no best model"),
        ({"stage2__trainer": {"precision": "bf16-true"}}, "stage2.trainer.precision: bf16-true would convert the adapters too"),
        ({"trainer__callbacks": [{"class_path": STOPPER, "init_args": {"monitor": "val_loss"}}]}, "trainer.callbacks: nothing is logged as val_loss; write monitor: val/loss"),
        ({"precision": "bf16", "stage2__model__init_args__backbone_lr": 0.1}, "precision: the backbone trains (backbone_lr 0.1) and needs fp32"),
        ({"stage2__model__init_args__router": {"class_path": "alter.nn.TopK", "init_args": {"k": 4}}}, "stage2.model.init_args: TopK: k is 4; give 1 to 3"),
        ({"trainer__max_epochs": None, "stage1__trainer": {"max_epochs": 1}}, "trainer.max_epochs: nothing says when stage2 ends"),
        ({"stage2__trainer__strategy": "fsdp"}, "stage2.trainer.strategy: fsdp is not the way"),
        ({"stage2__model__init_args__warmup": 2}, "stage2.model.init_args.warmup: 2.0 is no share of the steps"),
        ({"stage1__model__init_args__router_lr": -1}, "stage1.model.init_args.router_lr: -1.0 is below 0; give 0 to freeze"),
        ({"stage1__model__init_args__skip_bad_batches": -1}, "stage1.model.init_args.skip_bad_batches: -1 is below 0"),
        ({"stage2__model__init_args__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": -1.0}}}, "stage2.model.init_args.optimizer.init_args.lr: -1.0 is below 0"),
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_is_told_before_anything_is_loaded(project, changes, message):
    change(project, **changes)
    with pytest.raises(AlterError) as error:
        read_recipe(["--config", "recipe.yaml"])
    (sentence,) = error.value.messages
    assert sentence.startswith(message)


@pytest.mark.parametrize(
    ("project", "longest", "fits"),
    [
        ("gpt2", (1000, 24), True),
        ("gpt2", (1000, 25), False),
        ("bart", (1024, 1024), True),
        ("bart", (1025, 8), False),
        ("bart", (8, 1025), False),
        ("t5", (9000, 9000), True),  # which knows distances alone
    ],
    indirect=["project"],
)
def test_a_task_whose_tokens_the_backbone_has_no_positions_for_is_told_before_training(project, longest, fits, capsys):
    file = project / "tasks" / "echo.yaml"
    keys = dict(zip(("max_prompt_tokens", "max_target_tokens"), longest, strict=True))
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **keys}))
    if fits:
        assert read_recipe(["--config", "recipe.yaml"]).open_data(project / "backbone").sizes
        return
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml")
    assert f"task 'echo': max_prompt_tokens {longest[0]} " in sentence
    assert "more than the 1024 positions that the backbone has; lower them." in sentence
    assert not (project / "run" / "stage1").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bakbone": "x"}, r"recipe.yaml: unknown key 'bakbone'; .* Did you mean 'backbone'?"),
        ({"trunk_cache__max_bg": 3}, "recipe.yaml: trunk_cache: unknown key 'max_bg'; .* Did you mean 'max_gb'?"),
        ({"data__temprature": 2}, "recipe.yaml: data: unknown key 'temprature'; .* Did you mean 'temperature'?"),
        ({"data__temperature": "hot"}, "recipe.yaml: data: the key 'temperature' is 'hot', which is not float"),
        ({"data__max_tokens": "64"}, "recipe.yaml: data: the key 'max_tokens' is '64', which is not int"),
        ({"stage1__model": None}, "stage1.model: it is empty"),
        ({"stage1__trainer": None}, "stage1.trainer: it is empty; write the keys that differ from trainer's"),
        ({"stage1__trainer": {"strategy": {"class": "ddp"}}}, "recipe.yaml: stage1.trainer: .*strategy"),
        ({"trainer__barebones": True}, "recipe.yaml: trainer: unknown key 'barebones'"),
        ({"stage1__model__init_args__expert": {"class_path": "alter.nn.LoRA", "init_args": {"rank": None}}}, "the key 'rank' is None, which is not int"),
        ({"data__temperature": -1}, "data.temperature: -1"),
        ({"data__examples_per_epoch": -5}, "data.examples_per_epoch: -5 is below 1"),
        ({"data__max_tokens": 0}, "data.max_tokens: 0 is below 1"),
        ({"data__seed": -1}, "data.seed: -1 is below 0"),
        ({"data__limit": {"trian": 3}}, "data.limit: 'trian' is not a split.*Did you mean 'train'?"),
        ({"trainer__max_epoch": 2}, "recipe.yaml: trainer: unknown key 'max_epoch'; .* Did you mean 'max_epochs'?"),
        ({"stage1__modle": {}}, "recipe.yaml: stage1: unknown key 'modle'; .* Did you mean 'model'?"),
        ({"stage1__trainer": {"max_epoks": 1}}, "recipe.yaml: stage1.trainer: unknown key 'max_epoks'"),
        ({"stage1__model__init_args__layrs": 1}, "recipe.yaml: stage1.model: unknown key 'layrs'; .* Did you mean 'layers'?"),
        ({"stage1__model__init_args__router": {"class_path": "alter.nn.TaskSelektor"}}, "Did you mean 'TaskSelector'?"),
        ({"stage1__model__init_args__router": {"class_path": "alter.nn.TokenGate", "init_args": {"temprature": 1}}}, "Did you mean 'temperature'?"),
        ({"stage1__model__init_args__layers": "last:40"}, "last:40"),
        ({"stage1__model__init_args__layers": "lst:4"}, "lst:4"),
        ({"precision": "fp23"}, "precision: 'fp23' is not one of .* Did you mean 'fp32'?"),
        ({"stages": ["stage3"]}, "stages: 'stage3' is not a stage"),
        ({"backbone": "bakbone"}, "bakbone"),
        ({"data__tasks": ["tasks/srot.yaml"]}, "there is no task file 'tasks/srot.yaml' in .*Did you mean 'tasks/sort.yaml'?"),
        ({"data__tasks": []}, "the recipe names no task"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_sentence_with_file_key_and_remedy(project, capsys, changes, message):
    import re

    change(project, **changes)
    text = "\n".join(refused(capsys))
    assert re.search(message.replace("?", r"\?") if message.endswith("?") else message, text), text


def test_tasks_are_looked_for_beside_the_file_that_lists_them(project, monkeypatch, tmp_path_factory):
    from alter.recipe import read_recipe

    (project / "fewer").mkdir()
    (project / "tasks" / "sort.yaml").rename(project / "fewer" / "only.yaml")
    (project / "fewer" / "over.yaml").write_text(yaml.safe_dump({"data": {"tasks": ["only.yaml"]}}))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    both = [f"--config={project / name}" for name in ("recipe.yaml", "fewer/over.yaml")]
    assert [task.name for task in read_recipe([*both, f"--backbone={project / 'backbone'}"]).tasks] == ["sort"]
    assert [task.name for task in read_recipe([both[0], f"--backbone={project / 'backbone'}"]).tasks] == ["echo"]


def test_all_mistakes_of_a_recipe_and_its_tasks_come_at_once_before_anything_is_written(project, capsys):
    change(project, bakbone="x", data__temprature=1, stage2__model__init_args__num_shard=3)
    task = yaml.safe_load((project / "tasks" / "sort.yaml").read_text())
    (project / "tasks" / "sort.yaml").write_text(yaml.safe_dump({**task, "metrics": ["acuracy"], "promt": "x"}))
    text = "\n".join(refused(capsys))
    for name in ("bakbone", "temprature", "num_shard", "promt"):
        assert f"'{name}'" in text
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "recipes.yaml"], "recipes.yaml: no such recipe"),
        (
            ["--config", "recipe.yaml", "--data.temprature", "2"],
            "unknown flag '--data.temprature'; --print_config shows all keys of a recipe. Did you mean '--data.temperature'?",
        ),
        (
            ["--config", "recipe.yaml", "--stage1.model.layrs", "2"],
            "the command line: --stage1.model.layrs: stage1 has no 'layrs'; it takes layers, ffn, expert",
        ),
        (
            ["--config", "recipe.yaml", "--stage2.model.layers", "last:2"],
            "stage2 has no 'layers'; it takes expert, num_shared",
        ),
        (
            ["--config", "recipe.yaml", "--stage1.model.router", "alter.nn.Topk"],
            "the command line: --stage1.model.router: 'alter.nn.Topk' is not in alter.nn; known there",
        ),
        ([], "fit: --config is missing; name a recipe"),
        (
            ["recipe.yaml"],
            "the command line: 'recipe.yaml' belongs to no flag; name a recipe by --config recipe.yaml.",
        ),
        (
            ["--config", "recipe.yaml", "--data.seed", "3", "4"],
            "the command line: '4' belongs to no flag; quote a value with blanks.",
        ),
        (
            ["--config", "recipe.yaml", "--print_config=x"],
            "the command line: --print_config=x: it takes skip_default, or",
        ),
        (["--config", "recipe.yaml", "--run", "/proc/x"], "/proc/x: the run folder cannot be made (No such file"),
        (
            ["--config", "recipe.yaml", "--run", "recipe.yaml/run"],
            "recipe.yaml/run: the run folder cannot be made (Not a directory); name another by --run.",
        ),
        (["--config", "recipe.yaml", "--data.temperature", "hot"], "temperature"),
    ],
)
def test_a_bad_flag_is_one_sentence(project, capsys, flags, message):
    (sentence,) = refused(capsys, "fit", *flags)
    assert message in sentence


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["predict", "--run", "run", "--tsk", "act", "--input", "x.csv"], "--task"),
        (["test", "--run", "run", "--splt", "validation"], "--split"),
        (["serve", "--run", "run", "--hots", "0.0.0.0"], "--host"),
    ],
)
def test_a_verbs_unknown_flag_is_told_with_its_own_usage(capsys, arguments, nearest):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: alter {arguments[0]} ")
    assert f"unrecognized arguments: {' '.join(arguments[3:5])}" in said
    assert f"Did you mean '{nearest}'?" in said


def test_a_file_that_is_missing_is_told_once(project, capsys):
    task = yaml.safe_load((project / "tasks" / "sort.yaml").read_text())
    task["source"]["init_args"] |= {"validation": 0.1, "test": 0.1}  # the one file of all splits
    (project / "tasks" / "sort.yaml").write_text(yaml.safe_dump(task))
    (project / "sort.train.jsonl").unlink()
    sentences = refused(capsys, "fit", "--config", "recipe.yaml")
    assert len(sentences) == 1
    assert "sort.train.jsonl: no such file" in sentences[0]


def test_a_file_that_is_not_yaml_names_its_line(project, capsys):
    (project / "recipe.yaml").write_text("run: x\ndata: [\n")
    assert "recipe.yaml, line 3: not valid YAML" in refused(capsys)[0]


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_written(project, capsys):
    fit("--stages", "[stage1]", "--test", "false")
    before = (project / "run" / "model" / "adapters.safetensors").read_bytes()
    change(project, stage2__model__init_args__optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}})
    (project / "run" / "recipe.yaml").unlink()
    sentence = refused(capsys)[0]
    assert "The loss is" in sentence
    assert "Stage2Module" in sentence
    assert "lr" in sentence
    assert (project / "run" / "model" / "adapters.safetensors").read_bytes() == before


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(project, capsys, monkeypatch):
    import errno

    from alter.nn import MTAModel

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MTAModel, "save_pretrained", full)
    assert "The disk is full" in refused(capsys)[0]
    checkpoint = torch.load(project / "run" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]


def test_debug_shows_the_traceback(project):
    from alter.errors import AlterError

    change(project, precision="fp23")
    with pytest.raises(AlterError):
        main(["fit", "--config", "recipe.yaml", "--debug"])


def test_help_names_the_verbs():
    result = subprocess.run([sys.executable, "-m", "alter", "--help"], capture_output=True, text=True, check=True)
    assert "alter fit --config" in result.stdout


def test_stage_two_does_not_repeat_the_draws_of_stage_one(project, monkeypatch):
    drawn = []
    draws = MixtureBatchSampler.draws
    monkeypatch.setattr(MixtureBatchSampler, "draws", lambda self, epoch: drawn.append(epoch) or draws(self, epoch))
    fit("--test", "false", "--stage2.trainer", '{"max_epochs": 3}')
    assert sorted(set(drawn)) == [0, 1, 2, 3, 4]  # two epochs of stage 1, three of stage 2


def test_what_a_start_left_that_trained_nothing_is_not_the_next_ones(project, monkeypatch):
    def failing(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("alter.run.train", failing)
        with pytest.raises(MemoryError):
            fit()
    before = json.loads((project / "run" / "progress.json").read_text())["data"]
    assert set(before["mixture"]) == {"echo", "sort"}
    change(project, data__tasks=["tasks/sort.yaml"], data__examples_per_epoch=10)
    fit("--test", "false")
    known = json.loads((project / "run" / "progress.json").read_text())["data"]
    assert set(known["mixture"]) == {"sort"}
    assert known["draws"] == 10


def test_numbers_of_the_stage_before_are_gone(project):
    fit("--stages", "[stage1]", "--test", "false")
    main(["test", "--run", "run", "--split", "validation"])
    assert (project / "run" / "results.validation.json").is_file()
    fit("--test", "false")
    assert not (project / "run" / "results.validation.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--stage1.model.expert", "alter.nn.Bottleneck"],
        ["--stage1.model.router", "alter.nn.TopK", "--stage1.model.router.k", "1"],
        ["--stage2.model.optimizer", "torch.optim.SGD", "--stage2.model.optimizer.lr", "0.5"],
    ],
)
def test_what_print_config_prints_is_the_recipe_that_runs(project, capsys, flags):
    change(project, stage1__model__init_args__expert={"class_path": "alter.nn.LoRA", "init_args": {"rank": 4}})
    with pytest.raises(SystemExit):
        fit(*flags, "--print_config")
    (project / "printed.yaml").write_text(capsys.readouterr().out)
    assert read_recipe(["--config", "printed.yaml"]).config == read_recipe(["--config", "recipe.yaml", *flags]).config


@pytest.mark.parametrize("variable", ["NODE_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_rank_that_the_environment_gives_to_one_process_is_told(project, capsys, monkeypatch, variable):
    """Else it would train, and leave the writing to a first process that is not there."""
    monkeypatch.setenv(variable, "1")
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml")
    assert (
        f"trainer: it has one process, and the variable {variable}=1 says that this is one of several; unset"
        in sentence
    )
