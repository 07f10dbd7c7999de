"""A task joins a finished run, and leaves it, as a user does it."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

import alter
from alter import growth
from alter.cli import main
from alter.growth import newcomer_arguments
from alter.nn import LoRA
from alter.nn.gates import newcomer_gates
from alter.nn.model import MTAModel
from alter.run_folder import LOCK
from alter.stage_settings import for_tasks
from alter.training import train
from tests.data.conftest import make_words, task_dict
from tests.runs import inside
from tests.test_cli import make_project, refused
from tests.test_report import Page

TEXTS = ["w5 w9", "w7", "w12 w3 w4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the file of a task that is to join."""
    folder = tmp_path_factory.mktemp("finished")
    with inside(folder):
        make_project(folder, make_words(folder / "tokenizer"))
        main(["fit", "--config", "recipe.yaml"])
    task = task_dict(folder, "new", 40, choices=["yes", "no"], metrics=["accuracy"], prompt="w8 {{ text }} :")
    (folder / "new.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def grown(finished, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outputs(run):
    """What users get from the tasks that are there from the start."""
    model = alter.load(run)
    return model.classify(TEXTS, task="sort", return_probs=True), model.generate(TEXTS, task="echo"), model.routing(
        TEXTS[:1], task="sort", answers=["yes"]
    )  # fmt: skip


def trained(run):
    """The tensors of the parts that all tasks were trained with."""
    return {k: v for k, v in load_file(run / "model" / "adapters.safetensors").items() if "newcomers" not in k}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_task_joins_and_leaves_and_the_others_answer_bit_for_bit_the_same(grown, capsys):
    run = grown / "run"
    before, tensors, temperatures = outputs(run), trained(run), alter.load(run).temperatures
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "80"])
    out = capsys.readouterr().out
    assert same(trained(run), tensors)
    classified, generated, routing = outputs(run)
    assert (classified, generated) == before[:2]
    for layer, gates in routing[0]["experts"].items():
        assert gates == {**before[2][0]["experts"][layer], "new": 0.0}

    model = alter.load(run)
    assert model.tasks == ["echo", "sort", "new"]
    assert model.temperatures.items() >= temperatures.items()
    assert model.temperatures.keys() == {"sort", "new"}
    mixed = model.classify([TEXTS[0], TEXTS[0]], task=["new", "sort"], return_probs=True)
    assert mixed[1].probabilities == pytest.approx(classified[0].probabilities, abs=1e-5)
    assert mixed[0].probabilities == pytest.approx(
        model.classify(TEXTS[:1], task="new", return_probs=True)[0].probabilities, abs=1e-5
    )

    results = json.loads((run / "results.json").read_text())["tasks"]
    assert list(results) == ["echo", "sort", "new"]
    assert results["new"]["accuracy"]["n"] == 6
    borrowed = json.loads((run / "added" / "new" / "borrowed.json").read_text())
    assert borrowed["experts"].keys() == {"echo", "sort", "new"}
    assert sum(borrowed["experts"].values()) + borrowed["shared"] == pytest.approx(1)
    own = model.routing(TEXTS[:1], task="new", answers=["yes"])[0]
    for layer, found in borrowed["layers"].items():
        keep = own["shared"][layer]["task experts"]
        assert found["experts"] == pytest.approx({k: keep * share for k, share in own["experts"][layer].items()})
    assert f"{borrowed['experts']['sort']:.1%}  from sort" in out
    assert "newcomers.0.expert" in out  # what trains is told
    assert "\ntraining " in out  # it is no stage of the run
    assert "stage1" not in out

    (grown / "rows.jsonl").write_text('{"text": "w5"}\n')
    main(["predict", "--run", "run", "--task", "new", "--input", "rows.jsonl"])
    assert json.loads(capsys.readouterr().out)["answer"] in ("yes", "no")
    drawn = json.loads((run / "inside.json").read_text())
    main(["test", "--run", "run"])  # all tasks again, with the report
    again = json.loads((run / "inside.json").read_text())
    assert (again["mixture"], again["draws"]) == (drawn["mixture"], drawn["draws"])  # what was trained, without it
    assert list(again["mixture"]) == ["echo", "sort"]
    text = (run / "report.html").read_text()
    added = json.loads((run / "added" / "new" / "progress.json").read_text())
    joined = added["added"]
    assert joined["draws"] == 80
    assert f"new joined later: {joined['trainable_parameters']:,} parameters" in text
    page = Page(text)
    assert "Tasks that joined later" in page.sections
    words = [word for word in page.texts if word.strip()]
    counts = [str(joined[split]) for split in ("train", "validation", "test")]
    own = ["new", "classification", *counts, "80", f"{joined['validation_loss']:.3f}"]
    assert own in [words[place : place + len(own)] for place in range(len(words))]
    assert {f"{joined['trainable_parameters']:,}", f"{joined['tokens']:,}", "new, training", "new, test"} <= set(words)
    assert (run / "report" / "added_new.png").is_file()
    assert set(json.loads((run / "results.json").read_text())["tasks"]) == {"echo", "sort", "new"}

    main(["remove-task", "--run", "run", "--task", "new"])
    assert "new is gone" in capsys.readouterr().out
    assert same(load_file(run / "model" / "adapters.safetensors"), tensors)
    assert outputs(run) == before
    assert not (run / "added" / "new").exists()
    assert list(json.loads((run / "results.json").read_text())["tasks"]) == ["echo", "sort"]

    main(["remove-task", "--run", "run", "--task", "echo"])
    out = capsys.readouterr().out
    assert "Its expert stays" in out
    assert "sort " in out
    model = alter.load(run)
    assert model.tasks == ["sort"]
    assert model.classify(TEXTS, task="sort", return_probs=True) == before[0]
    assert refused(capsys, "predict", "--run", "run", "--task", "echo", "--input", "-")
    assert refused(capsys, "remove-task", "--run", "run", "--task", "sort")
    main(["export", "--run", "run", "--stage", "stage1", "--out", "plain"])  # that model still has both
    assert [folder.name for folder in Path("plain").iterdir()] == ["sort"]
    main(["test", "--run", "run"])
    assert list(json.loads((run / "results.json").read_text())["tasks"]) == ["sort"]


