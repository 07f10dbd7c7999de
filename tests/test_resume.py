"""A run that is stopped anywhere and started again ends as one that was not: adapters and logs bit for bit."""

import json
import shutil

import pytest
import yaml
from lightning import Callback
from safetensors.torch import load_file, save_file

from alter.callbacks import Interruption
from alter.checkpoints import CheckedCheckpoints
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import KEEPER, change, fit, project, refused, template  # noqa: F401 (a fixture)


def adapters(run):
    return (run / "model" / "adapters.safetensors").read_bytes()


def logs(run):
    return {file.parent.name: file.read_text() for file in sorted(run.glob("stage*/metrics.csv"))}


def ends_as(run, whole):
    """Asserts that two runs have the same adapters, logs and counts of tokens."""
    assert logs(run) == logs(whole)
    theirs, ours = (load_file(r / "model" / "adapters.safetensors") for r in (whole, run))
    assert {key: value.tolist() for key, value in ours.items()} == {
        key: value.tolist() for key, value in theirs.items()
    }
    assert adapters(run) == adapters(whole)
    counted = [
        {
            stage: (facts["tokens"], facts["validation_loss"])
            for stage, facts in json.loads(text).items()
            if "tokens" in facts
        }
        for text in ((r / "progress.json").read_text() for r in (run, whole))
    ]
    assert counted[0] == counted[1]


SETTINGS = {
    "a step in parts, validated between them": {
        "trainer__accumulate_grad_batches": 2,
        "trainer__val_check_interval": 3,
    },
    "workers, and epochs that are cut": {
        "data__num_workers": 2,
        "stage1__trainer": {"limit_train_batches": 0.5},
        "trainer__max_epochs": 3,
    },
    "a router with noise, validated by the clock's epochs": {
        "stage1__model__init_args__router": template("TopK", k=1, noise=0.5, load_balance=0.1),
    },
    "a checkpoint every other step, of the user's own": {
        "trainer__callbacks": [
            {"class_path": KEEPER, "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "save_last": True}},
        ],
        "trainer__accumulate_grad_batches": 2,
        "trainer__val_check_interval": 6,
    },
    "checkpoints that are nowhere called last": {
        "trainer__callbacks": [
            {"class_path": KEEPER, "init_args": {"monitor": "val/loss", "filename": "{epoch}-{step}", "save_top_k": -1}},
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2}},
        ],
        "trainer__val_check_interval": 2,
        "trainer__accumulate_grad_batches": 3,
    },
    "checkpoints beside the usual ones, which choose": {
        "trainer__callbacks": [
            {"class_path": KEEPER, "init_args": {"filename": "{epoch}-{step}", "save_top_k": -1}},
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2}},
        ],
        "trainer__val_check_interval": 2,
        "trainer__accumulate_grad_batches": 3,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_left_before_each_checkpoint_is_written_goes_on_to_the_same_end(project, monkeypatch, name):  # noqa: F811
    change(project, data__examples_per_epoch=60, data__max_tokens=48, **SETTINGS[name])
    flags = ("--run", "run", "--test", "false", "--stages", "[stage1]")
    saved, found = CheckedCheckpoints.save_checkpoint, []

    def copy_first(self, checkpoint, path, storage_options=None):
        folder = project / "found" / str(len(found))
        if (project / "run").exists():
            shutil.copytree(project / "run", folder / "run")
        found.append(folder)
        saved(self, checkpoint, path, storage_options)

    with monkeypatch.context() as patched:
        patched.setattr(CheckedCheckpoints, "save_checkpoint", copy_first)
        fit(*flags)
    assert len(found) > 3
    (project / "run").rename(project / "whole")
    assert len(logs(project / "whole")["stage1"].splitlines()) > 20
    for folder in found:
        shutil.rmtree(project / "run", ignore_errors=True)
        shutil.copytree(folder, project, dirs_exist_ok=True)
        fit(*flags)
        ends_as(project / "run", project / "whole")


STOPPER = "lightning.pytorch.callbacks.EarlyStopping"


