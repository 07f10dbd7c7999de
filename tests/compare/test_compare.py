"""`alter compare` as a user calls it, on a tiny backbone."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from alter.cli import main
from alter.compare.cell import _measure
from alter.compare.cell import _write_answers as write_answers
from alter.compare.grid import Grid, Planner, run_grid
from alter.compare.grid import _plan as plan_cell
from alter.compare.methods import METHODS, Budget, find_method
from alter.compare.summary import Answers
from alter.data import Task
from alter.data.draw import draw_shots
from alter.errors import AlterError
from alter.home import alter_home
from alter.nn.backbone import backbone_fingerprint, resolve_backbone
from alter.recipe import read_recipe
from alter.run import fit
from alter.run_folder import stage_records
from alter.stage_settings import stage_trainer
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project, refused  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("warm")
pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _children_find_the_package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def compared(project):  # noqa: F811
    """The project, with a length that can be shared out."""
    change(project, trainer__max_epochs=1, stage2__trainer={"limit_train_batches": 0.5})
    return project


def compare(*arguments):
    main(["compare", "--config", "recipe.yaml", "--out", "out", *arguments])
    return json.loads(Path("out/compare.json").read_text())


HERE = [name for name in METHODS if name != "adapter_fusion"]  # whose environment has tests of its own
SOME = ["untouched", "full", "alone", "peft_poly", "one_stage", "two_stage", "mtl_lora", "description"]


@pytest.mark.slow
@pytest.mark.parametrize(("project", "methods"), [("llama", HERE), ("t5", SOME)], indirect=["project"])
def test_every_method_runs_through_the_same_data_and_budget(compared, methods, cells_here, capsys):
    result = compare("--methods", ",".join(methods), "--seeds", "1")
    assert list(result["methods"]) == list(methods)
    budget = result["parameter_budget"]
    tokens = result["methods"]["two_stage"]["tokens"]
    for name, method in result["methods"].items():
        assert set(method["tasks"]) == {"echo", "sort"}
        assert set(method["tasks"]["sort"]["accuracy"]) == {"mean", "sd", "seeds"}
        assert set(method["average"]) == {"mean", "sd"}
        if name == "untouched":
            assert method["trainable_parameters"] == method["tokens"] == 0
            continue
        assert method["tokens"] == pytest.approx(tokens, rel=0.15), name  # 135 rows in all, drawn anew
        assert method["tokens_per_second"] > 0
        assert method["peak_memory_bytes"] > 10**8
        if name != "full":
            assert method["trainable_parameters"] == pytest.approx(budget, rel=0.25), name  # steps of one rank
    backbone = result["backbone"]
    assert backbone["fingerprint"] == backbone_fingerprint(resolve_backbone(backbone["name"]))
    assert backbone["parameters"] == result["methods"]["full"]["trainable_parameters"]
    best = result["best_baseline"]
    assert METHODS[best].baseline
    assert result["methods"][best]["vs_best_baseline"] == {"difference": 0, "low": 0, "high": 0, "p": 1}
    assert result["methods"]["two_stage"]["vs_two_stage"] == {"difference": 0, "low": 0, "high": 0, "p": 1}
    assert set(result["methods"]["two_stage"]["vs_best_baseline"]) == {"difference", "low", "high", "p"}
    assert set(result["negative_transfer"]["two_stage"]) == {"echo", "sort"}
    routing = result["methods"]["two_stage"]["routing"]
    assert set(routing) == {"experts", "shared"}
    for layers in routing.values():
        for table in layers.values():
            assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in table)
    out = capsys.readouterr().out
    assert "| two_stage |" in out
    page = Path("out/compare.html").read_text()
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)\w""", page)  # nothing is fetched
    assert all(name in page for name in methods)
    tables, _, pictures = Path("out/compare.md").read_text().partition("\nMean gate")
    assert tables in out
    files = re.findall(r"\]\((routing/.+\.svg)\)", pictures)
    assert {"routing/two_stage.experts.svg", "routing/two_stage.shared.svg"} <= set(files)
    assert all(Path("out", file).is_file() for file in files)