def test_a_removed_task_comes_back_as_a_newcomer(grown, capsys):
    run = grown / "run"
    before, tensors = outputs(run), trained(run)
    add = ["add-task", "--run", "run", "--task", "tasks/echo.yaml", "--draws", "40"]
    assert "has a task 'echo' already" in " ".join(refused(capsys, *add))
    main(["remove-task", "--run", "run", "--task", "echo"])
    main(add)
    assert "from echo (removed)" in capsys.readouterr().out
    model = alter.load(run)
    assert model.tasks == ["sort", "echo"]
    assert same(trained(run), tensors)
    assert model.classify(TEXTS, task="sort", return_probs=True) == before[0]
    assert alter.load(run, stage="stage1").tasks == ["sort"]  # its echo is another
    assert "it is one of sort." in " ".join(
        refused(capsys, "export", "--run", "run", "--stage", "stage1", "--task", "echo")
    )
    assert "has a task 'echo' already" in " ".join(refused(capsys, *add))
    main(["test", "--run", "run"])
    assert list(json.loads((run / "results.json").read_text())["tasks"]) == ["sort", "echo"]
    main(["remove-task", "--run", "run", "--task", "sort"])
    (sentence,) = refused(capsys, "export", "--run", "run", "--stage", "stage1")
    assert sentence.endswith("all tasks of this model were removed from the run; leave the stage out.")