def test_what_early_stopping_has_ended_does_not_go_on(project):  # noqa: F811
    stopper = {"class_path": STOPPER, "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 9.0}}
    change(
        project,
        data__examples_per_epoch=60,
        data__max_tokens=48,
        trainer__val_check_interval=2,
        trainer__callbacks=[stopper],
    )
    fit("--run", "whole", "--test", "false", "--stages", "[stage1]")
    assert len(logs(project / "whole")["stage1"].splitlines()) < 40  # not to its end
    shutil.copytree(project / "whole", project / "run")
    (project / "run" / "progress.json").unlink()  # killed before it was noted
    shutil.rmtree(project / "run" / "stage1" / "model")
    shutil.rmtree(project / "run" / "model")
    fit("--run", "run", "--test", "false", "--stages", "[stage1]")
    ends_as(project / "run", project / "whole")


class StopsAtSix(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 6


@pytest.mark.parametrize(
    "end",
    [
        {"trainer__max_epochs": -1, "trainer__max_steps": 6},
        {"trainer__max_epochs": 9, "trainer__callbacks": ["tests.test_resume.StopsAtSix"]},
    ],
    ids=["max_steps", "callback"],
)
def test_ctrl_c_in_the_last_step_leaves_no_validation_out(project, monkeypatch, end):  # noqa: F811
    change(project, data__max_tokens=48, trainer__val_check_interval=2, **end)
    flags = ("--test", "false", "--stages", "[stage1]")
    fit("--run", "whole", *flags)
    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "_any_asked", lambda self, trainer: trainer.global_step == 6)
        with pytest.raises(SystemExit):
            fit("--run", "run", *flags)
    fit("--run", "run", *flags)
    ends_as(project / "run", project / "whole")


def with_files_beside_the_tasks(project):  # noqa: F811
    """Has the task files name their data as users do, from their own folder."""
    for file in (project / "tasks").glob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        files = task["source"]["init_args"]
        files.update({split: f"../{place.rsplit('/', 1)[-1]}" for split, place in files.items()})
        file.write_text(yaml.safe_dump(task))


def test_a_project_that_moves_in_the_middle_of_a_run_goes_on_to_the_same_end(project, monkeypatch):  # noqa: F811
    with_files_beside_the_tasks(project)
    change(project, data__examples_per_epoch=40, trainer__val_check_interval=2)
    saved, moved = CheckedCheckpoints.save_checkpoint, project.parent / f"{project.name}-moved"

    def move_in_stage2(self, checkpoint, path, storage_options=None):
        saved(self, checkpoint, path, storage_options)
        if "stage2" in str(path) and not moved.exists():
            shutil.copytree(project, moved)

    with monkeypatch.context() as patched:
        patched.setattr(CheckedCheckpoints, "save_checkpoint", move_in_stage2)
        fit()
    whole = project / "whole"
    (project / "run").rename(whole)
    shutil.rmtree(project / "backbone")  # nothing may be read from where it was
    for file in project.glob("*.jsonl"):
        file.unlink()
    monkeypatch.chdir(moved)
    (moved / "backbone").rename(moved / "elsewhere")
    fit("--backbone", "elsewhere")
    ends_as(moved / "run", whole)
    assert json.loads((moved / "run" / "results.json").read_text())["tasks"] == json.loads(
        (whole / "results.json").read_text()
    )["tasks"]  # fmt: skip
    kept = (moved / "run" / "recipe.yaml").read_text()
    assert str(moved / "elsewhere") in kept
    assert f"{project}/" not in kept.replace(f"{moved}/", "")


def test_a_finished_run_keeps_to_its_recipe_though_its_checkpoints_are_removed(project, capsys):  # noqa: F811
    fit("--test", "false", "--stages", "[stage1]")
    shutil.rmtree(project / "run" / "stage1" / "checkpoints")
    kept = (project / "run" / "recipe.yaml").read_text()
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", "--data.temperature", "9")
    assert "started with another recipe (it differs in data.temperature)" in sentence
    assert (project / "run" / "recipe.yaml").read_text() == kept


def test_a_run_folder_that_is_a_file_is_one_sentence(project, capsys):  # noqa: F811
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", "--run", "recipe.yaml")
    assert "recipe.yaml: the run folder cannot be made (File exists); name another by --run." in sentence


def test_a_run_may_be_named_from_home(project, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(project / "home"))
    fit("--test", "false", "--stages", "[stage1]", "--run", "~/run", "--data.cache_dir", "~/cache")
    assert (project / "home" / "run" / "model").is_dir()
    assert (project / "home" / "cache").is_dir()
    assert not (project / "~").exists()


def test_a_run_is_refused_another_backbone(project, capsys):  # noqa: F811
    fit("--test", "false", "--stages", "[stage1]")
    shutil.copytree(project / "backbone", project / "other")
    weights = project / "other" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", "--backbone", "other")
    assert "started with another recipe (it differs in backbone)" in sentence
    shutil.copytree(project / "backbone", project / "same")
    fit("--test", "false", "--backbone", "same")
    assert str(project / "same") in (project / "run" / "recipe.yaml").read_text()