def test_ranks_are_chosen_to_use_the_parameter_budget_and_draws_the_tokens(compared):
    change(compared, stage1__model__init_args__expert={"class_path": "alter.nn.LoRA", "init_args": {"rank": 32}})
    recipe = read_recipe(["--config", "recipe.yaml", "--data.examples_per_epoch", "90"])
    planner = Planner(recipe)
    assert planner.budget.draws == 135  # one epoch of stage 1, half a one of stage 2
    for name in HERE:
        runs = METHODS[name].plan(copy.deepcopy(recipe.config), planner.budget)
        for run in runs:
            planner.match(run)
        if name not in ("untouched", "full"):
            used = sum(planner.count(run.config) for run in runs)
            assert used == pytest.approx(planner.budget.parameters, rel=0.1), name
        if name not in ("untouched", "two_stage"):
            assert sum(run.config["data"]["examples_per_epoch"] for run in runs) == pytest.approx(135, abs=1)
    assert recipe.config["data"]["examples_per_epoch"] == 90  # the plans changed copies


@pytest.fixture
def plan(compared):
    """The runs of a method on a recipe with two experts, rates, schedules and optimizers to tell apart."""
    task = yaml.safe_load(Path("tasks/echo.yaml").read_text())
    Path("tasks/echo.yaml").write_text(yaml.safe_dump({**task, "weight": 3.0}))
    change(
        compared,
        data__temperature=1,
        stage1__trainer={"max_epochs": 2},
        stage1__model__init_args__optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}},
        stage1__model__init_args__schedule="constant",
        stage2__model__init_args__optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}},
        stage2__model__init_args__schedule="linear",
    )
    recipe = read_recipe(["--config", "recipe.yaml"])
    budget = Planner(recipe).budget
    return recipe.config, budget, lambda name: METHODS[name].plan(copy.deepcopy(recipe.config), budget)


# Of 60 and 30 rows an epoch draws 90: two in stage 1, and half a one in stage 2.
DRAWS = 225


def test_one_stage_trains_all_parts_in_stage_2_at_the_rates_of_stage_1(plan):
    config, budget, plan = plan
    (run,) = plan("one_stage")
    assert budget.draws == DRAWS
    assert run.config["stages"] == ["stage1", "stage2"]
    assert run.config["data"] == {**config["data"], "examples_per_epoch": DRAWS}
    assert run.config["stage1"]["trainer"] == {"max_steps": 0}
    trainer = {**run.config["trainer"], **run.config["stage2"]["trainer"]}
    assert (trainer["max_epochs"], trainer["limit_train_batches"]) == (1, 1.0)
    assert run.config["stage1"]["model"] == config["stage1"]["model"]
    arguments, first, second = (
        made["model"]["init_args"] for made in (run.config["stage2"], config["stage1"], config["stage2"])
    )
    assert (first["optimizer"]["class_path"], first["optimizer"]["init_args"]["lr"]) == ("torch.optim.SGD", 0.25)
    assert arguments == {**second, "task_expert_lr": 1.0, "optimizer": first["optimizer"]}
    assert (second["task_expert_lr"], arguments["schedule"]) == (0.0, "linear")
    assert run.budget is None


def test_alone_is_a_model_a_task_with_its_share_of_the_draws_and_of_the_parameters(plan):
    config, budget, plan = plan
    runs = plan("alone")
    assert [run.name for run in runs] == ["echo", "sort"]
    assert [[task["name"] for task in run.config["data"]["tasks"]] for run in runs] == [["echo"], ["sort"]]
    # rates go with size and weight: 3 x 30 rows of echo, 60 of sort
    assert [run.config["data"]["examples_per_epoch"] for run in runs] == [round(0.6 * DRAWS), round(0.4 * DRAWS)]
    for run in runs:
        assert run.budget == budget.parameters / 2
        assert run.config["stages"] == ["stage1"]
        assert "stage2" not in run.config
        trainer = {**run.config["trainer"], **run.config["stage1"]["trainer"]}
        assert (trainer["max_epochs"], trainer["limit_train_batches"]) == (1, 1.0)
        arguments = run.config["stage1"]["model"]["init_args"]
        assert arguments["router"] == {"class_path": "alter.nn.TaskSelector", "init_args": {"hard": True}}
        assert arguments["optimizer"] == config["stage1"]["model"]["init_args"]["optimizer"]
        assert arguments["schedule"] == "linear"


