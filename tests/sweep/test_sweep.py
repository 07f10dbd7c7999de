"""`alter sweep` as a user calls it, on a tiny backbone; on SLURM in tests/slurm."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from alter.cli import main
from alter.recipe import read_recipe
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project, refused  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("warm")
COMMAND = ("sweep", "--config", "recipe.yaml", "--out", "out", "--stages", "[stage1]")
RATES = ("--set", "stage1.model.optimizer.lr=1e-3,3e-2")


@pytest.fixture(autouse=True)
def _children_find_the_package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_a_sweep_ranks_its_cells_shows_what_failed_and_tries_that_again_when_asked(project, capfd):  # noqa: F811
    change(project, trainer__max_epochs=1)
    blocked = project / "out" / "cells" / "002" / "stage1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("where a folder has to be")
    (sentence,) = refused(capfd, *COMMAND, *RATES, "--local", "2")
    assert sentence == "alter: 1 of 2 cells have failed; to try them again: alter sweep retry out"
    main(["sweep", "status", "out"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["1", "001", "0.001"]
    assert lines[1].endswith("done")
    assert lines[2].split()[:2] == ["002", "0.03"]
    assert lines[2].endswith("failed")
    assert "1 done, 1 failed of 2" in lines
    assert any(re.match(r"cell 002 failed: .*Error: .*out/cells/002/log.txt", line) for line in lines)

    main([*COMMAND, *RATES])  # what failed is not tried by itself
    assert "1 done, 1 failed of 2" in capfd.readouterr().out
    blocked.unlink()
    main(["sweep", "retry", "out"])
    assert "2 done of 2" in capfd.readouterr().out
    assert not Path("out/cells/002/failed.json").exists()
    found = {n: json.loads(Path(f"out/cells/{n}/result.json").read_text())["value"] for n in ("001", "002")}
    records = {n: json.loads(Path(f"out/cells/{n}/progress.json").read_text()) for n in found}
    assert found == {n: record["stage1"]["validation_loss"] for n, record in records.items()}
    assert found["001"] != found["002"]
    # tokens and states of the frozen blocks are shared
    assert len([folder for folder in Path("cache").iterdir() if folder.is_dir()]) == 2
    assert len(list(Path(os.environ["ALTER_HOME"], "trunk").iterdir())) == 1
    assert not list(Path("out").rglob("results.json")), "the test split was read"

    best = yaml.safe_load(Path("out/best.yaml").read_text())
    rate = {"001": 1e-3, "002": 3e-2}[min(found, key=found.get)]
    assert best["stage1"]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    main(["fit", "--config", "out/best.yaml"])  # unedited, and with the test
    assert json.loads(Path("out/best/results.json").read_text())["tasks"].keys() == {"echo", "sort"}
    trained = json.loads(Path("out/best/progress.json").read_text())["stage1"]["validation_loss"]
    assert trained == pytest.approx(min(found.values()), abs=1e-5)


@pytest.mark.slow
def test_cells_may_train_on_several_processes_and_differ_in_text_of_several_lines(project, capfd):  # noqa: F811
    change(project, trainer__max_epochs=1, trainer__devices=2, trainer__strategy="ddp")
    points = [{"data.tasks.1.prompt": f"{{{{ text }}}}\n{word}:\n"} for word in ("Answer", "Reply")]
    (project / "points.yaml").write_text(yaml.safe_dump(points))
    main([*COMMAND, "--points", "points.yaml"])
    assert "2 done of 2" in capfd.readouterr().out
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    assert best["data"]["tasks"][1]["prompt"] in [point["data.tasks.1.prompt"] for point in points]


def planned(*flags, recipe=()):
    """A sweep whose cells are there and have not run."""
    from alter.recipe import read_recipe
    from alter.sweep.plan import plan
    from alter.sweep.points import grid, read_sets

    recipe = read_recipe(["--config", "recipe.yaml", "--stages", "[stage1]", *recipe])
    return plan(Path("out"), recipe, grid(read_sets(flags)), Path())


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """Puts a squeue of some shell lines on the PATH."""
    file = tmp_path / "bin" / "squeue"
    file.parent.mkdir()
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")

    def write(lines):
        file.write_text(f"#!/bin/sh\n{lines}\n")
        file.chmod(0o755)

    return write


def test_the_table_tells_every_state(project, capfd, squeue):  # noqa: F811
    squeue("echo '9_3 PENDING'; echo '9_4 RUNNING'; echo '8_5 RUNNING'")
    sweep = planned("data.temperature=1,2,3,4,5,6,7,8")
    for number, value in ((1, 0.5), (2, 0.25)):
        (sweep.cell(number) / "result.json").write_text(json.dumps({"value": value, "seconds": 1234.5}))
    (sweep.folder / "jobs.json").write_text(json.dumps({str(n): f"9_{n}" for n in (1, 3, 4, 5)}))
    (sweep.cell(5) / "log.txt").write_text("stage1: trains\nslurmstepd: error: oom-kill\n")  # by a job that has gone
    (sweep.cell(6) / "failed.json").write_text('{"said": "The loss is nan."}')
    with FileLock(sweep.cell(7) / ".lock"):
        # in a process of its own: a process may lock what it has locked
        done = subprocess.run(
            [sys.executable, "-m", "alter", "sweep", "results", "out"], capture_output=True, text=True
        )
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["cell", "data.temperature", "val/loss", "seconds", "state"]
    assert lines[1].split() == ["1", "002", "2", "0.2500", "1,234", "done"]
    assert lines[2].split() == ["2", "001", "1", "0.5000", "1,234", "done"]
    rest = {line.split()[0]: line.split()[-1] for line in lines[3:9]}
    assert rest == {
        "003": "pending", "004": "running", "007": "running", "008": "waiting", "005": "stopped", "006": "failed",
    }  # fmt: skip
    assert "cell 005 stopped: slurmstepd: error: oom-kill (out/cells/005/log.txt)" in lines
    assert "cell 006 failed: The loss is nan. (out/cells/006/log.txt)" in lines
    assert yaml.safe_load((sweep.folder / "best.yaml").read_text())["data"]["temperature"] == 2


def test_where_slurm_does_not_answer_no_cell_is_taken_for_one_that_waits(project, capfd, squeue):  # noqa: F811
    squeue("echo 'squeue: error: slurm_load_jobs error: Socket timed out' >&2; exit 1")
    sweep = planned("data.temperature=1,2")
    main(["sweep", "status", "out"])  # no cell was ever submitted, so nothing is asked
    (sweep.folder / "jobs.json").write_text('{"1": "9_1"}')
    for command in (("status", "out"), ("retry", "out")):
        (sentence,) = refused(capfd, "sweep", *command)
        assert "(slurm_load_jobs error: Socket timed out); try again in a while." in sentence


def test_more_is_better_where_the_recipe_says_so(project, capfd):  # noqa: F811
    chosen = {"monitor": "val/score", "mode": "max", "filename": "best"}
    change(
        project,
        trainer__callbacks=[
            {"class_path": "alter.callbacks.TaskMetrics"},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": chosen},
        ],
    )
    sweep = planned("data.temperature=1,2,3")
    for number, value in ((1, 0.5), (2, None), (3, 0.75)):  # null where it was not a number
        (sweep.cell(number) / "result.json").write_text(json.dumps({"value": value, "seconds": 1}))
    main(["sweep", "results", "out"])
    lines = capfd.readouterr().out.splitlines()
    assert "val/score" in lines[0]
    assert [line.split()[1] for line in lines[1:4]] == ["003", "001", "002"]
    assert yaml.safe_load(Path("out/best.yaml").read_text())["data"]["temperature"] == 3
    read_recipe(["--config", "out/best.yaml"])


KEEPER = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize("chosen", [[], [{"class_path": KEEPER, "init_args": {"monitor": "val/score", "mode": "max"}}]])
def test_a_checkpoint_without_a_monitor_chooses_nothing_in_a_sweep_either(project, chosen):  # noqa: F811
    periodic = {"class_path": KEEPER, "init_args": {"every_n_train_steps": 2}}
    change(project, trainer__callbacks=[periodic, *chosen])
    sweep = planned("data.temperature=1,2")
    assert (sweep.metric, sweep.mode) == (("val/score", "max") if chosen else ("val/loss", "min"))


OWN = """
from lightning.pytorch.callbacks import ModelCheckpoint
from alter.nn import TaskSelector