def test_a_run_is_used_from_another_folder_and_with_its_backbone_elsewhere(grown, capsys, monkeypatch):
    shutil.rmtree("run")
    shutil.copytree("backbone", "kept")
    main(["fit", "--config", "recipe.yaml", "--run", "run"])
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["backbone"] == str(grown / "backbone")
    answers = alter.load("run").generate(TEXTS, task="echo")
    main(["fit", "--config", "recipe.yaml", "--run", "run"])  # the same recipe still, though it says it otherwise
    change_recipe(grown / "run", backbone="backbone")  # as runs said it before
    main(["fit", "--config", "recipe.yaml", "--run", "run"])
    whole = Path("run/recipe.yaml").read_text()
    Path("run/recipe.yaml").write_text("")  # damaged
    assert "was started with another recipe" in refused(capsys, "fit", "--config", "recipe.yaml", "--run", "run")[0]
    Path("run/recipe.yaml").write_text(whole)
    elsewhere = grown / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run, new = str(grown / "run"), str(grown / "new.yaml")
    assert alter.load(run).generate(TEXTS, task="echo") == answers
    main(["test", "--run", run])
    main(["add-task", "--run", run, "--task", new, "--draws", "20"])
    main(["remove-task", "--run", run, "--task", "new"])

    (grown / "backbone").rename(grown / "moved")
    moved = ["--backbone", str(grown / "moved")]
    test, add = ["test", "--run", run], ["add-task", "--run", run, "--task", new, "--draws", "20"]
    assert "--draws: 0 is below 1" in refused(capsys, *add[:-1], "0", *moved)[0]
    for command in (test, add, ["remove-task", "--run", run, "--task", "echo"]):
        assert f"there is no folder {grown / 'backbone'}; name one" in refused(capsys, *command)[0]
        assert "by --backbone" in refused(capsys, *command)[0]
    main([*test, *moved])
    main([*test, "--no-task-id", *moved])
    main([*add, "--consolidate", *moved])
    assert alter.load(run).tasks == ["echo", "sort", "new"]  # the run's model names it now
    main(["remove-task", "--run", run, "--task", "new", "--backbone", "../kept"])
    assert alter.load(run).model.tasks == ["echo", "sort"]
    assert json.loads((grown / "run/model/alter.json").read_text())["backbone"]["name"] == str(grown / "kept")


def test_a_grown_run_is_not_trained_over(finished, grown, capsys):
    recipe = Path("run/recipe.yaml")
    text = recipe.read_text()
    for name in ("backbone", "tasks"):  # as if it had been trained here
        text = text.replace(str(finished / name), str(grown / name))
    recipe.write_text(text)
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "20"])
    grows = "alter: run/recipe.yaml: tasks have joined or left this run since it was trained, so it is no longer the recipe's"
    (sentence,) = refused(capsys)
    assert sentence.startswith(grows)
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", "--data.temperature", "3")
    assert sentence.startswith(grows)
    main(["remove-task", "--run", "run", "--task", "new"])
    main(["fit", "--config", "recipe.yaml"])  # it is the recipe's again
    assert "another recipe (it differs in data.temperature)" in " ".join(
        refused(capsys, "fit", "--config", "recipe.yaml", "--data.temperature", "3")
    )
    main(["remove-task", "--run", "run", "--task", "echo"])
    (sentence,) = refused(capsys)
    assert sentence.startswith(grows)
    model = Path("run/model/adapters.safetensors").read_bytes()
    main(["fit", "--config", "run/recipe.yaml"])  # its own, as it is now: all is finished
    assert Path("run/model/adapters.safetensors").read_bytes() == model


def test_a_newcomer_starts_as_strong_as_an_adapter_alone(grown):
    """What its expert adds, times its shares of the mixture, is what the run's expert adds by itself."""
    content = yaml.safe_load(Path("run/recipe.yaml").read_text())
    given = newcomer_arguments(Path("run"), content, "new", Path(content["backbone"]), 40, None)["model"]["init_args"]
    alone = content["stage1"]["model"]["init_args"]["expert"]["init_args"]
    assert given["expert"]["init_args"]["rank"] == alone["rank"]
    model = MTAModel.from_pretrained(Path("run/model"), content["backbone"], "fp32")
    model.add_newcomer("new", LoRA(**given["expert"]["init_args"]), given["own"], given["keep"])
    shares = newcomer_gates(model, 0)
    for layer, mixture in model.layers.items():
        expert = mixture.newcomers[0].expert
        weight = float(shares["experts"][layer][-1] * shares["shared"][layer][0])
        assert weight * expert.alpha / expert.rank == pytest.approx((alone["alpha"] or alone["rank"]) / alone["rank"])