@pytest.mark.parametrize("name", [name for name in HERE if METHODS[name].trains])
def test_a_factor_is_on_every_learning_rate_once(compared, name, tmp_path):
    recipe = read_recipe(["--config", "recipe.yaml"])
    planner = Planner(recipe)
    grid = Grid(tmp_path / "grid", recipe, METHODS, [13], "test", (1.0, 2.0))

    def rates(factor):
        cell = plan_cell(grid, planner, name, 13, factor)
        plans = [
            yaml.safe_load((cell / file).read_text())
            for file in json.loads((cell / "cell.json").read_text())["recipes"]
        ]
        return [
            plan[stage]["model"]["init_args"]["optimizer"]["init_args"]["lr"]
            for plan in plans
            for stage in plan["stages"]
        ]

    assert rates(2.0) == pytest.approx([2 * rate for rate in rates(1.0)])


def test_a_method_whose_steps_are_of_another_size_starts_at_a_rate_of_its_own(compared):
    recipe = read_recipe(["--config", "recipe.yaml", "--stage1.model.optimizer.init_args.lr", "0.003"])
    budget = Planner(recipe).budget

    def rate(name):
        (run,) = METHODS[name].plan(copy.deepcopy(recipe.config), budget)
        return run.config["stage1"]["model"]["init_args"]["optimizer"]["init_args"]["lr"]

    found = {name: rate(name) for name in ("stage1", "peft_lora", "full", "peft_poly")}
    assert found == {"stage1": 0.003, "peft_lora": 0.003, "full": 2e-4, "peft_poly": 2e-2}


@pytest.mark.parametrize(
    ("name", "uses"), [("stage1", False), ("peft_lora", False), ("alone", False), ("two_stage", True)]
)
def test_a_cell_goes_on_when_what_it_does_not_use_has_changed(compared, tmp_path, name, uses):
    planned = []
    for keep in ("0.5", "0.8"):
        recipe = read_recipe(["--config", "recipe.yaml", "--stage2.model.keep", keep])
        grid = Grid(tmp_path / keep, recipe, METHODS, [13], "test", (1.0,))
        cell = plan_cell(grid, Planner(recipe), name, 13, 1.0)
        planned.append(json.loads((cell / "cell.json").read_text())["settings"])
    assert (planned[0] != planned[1]) == uses


def test_a_cell_is_the_same_wherever_its_recipe_is_read_from(compared, tmp_path):
    planned = []
    for config in ("recipe.yaml", str(compared / "recipe.yaml")):
        recipe = read_recipe(["--config", config])
        grid = Grid(tmp_path / "grid", recipe, METHODS, [13], "test", (1.0,))
        cell = plan_cell(grid, Planner(recipe), "stage1", 13, 1.0)
        planned.append(json.loads((cell / "cell.json").read_text())["settings"])
    assert planned[0] == planned[1]


def test_cells_of_other_rows_are_not_set_beside_each_other(compared, tmp_path):
    def plan():
        recipe = read_recipe(["--config", "recipe.yaml"])
        cell = plan_cell(Grid(tmp_path / "grid", recipe, METHODS, [13]), Planner(recipe), "stage1", 13, 1.0)
        return cell / "cell.json"

    file = plan()
    begun = json.loads(file.read_text())
    data = Path(yaml.safe_load(Path("tasks/sort.yaml").read_text())["source"]["init_args"]["train"])
    text = data.read_text()
    data.write_text(text)  # written anew, with the same rows
    os.utime(data, (1, 1))
    assert json.loads(plan().read_text()) == begun
    lines = text.splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(
        AlterError, match="this cell was started with other rows of the tasks; give a new folder with --out"
    ):
        plan()
    file.write_text(json.dumps({key: value for key, value in begun.items() if key != "data"}))
    assert json.loads(plan().read_text())["data"] != begun["data"]  # of before rows were looked at


def test_a_task_may_be_called_what_numpy_calls_its_options(tmp_path):
    tasks = [
        Task(name, {"class_path": "Files"}, "{{ x }}", "{{ y }}", choices=["a", "b"])
        for name in ("file", "allow_pickle")
    ]
    cells = {}
    for method, said in (("full", ["a", "b"]), ("two_stage", ["a", "a"])):
        cells[method] = {13: tmp_path / method}
        cells[method][13].mkdir()
        write_answers(cells[method][13], "test", [(task, said, ["a", "b"]) for task in tasks])
        hits = {task.name: {"accuracy": sum(map(str.__eq__, said, ["a", "b"])) / 2} for task in tasks}
        (cells[method][13] / "test.json").write_text(json.dumps({"tasks": hits}))
    answers = Answers(cells, {task.name: "accuracy" for task in tasks}, "test")
    found = answers.difference("two_stage", "full", [13], [task.name for task in tasks])
    assert (found.difference, found.low, found.high) == (-0.5, -1.0, 0.0)