class KeepBest(ModelCheckpoint):
    pass

class OwnSelector(TaskSelector):
    pass
"""


def test_modules_beside_the_recipe_are_found_by_retry_and_by_what_runs_the_best(project, capfd, monkeypatch):  # noqa: F811
    change(
        project,
        stage1__model__init_args__router={"class_path": "own_module_of_sweep.OwnSelector"},
        trainer__callbacks=[
            {"class_path": "alter.callbacks.TaskMetrics"},
            {
                "class_path": "own_module_of_sweep.KeepBest",
                "init_args": {"monitor": "val/score", "mode": "max", "filename": "best"},
            },
        ],
    )
    (project / "recipes").mkdir()
    (project / "recipes" / "own_module_of_sweep.py").write_text(OWN)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project / "recipes")])
    sweep = planned("data.temperature=1,2")
    assert (sweep.metric, sweep.mode) == ("val/score", "max")
    (sweep.cell(1) / "result.json").write_text(json.dumps({"value": 0.5, "seconds": 1}))
    monkeypatch.setattr(sys, "path", before)
    main(["sweep", "results", "out"])
    beside = project / "recipes"
    assert f"The best recipe: PYTHONPATH={beside} alter fit --config out/best.yaml" in capfd.readouterr().out
    assert str(beside) in sys.path
    monkeypatch.chdir(project.parent)
    main(["sweep", "results", f"{project.name}/out"])
    best = project / "out" / "best.yaml"
    said = capfd.readouterr().out
    assert f"The best recipe: cd {project} && PYTHONPATH={beside} alter fit --config {best}" in said
    assert yaml.safe_load(best.read_text())["run"] == str(project / "out" / "best")


def test_a_dry_run_shows_points_and_script_and_writes_nothing(project, capfd):  # noqa: F811
    flags = ("--slurm", "2", "--dry-run", "--time", "1:00:00", "--nodes", "2")
    main([*COMMAND, *RATES, "--set", "data.temperature=1,2", *flags])
    out = capfd.readouterr().out
    assert "4 waiting of 4" in out
    assert "#SBATCH --array=1-4%2" in out
    assert f"#SBATCH --output={project}/out/cells/%3a/log.txt" in out
    assert (
        f'-m alter.sweep.cell {project}/out "$SLURM_ARRAY_TASK_ID" --trainer.num_nodes 2 --trainer.devices 1 --trainer.strategy ddp'
        in out
    )
    assert not Path("out").exists()


def test_a_callback_may_be_named_by_its_class_alone(project, capfd):  # noqa: F811
    change(project, trainer__callbacks=["lightning.pytorch.callbacks.LearningRateMonitor"])
    assert planned("data.temperature=1,2").metric == "val/loss"


def test_a_cell_of_a_sweep_that_has_moved_trains_in_its_new_place(project, capfd):  # noqa: F811
    planned("data.temperature=1,2")
    for number, done in ((1, {"result.json": {"value": 0.5, "seconds": 1}}), (2, {"failed.json": {"said": "x"}})):
        (Path("out/cells") / f"{number:03d}").mkdir(parents=True, exist_ok=True)
        for name, content in done.items():
            (Path("out/cells") / f"{number:03d}" / name).write_text(json.dumps(content))
    Path("out").rename("my sweep")
    main(["sweep", "retry", "my sweep"])
    assert Path("my sweep/cells/002/stage1/model").is_dir()
    assert not Path("out").exists()
    assert "Its run, trained and not yet tested: alter test --run 'my sweep/cells/00" in capfd.readouterr().out


def test_a_sweep_whose_start_is_gone_is_told_as_that(project, capfd):  # noqa: F811
    planned("data.temperature=1,2")
    file = Path("out/sweep.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "start": str(project / "gone")}))
    (project / "out/cells/001").mkdir(parents=True, exist_ok=True)
    (project / "out/cells/001/failed.json").write_text(json.dumps({"said": "x"}))
    (sentence,) = refused(capfd, "sweep", "retry", "out")
    assert f"the sweep was started in {project / 'gone'}" in sentence


def test_a_folder_keeps_to_its_sweep(project, capfd):  # noqa: F811
    (sentence,) = refused(capfd, "sweep", "status", "out")
    assert "no sweep is there" in sentence
    planned("data.temperature=1,2")
    (sentence,) = refused(capfd, *COMMAND, "--set", "data.temperature=1,3")
    assert "started with other settings" in sentence
    assert "points.1.data.temperature" in sentence


def test_a_sweep_may_go_on_elsewhere_and_with_a_test_but_not_with_other_stages(project, capfd):  # noqa: F811
    sets = ("--set", "data.temperature=1,2", "--dry-run")
    planned("data.temperature=1,2")
    elsewhere = (
        "--trainer.num_nodes",
        "2",
        "--trainer.strategy",
        "ddp",
        "--data.cache_dir",
        "tokens",
        "--test",
        "false",
    )
    main([*COMMAND, *sets, *elsewhere])
    assert yaml.safe_load(Path("out/cells/002.yaml").read_text())["trainer"]["num_nodes"] == 1  # only looked at
    planned("data.temperature=1,2", recipe=elsewhere)
    cell = yaml.safe_load(Path("out/cells/002.yaml").read_text())
    assert (cell["trainer"]["num_nodes"], cell["data"]["cache_dir"]) == (2, "tokens")
    (sentence,) = refused(capfd, *COMMAND[:-2], *sets)
    assert "it differs in stages" in sentence


@pytest.mark.parametrize(
    ("flags", "words_of_it"),
    [
        ((), "say what to vary"),
        (("--set", "data.temprature=1,2"), "Did you mean 'temperature'?"),
        ((*RATES, "--local", "0"), "a number from 1"),
        ((*RATES, "--stages", "[]"), "stages: a sweep ranks"),
        ((*RATES, "--random", "0"), "one point at least"),
        ((*RATES, "--points", "points.yaml"), "either by --set"),
        (("--points", "points.yaml", "--random", "2"), "--random draws from --set"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_nothing_starts(project, capfd, flags, words_of_it):  # noqa: F811
    (sentence,) = refused(capfd, *COMMAND, *flags)
    assert words_of_it in sentence
    assert not list(Path().glob("out/cells/*/log.txt"))


def test_a_sweep_of_infinite_values_goes_on(project):  # noqa: F811
    sets = ("trainer.gradient_clip_val=.inf,1.0",)
    first = planned(*sets)
    second = planned(*sets)
    assert (
        first.points == second.points == [{"trainer.gradient_clip_val": math.inf}, {"trainer.gradient_clip_val": 1.0}]
    )