def test_an_addition_that_was_stopped_goes_on_and_ends_the_same(grown, monkeypatch):
    shutil.copytree("run", "other")
    main(["add-task", "--run", "other", "--task", "new.yaml", "--shots", "8", "--draws", "200"])
    from alter.stages import AddTaskModule

    step = AddTaskModule.training_step

    def stopped(self, batch, index):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(AddTaskModule, "training_step", stopped)
    with pytest.raises(SystemExit):
        main(["add-task", "--run", "run", "--task", "new.yaml", "--shots", "8", "--draws", "200"])
    monkeypatch.setattr(AddTaskModule, "training_step", step)
    assert alter.load("run").tasks == ["echo", "sort"]
    main(["add-task", "--run", "run", "--task", "new.yaml", "--shots", "8", "--draws", "200"])
    one, other = (load_file(f"{run}/model/adapters.safetensors") for run in ("run", "other"))
    assert same(one, other)


def test_an_addition_that_was_stopped_does_not_undo_what_happened_to_the_run_meanwhile(grown, capsys, monkeypatch):
    from alter.stages import AddTaskModule

    step = AddTaskModule.training_step

    def stopped(self, batch, index):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, index)

    add = ["add-task", "--run", "run", "--task", "new.yaml", "--draws", "200"]
    with monkeypatch.context() as patch:
        patch.setattr(AddTaskModule, "training_step", stopped)
        with pytest.raises(SystemExit):
            main(add)
    main(["remove-task", "--run", "run", "--task", "sort", "--consolidate"])
    consolidated = load_file("run/model/adapters.safetensors")
    assert "begun with another model of the run" in " ".join(refused(capsys, *add))
    assert same(load_file("run/model/adapters.safetensors"), consolidated)
    shutil.rmtree("run/added/new")
    main(add)
    assert alter.load("run").tasks == ["echo", "new"]


def test_a_newcomer_draws_what_each_first_task_did_in_stage_one(grown):
    change_recipe(  # a run whose length stands with its stages
        grown / "run",
        trainer__max_epochs=None,
        stage1__trainer={"max_epochs": 3},
        stage2__trainer={"max_epochs": 1},
        data__examples_per_epoch=20,
    )
    for name in ("new", "newer"):
        (grown / f"{name}.yaml").write_text((grown / "new.yaml").read_text().replace("name: new", f"name: {name}"))
        main(["add-task", "--run", "run", "--task", f"{name}.yaml"])
        assert json.loads((grown / "run" / "added" / name / "progress.json").read_text())["added"]["tokens"] > 0
    content = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert growth._drawn(Path("run"), content, None) == {
        "examples_per_epoch": 30
    }  # 3 epochs of 20, over two first tasks


def test_an_addition_that_was_stopped_after_it_joined_is_tested_by_the_same_command(grown, capsys, monkeypatch):
    add = ["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"]

    stopped_at(monkeypatch, "calibrate", add)
    assert alter.load("run").tasks == ["echo", "sort", "new"]  # it had joined
    before = load_file("run/model/adapters.safetensors")
    assert "lr" in " ".join(refused(capsys, *add, "--lr", "0.5"))  # what it was begun with
    main(add)
    assert same(before, load_file("run/model/adapters.safetensors"))
    assert alter.load("run").temperatures.keys() == {"sort", "new"}
    assert "new" in json.loads(Path("run/results.json").read_text())["tasks"]
    assert Path("run/added/new/borrowed.json").is_file()
    assert "has a task 'new' already" in " ".join(refused(capsys, *add))


def change_recipe(run, **changes):
    """As if the run had been trained so; a key's dots lead into sections."""
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))