@pytest.mark.slow
def test_cells_may_train_on_several_processes(compared):
    change(compared, trainer__devices=2, trainer__strategy="ddp")
    found = compare("--methods", "untouched,stage1,alone", "--seeds", "1")["methods"]
    answered = {name: Path(f"out/cells/{name}/seed13/test.jsonl").read_text().splitlines() for name in found}
    assert {len(lines) for lines in answered.values()} == {len(answered["untouched"])}  # by the first process alone


def test_methods_of_one_stage_end_as_the_recipe_does_and_keep_its_scale(compared):
    change(compared, stage1__model__init_args__schedule="constant", stage2__model__init_args__schedule="linear")
    change(
        compared,
        stage1__model__init_args__expert={"class_path": "alter.nn.LoRA", "init_args": {"rank": 4, "alpha": 12}},
    )
    recipe = read_recipe(["--config", "recipe.yaml"])
    planner = Planner(recipe)
    scales = {}
    for name in ("shared", "alone", "stage1", "polytropon", "hydralora", "mtl_lora", "peft_lora"):
        (run, *_) = METHODS[name].plan(copy.deepcopy(recipe.config), planner.budget)
        planner.match(run)
        arguments = run.config["stage1"]["model"]["init_args"]
        assert arguments["schedule"] == "linear"
        if "expert" in arguments:
            expert = arguments["expert"]["init_args"]
            scales[name] = expert["alpha"] and expert["alpha"] / expert["rank"]
    mixtures = {"stage1", "polytropon", "hydralora", "mtl_lora"}
    assert scales == {name: 3 if name in mixtures else None for name in ("shared", "alone", *mixtures)}


def test_a_comparison_goes_on_where_it_was_killed(compared, cells_here, capsys):
    arguments = ["--methods", "untouched,stage1,two_stage", "--seeds", "2"]
    command = [sys.executable, "-m", "alter", "compare", "--config", "recipe.yaml", "--out", "out", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        done, begun = Path("out/cells/stage1/seed13/test.json"), Path("out/cells/two_stage/seed13")
        started = time.monotonic()
        while "stage1" not in stage_records(begun / "run"):  # a cell between its stages
            assert process.poll() is None
            assert time.monotonic() - started < 300
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (begun / "test.json").exists()
    assert not Path("out/compare.json").exists()
    kept = [done, *(begun / "run" / "stage1" / "model").iterdir()]
    before = [file.stat().st_mtime_ns for file in kept]
    result = compare(*arguments)
    assert len(kept) > 1
    assert [file.stat().st_mtime_ns for file in kept] == before  # stage 1 was not trained again
    assert "6 cells, 2 complete before" in capsys.readouterr().out
    again = compare(*arguments)
    assert again["methods"] == result["methods"]
    spread = result["methods"]["two_stage"]["tasks"]["sort"]["accuracy"]
    assert len(spread["seeds"]) == 2
    assert spread["sd"] is not None

    change(compared, stage1__model__init_args__own=0.5)
    (line,) = refused(capsys, "compare", "--config", "recipe.yaml", "--out", "out", *arguments)
    assert "other settings" in line


@pytest.mark.parametrize(
    ("name", "kept"),
    [("alter.nn.experts.LoRA", {"alpha": 8}), ("alter.nn.LoRA", {"alpha": 8}), ("alter.nn.Bottleneck", {})],
)
def test_an_overlay_keeps_the_arguments_of_the_same_class_by_whichever_name(tmp_path, name, kept):
    expert = {"class_path": "alter.nn.LoRA", "init_args": {"rank": 4, "alpha": 8}}
    config = {"stage1": {"model": {"init_args": {"expert": expert}}}}
    overlay = {"stage1": {"model": {"init_args": {"expert": {"class_path": name, "init_args": {"rank": 2}}}}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
    (run,) = find_method(str(tmp_path / "own.yaml"))[1].plan(config, Budget(1, 1, {}))
    assert run.config["stage1"]["model"]["init_args"]["expert"] == {
        "class_path": name,
        "init_args": {"rank": 2, **kept},
    }


@pytest.mark.parametrize("name", ["stage1", "shared", "one_stage", "alone", "full"])
def test_a_method_of_one_epoch_is_validated_in_it(compared, name):
    rare = {"max_epochs": 2, "check_val_every_n_epoch": 2}
    change(compared, stage1__trainer=rare, stage2__trainer=rare)
    recipe = read_recipe(["--config", "recipe.yaml"])
    for training in METHODS[name].plan(copy.deepcopy(recipe.config), Planner(recipe).budget):
        for stage in training.config["stages"]:
            assert stage_trainer(training.config, stage)["check_val_every_n_epoch"] == 1


def test_one_stage_learns_in_its_second_stage_alone(compared, cells_here):
    found = compare("--methods", "one_stage", "--seeds", "1")["methods"]["one_stage"]
    run = Path("out/cells/one_stage/seed13/run")
    records = stage_records(run)
    assert records["stage1"]["tokens"] == 0
    assert records["stage2"]["tokens"] == found["tokens"] > 0
    first, second = (load_file(run / stage / "model" / "adapters.safetensors") for stage in ("stage1", "stage2"))
    moved = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert any(".experts.a." in name for name in moved)
    assert any(".router." in name for name in moved)


def test_every_cell_starts_from_the_states_that_the_first_has_stored(compared, cells_here, capsys):
    told, stored = [], []
    for methods in ("stage1", "stage1,one_stage,two_stage,alone,peft_lora,peft_poly"):
        compare("--methods", methods, "--seeds", "1")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trunk cache: ")]
        told.append([re.search(r"(\d+) examples there|off", line)[1] for line in lines])
        (store,) = (alter_home() / "trunk").iterdir()
        stored.append([file.read_bytes() for file in sorted(store.glob("*.index"))])
    assert told[0] == ["0"]
    assert int(told[1][0]) > 50
    assert told[1] == told[1][:1] * 8  # trainings: two stages, two stages, two tasks, and one each
    assert stored[0] == stored[1]


def test_each_seed_has_its_own_few_rows_and_the_table_their_mean_and_deviation(compared, cells_here):
    found = compare("--methods", "untouched,stage1", "--seeds", "2", "--data.shots", "4")["methods"]
    learned = []
    for seed in (13, 21):
        recipe = read_recipe(["--config", f"out/cells/stage1/seed{seed}/run.yaml"])
        data = recipe.open_data(resolve_backbone("backbone"))
        rows = [json.loads(line) for line in Path("sort.train.jsonl").read_text().splitlines()]
        drawn = [rows[number - 1] for number in draw_shots(data.tasks[1], 4, seed).train]
        assert Counter(row["label"] for row in drawn) == {"yes": 4, "no": 4}
        learned.append(sorted(data.examples("sort", "train")["prompt"][:]))
        assert learned[-1] == sorted(f"{row['text']} :" for row in drawn)
        assert len(data.examples("echo", "train")) == 4
        assert len(data.examples("sort", "test")) == 6
    assert learned[0] != learned[1]
    for method in found.values():
        averages = []
        for task in method["tasks"].values():
            for metric in task.values():
                assert metric["mean"] == pytest.approx(mean(metric["seeds"]))
                assert metric["sd"] == pytest.approx(stdev(metric["seeds"]))
            averages.append(next(iter(task.values()))["seeds"])
        seeds = [mean(values) for values in zip(*averages, strict=True)]
        assert method["average"] == pytest.approx({"mean": mean(seeds), "sd": stdev(seeds)})
    for seed in (13, 21):  # what a cell has measured is what stands in the table
        cell = json.loads(Path(f"out/cells/stage1/seed{seed}/test.json").read_text())["tasks"]
        for task, metrics in cell.items():
            for name, value in metrics.items():
                assert found["stage1"]["tasks"][task][name]["seeds"][(13, 21).index(seed)] == value


def test_an_overlay_names_a_class_beside_it(compared, cells_here, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "beside.py").write_text("from alter.nn import TaskSelector\n\n\nclass Mine(TaskSelector):\n    pass\n")
    router = {"stage1": {"model": {"init_args": {"router": {"class_path": "beside.Mine", "init_args": {}}}}}}
    (mine / "own.yaml").write_text(yaml.safe_dump(router))
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = compare("--methods", f"{mine / 'own.yaml'}", "--seeds", "1")
    assert result["methods"]["own"]["trainable_parameters"] > 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "mine.yaml",
            {"seed_everything": 7},
            "mine.yaml: seed_everything: it is the same for all methods of a comparison",
        ),
        ("mine.yaml", {"data": {"limit": {"test": 4}}}, "mine.yaml: data.limit: it is the same for all methods"),
        ("mine.yaml", {"generation": {"num_beams": 2}}, "mine.yaml: generation: it is the same for all methods"),
        ("mine.yaml", {"stage1": {"modle": {}}}, "unknown key 'modle'"),
        ("alone.yaml", {}, "alone.yaml is called as the method 'alone'; rename the file"),
    ],
)
def test_a_method_of_ones_own_is_read_before_anything_trains(compared, capsys, name, content, said):
    Path(name).write_text(yaml.safe_dump(content))
    lines = refused(capsys, "compare", "--config", "recipe.yaml", "--out", "out", "--methods", f"untouched, {name}")
    assert said in lines[0]
    assert not Path("out").exists()