def test_consolidation_trains_stage_two_for_all_and_tests_all(grown, capsys, monkeypatch):
    change_recipe(  # a run that several processes trained: growth takes one
        grown / "run",
        trainer__devices=2,
        trainer__strategy="ddp",
        stage1__model__init_args__gradient_checkpointing=True,
        stage2__model__init_args__schedule="constant",
    )
    seen = []
    monkeypatch.setattr(
        growth, "train", lambda folder, given, *rest: seen.append(given["model"]) or train(folder, given, *rest)
    )
    before = trained(grown / "run")
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40", "--consolidate"])
    after = trained(grown / "run")
    assert moved(before, after) == {"shared", "shared_router"}  # stage 2's task_expert_lr is 0
    results = json.loads((grown / "run" / "results.json").read_text())["tasks"]
    assert list(results) == ["echo", "sort", "new"]
    joins, shares = (given["init_args"] for given in seen)
    assert joins["gradient_checkpointing"] and "schedule" not in joins  # noqa: PT018
    assert shares["schedule"] == "constant"
    assert refused(capsys, "add-task", "--run", "run", "--task", "new.yaml") == [
        "alter: new.yaml: the run has a task 'new' already; give the new one another name."
    ]


def moved(before, after):
    """The parts of which a tensor has changed."""
    assert before.keys() == after.keys()
    return {key.split(".mlp.")[1].split(".")[0] for key in before if not torch.equal(before[key], after[key])}


def test_removal_with_consolidation_trains_stage_two_for_those_that_are_left(grown, capsys):
    before = trained(grown / "run")
    main(["remove-task", "--run", "run", "--task", "echo", "--consolidate"])
    assert "stage 2 again, for all tasks" in capsys.readouterr().out
    assert moved(before, trained(grown / "run")) == {"shared", "shared_router"}
    assert list(json.loads((grown / "run" / "results.json").read_text())["tasks"]) == ["sort"]
    assert alter.load("run").tasks == ["sort"]
    assert not list((grown / "run" / "added").glob("consolidated*"))  # nothing is left of the way there


def stopped_at(monkeypatch, step, command):
    """Runs a command that is stopped where it comes to a function of ``growth``."""

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(growth, step, stopped)
        with pytest.raises(SystemExit):
            main(command)


def stopped_while_it_consolidates(monkeypatch, command):
    """Runs a command that is stopped at the consolidation's third step."""
    from alter.stages import ConsolidateModule

    step = ConsolidateModule.training_step

    def stopped(self, batch, index):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(ConsolidateModule, "training_step", stopped)
        with pytest.raises(SystemExit):
            main(command)


def test_consolidation_that_was_stopped_goes_on_and_ends_the_same(grown, monkeypatch):
    add = ["add-task", "--task", "new.yaml", "--draws", "40", "--consolidate", "--run"]
    shutil.copytree("run", "other")
    main([*add, "other"])
    stopped_while_it_consolidates(monkeypatch, [*add, "run"])
    assert alter.load("run").tasks == ["echo", "sort", "new"]  # it had joined
    main([*add, "run"])
    one, other = (load_file(f"{run}/model/adapters.safetensors") for run in ("run", "other"))
    assert same(one, other)


def test_consolidation_that_was_stopped_while_it_is_tested_trains_nothing_twice(grown, monkeypatch):
    add = ["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40", "--consolidate"]

    stopped_at(monkeypatch, "measure", add)
    before = load_file("run/model/adapters.safetensors")
    main(add)
    assert same(before, load_file("run/model/adapters.safetensors"))
    assert list(json.loads(Path("run/results.json").read_text())["tasks"]) == ["echo", "sort", "new"]
    assert not list(Path("run/added").glob(".consolidated-*"))


def test_a_task_that_learned_from_few_rows_is_consolidated_on_these(grown, monkeypatch):
    seen = []
    monkeypatch.setattr(
        growth, "train", lambda folder, given, data, *rest: seen.append(data.sizes) or train(folder, given, data, *rest)
    )
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40", "--shots", "2", "--consolidate"])
    joined, together = seen
    assert joined == [4]  # two of each of two classes
    assert together[-1] == 4
    assert together[0] > 4