def test_a_method_of_ones_own_with_stage_one_alone_has_the_draws_of_both(compared, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"stages": ["stage1"], "data": {"temperature": 1.0}}))
    config, budget = read_recipe(["--config", "recipe.yaml"]).config, Budget(90, 1, {})
    (own,) = find_method(str(tmp_path / "own.yaml"))[1].plan(config, budget)
    (built_in,) = METHODS["stage1"].plan(config, budget)
    assert own.config["data"].pop("temperature") == 1.0
    built_in.config["data"].pop("temperature")
    assert own.config == built_in.config


def test_peft_is_missed_before_anything_trains(compared, capsys, monkeypatch):
    monkeypatch.setattr("alter.compare.methods.find_spec", lambda name: None)
    arguments = ["--methods", "stage1,peft_lora", "--seeds", "1"]
    (line,) = refused(capsys, "compare", "--config", "recipe.yaml", "--out", "out", *arguments)
    assert 'peft_lora and peft_poly need the peft package; pip install "alter-mta[compare]"' in line
    assert not list(Path("out").glob("cells/*/*/test.json"))


def test_a_failing_cell_is_told_and_the_others_go_on(compared, capsys):
    Path("bad.yaml").write_text(yaml.safe_dump({"stage1": {"model": {"init_args": {"layers": [99]}}}}))
    with pytest.raises(SystemExit):
        compare("--methods", "bad.yaml,two_stage", "--seeds", "1", "--processes", "2")
    error = capsys.readouterr().err
    assert "1 of 2 cells are not complete" in error
    assert "99" in error
    assert Path("out/cells/two_stage/seed13/test.json").is_file()


def test_learning_rates_are_chosen_by_validation_loss_with_the_first_seed(compared, cells_here):
    tune = ("--tune", "1,1e-9,0.001", "--split", "validation")
    result = compare("--methods", "stage1,untouched", "--seeds", "2", *tune)
    assert result["split"] == "validation"
    assert result["methods"]["stage1"]["learning_rate_factor"] == 1
    cells = {cell.name: cell for cell in Path("out/cells/stage1").iterdir()}
    assert set(cells) == {"seed13", "seed13-lr1e-09", "seed13-lr0.001", "seed21"}
    trained = {name: json.loads((cells[name] / "trained.json").read_text()) for name in cells if name != "seed21"}
    losses = {name: record["validation_loss"] for name, record in trained.items()}
    assert not any("trainable_parameters" in record for record in trained.values())  # counted where rows are answered
    assert losses["seed13"] < min(losses["seed13-lr1e-09"], losses["seed13-lr0.001"])
    answered = [name for name, cell in cells.items() if (cell / "validation.json").is_file()]
    assert sorted(answered) == ["seed13", "seed21"]  # rates that were not chosen answer nothing
    assert sorted(p.name for p in Path("out/cells/untouched").iterdir()) == ["seed13", "seed21"]