def test_an_addition_joins_the_task_predictor_once_however_often_it_was_stopped(grown, monkeypatch):
    add = ["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"]

    stopped_at(monkeypatch, "evaluate", add)
    before = [(kind.task, kind) for kind in alter.load("run").task_predictor.kinds]
    assert any(task == "new" for task, _ in before)
    main(add)
    assert [(kind.task, kind) for kind in alter.load("run").task_predictor.kinds] == before


@pytest.mark.parametrize(
    "trainer",
    [{"limit_train_batches": 0.25}, {"val_check_interval": 2, "check_val_every_n_epoch": None}, {"max_steps": 3}],
)
def test_a_newcomer_draws_what_it_is_told_however_the_runs_stages_were_cut(grown, trainer):
    change_recipe(grown / "run", **{f"trainer__{key}": value for key, value in trainer.items()})
    shutil.copytree("run", "other")
    change_recipe(
        grown / "other", **dict.fromkeys((f"trainer__{key}" for key in trainer if key != "val_check_interval"), None)
    )
    counted = []
    for run in ("run", "other"):
        main(["add-task", "--run", run, "--task", "new.yaml", "--draws", "80"])
        counted.append(json.loads(Path(run, "added/new/progress.json").read_text())["added"]["tokens"])
    assert counted[0] == counted[1]


def test_a_run_whose_first_tasks_have_all_left_is_tested(grown):
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    for task in ("echo", "sort"):
        main(["remove-task", "--run", "run", "--task", task])
    main(["test", "--run", "run"])
    assert list(json.loads(Path("run/results.json").read_text())["tasks"]) == ["new"]


def test_a_removals_consolidation_that_was_stopped_goes_on(grown, capsys, monkeypatch):
    remove = ["remove-task", "--run", "run", "--task", "echo", "--consolidate"]
    stopped_while_it_consolidates(monkeypatch, remove)
    before = trained(grown / "run")
    assert alter.load("run").tasks == ["sort"]  # it had gone
    main(remove)
    assert moved(before, trained(grown / "run")) == {"shared", "shared_router"}
    assert "there is no task 'echo'" in " ".join(refused(capsys, *remove))


def test_a_consolidation_of_another_model_is_not_gone_on_with(grown, capsys, monkeypatch):
    """A task that left meanwhile and one of its name that came are not what it was begun with."""
    add = ["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"]
    stopped_while_it_consolidates(monkeypatch, [*add, "--consolidate"])
    assert list((grown / "run" / "added").glob(".consolidated-*"))
    name = next(name for name in alter.load("run").tasks if name not in ("sort", "echo"))
    main(["remove-task", "--run", "run", "--task", name])
    assert not list((grown / "run" / "added").glob(".consolidated-*"))


@pytest.mark.parametrize("step", ["_change_results", "write_text"])  # the model is without it, the recipe not yet
@pytest.mark.parametrize("task", ["echo", "new"])
def test_a_removal_that_was_stopped_goes_on(grown, capsys, monkeypatch, task, step):
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    stopped_at(monkeypatch, step, ["remove-task", "--run", "run", "--task", task])
    after = trained(grown / "run")
    left = [name for name in ("echo", "sort", "new") if name != task]
    assert alter.load("run").tasks == left
    main(["remove-task", "--run", "run", "--task", task])
    assert same(after, trained(grown / "run"))
    assert alter.load("run").tasks == left
    assert [own["name"] for own in yaml.safe_load(Path("run/recipe.yaml").read_text())["data"]["tasks"]] == left
    assert list(json.loads(Path("run/results.json").read_text())["tasks"]) == left
    assert Path("run/added/new").exists() == (task != "new")
    assert f"there is no task '{task}'" in " ".join(refused(capsys, "remove-task", "--run", "run", "--task", task))


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_model_is_whole_whenever_its_replacing_is_stopped(grown, monkeypatch, moment):
    renamed, rename = [], Path.rename

    def stops(self, target):
        if self.parent == Path("run"):
            if len(renamed) == moment:
                raise KeyboardInterrupt
            renamed.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stops)
        with pytest.raises(SystemExit) if moment < 2 else nullcontext():
            main(["remove-task", "--run", "run", "--task", "echo"])
    if moment < 2:
        main(["remove-task", "--run", "run", "--task", "echo"])
    assert alter.load("run").tasks == ["sort"]
    assert not list(Path("run").glob(".model*"))