def test_learning_rates_are_chosen_by_what_the_recipe_chooses_checkpoints_by(compared, cells_here, monkeypatch):
    chosen = {"monitor": "val/score", "mode": "max", "filename": "best", "save_last": True}
    callbacks = [
        {"class_path": "alter.callbacks.TaskMetrics", "init_args": {"rows": 3}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": chosen},
    ]
    change(compared, trainer__callbacks=callbacks)
    scores = {"seed13-lr0.5": 0.41, "seed13": 0.78, "seed13-lr2": 0.63}
    monkeypatch.setattr(
        "alter.training._best",
        lambda trainer: {
            "metric": "val/score",
            "mode": "max",
            "value": scores[Path(trainer.default_root_dir).parts[-3]],
        },
    )
    result = compare("--methods", "stage1", "--seeds", "1", "--tune", "0.5,1,2", "--split", "validation")
    assert result["methods"]["stage1"]["learning_rate_factor"] == 1
    assert result["methods"]["stage1"]["validation_loss"] is None  # it was not what was looked at
    trained = json.loads(Path("out/cells/stage1/seed13/trained.json").read_text())
    assert trained["best"] == {"metric": "val/score", "mode": "max", "value": 0.78}


def test_one_adapter_is_one_whatever_the_recipes_router_and_number_of_experts(compared):
    change(compared, stage1__model__init_args__num_experts=4)
    change(compared, stage1__model__init_args__router={"class_path": "alter.nn.TopK", "init_args": {"k": 2}})
    recipe = read_recipe(["--config", "recipe.yaml"])
    planner = Planner(recipe)
    for name in ("shared", "alone"):
        runs = METHODS[name].plan(copy.deepcopy(recipe.config), planner.budget)
        for run in runs:
            planner.match(run)
            assert run.config["stage1"]["model"]["init_args"].get("num_experts") in (None, 1)
            assert planner.count(run.config) == pytest.approx(run.budget, rel=0.1)


def test_a_rate_that_diverges_is_not_chosen(compared, cells_here):
    change(compared, stage1__model__init_args__optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}})
    tune = ("--tune", "1e30,1", "--split", "validation")
    result = compare("--methods", "stage1", "--seeds", "1", *tune)
    assert result["methods"]["stage1"]["learning_rate_factor"] == 1
    diverged = json.loads(Path("out/cells/stage1/seed13-lr1e+30/trained.json").read_text())
    assert diverged["validation_loss"] is None
    assert "is nan" in diverged["diverged"] or "is inf" in diverged["diverged"]
    assert compare("--methods", "stage1", "--seeds", "1", *tune)["methods"] == result["methods"]


def test_no_row_is_answered_before_all_rates_have_been_tried(compared, capsys, monkeypatch):
    """Else the trial that failed might win later, and the split would be read for two rates."""

    def run_cells(cells, command, name, processes):
        losses = {"seed13": 0.5, "seed13-lr2": 0.4}
        for cell in cells:
            told.append((cell.name, command(cell)[-1]))
            if cell.name not in failing:
                (cell / f"{command(cell)[-1]}.json").write_text(
                    json.dumps({"validation_loss": losses[cell.name], "seconds": 1})
                )
        return [f"{cell}: killed" for cell in cells if cell.name in failing]

    monkeypatch.setattr("alter.compare.grid.run_cells", run_cells)
    recipe = read_recipe(["--config", "recipe.yaml"])
    grid = Grid(compared / "out", recipe, {"stage1": METHODS["stage1"]}, [13], "test", (1.0, 2.0))
    told, failing = [], {"seed13-lr2"}
    with pytest.raises(AlterError, match="2 of 3 cells are not complete"):
        run_grid(grid, Planner(recipe))
    assert told == [("seed13", "trained"), ("seed13-lr2", "trained")]
    told, failing = [], set()
    run_grid(grid, Planner(recipe))
    assert told == [("seed13-lr2", "trained"), ("seed13-lr2", "test")]


def test_a_comparison_goes_on_in_its_precision_and_with_its_backbone_wherever_that_is(
    compared, cells_here, monkeypatch
):
    change(compared, precision="auto")
    monkeypatch.setattr("alter.precision.computes_bf16", lambda *given: True)
    compare("--methods", "untouched", "--seeds", "1")
    answered = Path("out/cells/untouched/seed13/test.jsonl").stat().st_mtime_ns
    monkeypatch.setattr("alter.precision.computes_bf16", lambda *given: False)
    Path("backbone").rename("moved")
    compare("--methods", "untouched", "--seeds", "1", "--backbone", "moved")
    assert Path("out/cells/untouched/seed13/test.jsonl").stat().st_mtime_ns == answered
    assert yaml.safe_load(Path("out/comparison.yaml").read_text())["precision"] == "bf16"
    with pytest.raises(SystemExit):  # other settings
        compare("--methods", "untouched", "--seeds", "1", "--backbone", "moved", "--precision", "fp32")
    compare("--methods", "untouched", "--seeds", "1", "--backbone", "moved")  # which that has not spoilt


@pytest.mark.parametrize("name", ["shared", "alone", "stage1", "hydralora"])
def test_experts_without_arguments_are_compared(compared, cells_here, name):
    change(compared, stage1__model__init_args__expert={"class_path": "alter.nn.FFNCopy"})
    assert compare("--methods", name, "--seeds", "1")["methods"][name]["trainable_parameters"] > 0