def test_what_cannot_be_added_is_one_sentence(grown, capsys):
    (grown / "bad.yaml").write_text("name: [")
    shutil.copytree("run", "copy")
    shutil.rmtree("copy/model")
    alter.load("run").save_pretrained("hub")
    for arguments, message in [
        (["--run", "run", "--task", "bad.yaml"], "bad.yaml"),
        (["--run", "run", "--task", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--run", "none", "--task", "new.yaml"], "no run here"),
        (["--run", "copy", "--task", "new.yaml"], "no model here"),
        (["--run", "hub", "--task", "new.yaml"], "name the run folder itself"),
        (["--run", "run", "--task", "new.yaml", "--shots", "0"], "--shots: 0 is below 1"),
    ]:
        (sentence,) = refused(capsys, "add-task", *arguments)
        assert message in sentence
    (sentence,) = refused(capsys, "remove-task", "--run", "run", "--task", "snort")
    assert "Did you mean 'sort'?" in sentence
    assert outputs(grown / "run")


def test_a_newcomer_is_chosen_by_its_own_validation_where_the_run_watched_one_of_its_tasks(grown):
    watching = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/loss/sort"}},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss/echo"}},
    ]
    change_recipe(grown / "run", trainer__callbacks=watching)
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    known = json.loads(Path("run/added/new/progress.json").read_text())["added"]
    assert known["best"]["metric"] == "val/loss"
    assert known["best"]["value"] == known["validation_loss"] > 0


def test_a_newcomer_trains_as_stage_1_says(grown):
    own = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 4, "precision": "bf16-mixed", "max_steps": 3}
    change_recipe(grown / "run", stage1__trainer=own, trainer__devices=2)
    content = yaml.safe_load(Path("run/recipe.yaml").read_text())
    trainer = newcomer_arguments(Path("run"), content, "new", Path(content["backbone"]), 40, None)["trainer"]
    assert {key: trainer[key] for key in own} == {**own, "max_steps": -1}  # its length is its own
    assert trainer["devices"] == 1


def test_a_newcomer_is_scaled_for_the_runs_model_whatever_stages_its_recipe_first_named(grown):
    content = yaml.safe_load(Path("run/recipe.yaml").read_text())
    scales = []
    for stages in (["stage1", "stage2"], ["stage1"]):
        asked = Path("run"), {**content, "stages": stages}, "new", Path(content["backbone"]), 40, None
        scales.append(newcomer_arguments(*asked)["model"]["init_args"]["expert"]["init_args"]["alpha"])
    assert scales[0] == scales[1]


def test_what_was_measured_beside_the_test_is_gone_when_the_tasks_change(grown):
    main(["test", "--run", "run", "--split", "validation"])
    assert Path("run/results.validation.json").is_file()
    main(["remove-task", "--run", "run", "--task", "echo"])
    assert not Path("run/results.validation.json").exists()
    assert list(json.loads(Path("run/results.json").read_text())["tasks"]) == ["sort"]


def test_only_callbacks_of_the_tasks_that_train_are_kept():
    def watch(metric):
        return {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": metric}}

    metrics = ["val/loss", "val/loss/sort", "val/accuracy/echo", "val/loss/loss"]
    trainer = {"callbacks": [*map(watch, metrics), "lightning.pytorch.callbacks.Timer"], "max_epochs": 3}
    kept = for_tasks(trainer, ["sort"])
    assert kept == {"callbacks": [watch("val/loss"), watch("val/loss/sort"), trainer["callbacks"][-1]], "max_epochs": 3}
    assert for_tasks({"callbacks": watch("val/loss/echo")}, ["sort"]) == {"callbacks": []}
    assert for_tasks({"callbacks": watch("val/loss")}, ["loss"]) == {"callbacks": watch("val/loss")}
    assert for_tasks({"callbacks": watch("val/recall[n/a]/sort")}, ["sort"]) == {
        "callbacks": watch("val/recall[n/a]/sort")
    }
    assert for_tasks({}, ["sort"]) == {}


def test_a_consolidation_goes_by_the_tasks_that_are_left(grown):
    watching_removed = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val/loss/echo"},
    }
    change_recipe(grown / "run", trainer__callbacks=[watching_removed])
    main(["remove-task", "--run", "run", "--task", "echo", "--consolidate"])
    assert list(json.loads(Path("run/results.json").read_text())["tasks"]) == ["sort"]


def test_a_task_may_be_called_what_consolidations_are(grown):
    (grown / "new.yaml").write_text((grown / "new.yaml").read_text().replace("name: new", "name: consolidated-claims"))
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    assert alter.load("run").tasks == ["echo", "sort", "consolidated-claims"]


def test_few_rows_of_the_first_tasks_leave_a_newcomer_all_of_its_own(grown):
    change_recipe(grown / "run", data__shots=2)
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    content = yaml.safe_load(Path("run/recipe.yaml").read_text())["data"]
    assert {task["name"]: task.get("shots") for task in content["tasks"]} == {"echo": 2, "sort": 2, "new": None}
    assert content["shots"] is None
    main(["test", "--run", "run"])
    data = growth._data(content, Path("backbone"))
    assert {task.name: len(data.examples(task.name, "train")) for task in data.tasks} == {
        "echo": 2,
        "sort": 4,
        "new": 40,
    }


def test_a_resumed_addition_keeps_what_the_run_was_calibrated_with_meanwhile(grown, monkeypatch):
    for file in ("calibration.json", "task_predictor.safetensors"):
        Path("run/model", file).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(growth, "_join", stopped)
        with pytest.raises(KeyboardInterrupt):
            growth.add_task(Path("run"), Path("new.yaml"), draws=40)
    main(["test", "--run", "run"])
    assert alter.load("run").temperatures.keys() == {"sort"}
    main(["add-task", "--run", "run", "--task", "new.yaml", "--draws", "40"])
    model = alter.load("run")
    assert model.temperatures.keys() == {"sort", "new"}
    assert model.task_predictor is not None


def stopped(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_removal_that_is_stopped_before_its_consolidation_trains_goes_on_with_it(grown, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(growth, "_data", stopped)
        with pytest.raises(KeyboardInterrupt):
            growth.remove_task(Path("run"), "echo", consolidate=True)
    before = Path("run/model/adapters.safetensors").read_bytes()
    main(["remove-task", "--run", "run", "--task", "echo", "--consolidate"])
    assert Path("run/model/adapters.safetensors").read_bytes() != before
    assert not list(Path("run/added").glob(".consolidated-*"))


def test_a_stage_does_not_train_over_a_task_that_left_and_came_back(grown, capsys):
    main(["fit", "--config", "recipe.yaml", "--run", "one", "--stages", "[stage1]", "--test", "false"])
    main(["remove-task", "--run", "one", "--task", "sort"])
    main(["add-task", "--run", "one", "--task", "tasks/sort.yaml", "--draws", "40"])
    before = Path("one/model/adapters.safetensors").read_bytes()
    (sentence,) = refused(capsys, "fit", "--config", "recipe.yaml", "--run", "one")
    assert "tasks have joined or left this run" in sentence
    assert Path("one/model/adapters.safetensors").read_bytes() == before


def test_a_run_is_not_tested_while_it_changes(grown, capsys, monkeypatch):
    monkeypatch.setattr("alter.run_folder.PATIENCE", 0.1)
    with FileLock(Path("run", LOCK)):
        (sentence,) = refused(capsys, "test", "--run", "run")
    assert "another process is changing this run" in sentence