def test_the_hours_are_those_of_all_starts(compared, cells_here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("alter.compare.cell.fit", lambda recipe: time.sleep(1) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compare("--methods", "stage1", "--seeds", "1")
    cell = Path("out/cells/stage1/seed13")
    before = json.loads((cell / "seconds.json").read_text())
    assert before >= 1
    started = time.perf_counter()
    compare("--methods", "stage1", "--seeds", "1")
    spent = json.loads((cell / "test.json").read_text())["seconds"] - before
    assert 0 < spent < time.perf_counter() - started
    assert not (cell / "seconds.json").exists()
    recipe = read_recipe(["--config", "recipe.yaml"])
    grid = Grid(Path("out"), recipe, {"stage1": METHODS["stage1"]}, [13])
    (cell / "validation.json").write_text(json.dumps({"seconds": 100}))  # of the same training, answered before
    assert run_grid(grid, Planner(recipe))[1] == pytest.approx(spent + before + 100)


def test_a_backbone_that_trains_is_counted(compared, cells_here):
    change(compared, stage1__model__init_args__backbone_lr=0.1)
    methods = compare("--methods", "stage1,full", "--seeds", "1")["methods"]
    assert methods["stage1"]["trainable_parameters"] > methods["full"]["trainable_parameters"]
    assert "except stage1, full" in Path("out/compare.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "stge1"], "stage1"),
        (["--methods", "stage1,stage1"], "a second method named 'stage1'"),
        (["--methods", "list.yaml"], "list.yaml: a recipe is a mapping of sections"),
        (["--processes", "0"], "--processes: 0 is below 1"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "x"], "--seeds"),
        (["--tune", "0,1"], "--tune"),
        (["--tune", "1,nan"], "--tune"),
        (["--tune", "inf"], "--tune"),
        (["--stages", "[stage1]"], "stages"),
        (["--trainer.limit_train_batches", "3"], "limit_train_batches"),
        (["--trainer.max_epochs", "-1"], "give the length as max_epochs"),
        (["--trainer.val_check_interval", "2"], "give val_check_interval as a share of the epoch"),
    ],
)
def test_what_cannot_be_compared_is_refused(compared, capsys, arguments, said):
    Path("list.yaml").write_text("- stage1\n")
    lines = refused(capsys, "compare", "--config", "recipe.yaml", "--out", "out", *arguments)
    assert said in lines[0]
    assert not Path("out/compare.json").exists()


def test_tasks_alone_are_all_chosen_by_the_same_measure(compared):
    def watch(task):
        return {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": f"val/loss/{task}"},
        }

    change(compared, trainer__callbacks=[watch("sort"), watch("echo")])
    recipe = read_recipe(["--config", "recipe.yaml"])
    planned = METHODS["alone"].plan(copy.deepcopy(recipe.config), Planner(recipe).budget)
    watched = {t.name: [c["init_args"]["monitor"] for c in t.config["trainer"]["callbacks"]] for t in planned}
    assert watched == {"echo": [], "sort": []}  # all by the loss, of which one mean can be made


def test_the_memory_of_a_cell_is_that_of_its_training_too(compared, monkeypatch):
    """Where another process has trained it, as with ``--tune``."""
    recipe = read_recipe(["--config", "recipe.yaml"])
    fit(recipe)
    monkeypatch.setattr("alter.run_folder.peak_device_memory_bytes", lambda: 123)
    plan = {"trains": True, "recipes": ["x"]}
    assert _measure([recipe], plan, "trained")[0]["peak_memory_bytes"] == 123
    progress = json.loads((recipe.run / "progress.json").read_text())
    progress["stage1"]["peak_device_memory_bytes"] = 10**10
    (recipe.run / "progress.json").write_text(json.dumps(progress))
    assert _measure([recipe], plan, "trained")[0]["peak_memory_bytes"] == 10**10


def test_a_backbone_whose_blocks_the_recipe_names_is_compared_untouched(compared, cells_here):
    config = BloomConfig(
        vocab_size=600, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    BloomForCausalLM(config).save_pretrained("bloom")
    AutoTokenizer.from_pretrained(read_recipe(["--config", "recipe.yaml"]).config["backbone"]).save_pretrained("bloom")
    change(compared, backbone="bloom", stage1__model__init_args__ffn="*.mlp")
    assert compare("--methods", "untouched", "--seeds", "1")["methods"]["untouched"]["trainable_parameters"] == 0
