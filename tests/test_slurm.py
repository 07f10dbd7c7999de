"""The batch script and its submission, without SLURM; a real one is in tests/slurm."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from alter.cli import main
from alter.recipe import read_recipe
from alter.slurm import Job, import_paths
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project, refused  # noqa: F401 (a fixture)


def script(capfd, *flags):
    main(["submit", "--config", "recipe.yaml", "--dry-run", *flags])
    return capfd.readouterr().out


def asked(text):
    """What it asks of SLURM, by name."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_a_dry_run_prints_a_script_that_asks_for_what_was_asked_and_writes_nothing(project, capfd):  # noqa: F811
    flags = ("--nodes", "2", "--gpus-per-node", "4", "--time", "8:00:00", "--partition", "gpu", "--account", "us")
    further = (
        "--cpus-per-task",
        "8",
        "--sbatch",
        "constraint=a100|h100",
        "--sbatch",
        "exclusive",
        "--sbatch",
        "signal=USR1@300",
    )
    text = script(capfd, *flags, *further, "--setup", "module load cuda")
    assert asked(text) == {
        "job-name": "alter-run", "chdir": str(project), "output": f"{project}/run/slurm-%j.log", "open-mode": "append",
        "nodes": "2", "ntasks-per-node": "4", "requeue": "", "signal": "USR1@300", "time": "8:00:00", "partition": "gpu",
        "account": "us", "cpus-per-task": "8", "gpus-per-node": "4", "constraint": '"a100|h100"', "exclusive": "",
    }  # fmt: skip
    *before, last = text.splitlines()
    assert before[0] == "#!/bin/bash"
    assert before.index("module load cuda") > before.index("export OMP_NUM_THREADS=8")
    words_of_it = shlex.split(last)
    assert words_of_it[0] == "srun"
    assert words_of_it[3:] == [sys.executable, "-m", "alter", "fit", "--config", "run/submit.yaml"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("flags", "trainer"),
    [
        ((), {"num_nodes": 1, "devices": 1, "strategy": "auto"}),
        (("--nodes", "2"), {"num_nodes": 2, "devices": 1, "strategy": "ddp"}),
        (("--tasks-per-node", "2"), {"num_nodes": 1, "devices": 2, "strategy": "ddp"}),
        (("--trainer.devices", "3", "--trainer.num_nodes", "2"), {"num_nodes": 2, "devices": 3, "strategy": "ddp"}),
        (("--nodes", "2", "--trainer.strategy", "fsdp2"), {"num_nodes": 2, "devices": 1, "strategy": "fsdp2"}),
    ],
)
def test_the_recipe_that_is_submitted_fits_the_job(project, sbatch, capfd, flags, trainer):  # noqa: F811
    main(["submit", "--config", "recipe.yaml", "--data.temperature", "3", *flags])
    out = capfd.readouterr().out
    assert "Job 42: run/submit.sh" in out
    assert sbatch.read_text() == "--parsable run/submit.sh"
    given = yaml.safe_load(Path("run/submit.yaml").read_text())
    assert {key: given["trainer"][key] for key in trainer} == trainer
    assert given["data"]["temperature"] == 3
    read_recipe(["--config", "run/submit.yaml"])  # as the job will
    text = asked(Path("run/submit.sh").read_text())
    assert (int(text["nodes"]), int(text["ntasks-per-node"])) == (trainer["num_nodes"], trainer["devices"])


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in on the path; returns the file in which it notes its arguments."""
    file, noted = tmp_path / "bin" / "sbatch", tmp_path / "submitted"
    file.parent.mkdir()
    file.write_text(
        f'#!/bin/sh\n[ -z "$SLURM_NTASKS" ] || exit 9\n[ -z "$REFUSED" ] || {{ echo "sbatch: error: $REFUSED" >&2; exit 1; }}\n'
        f'printf "%s" "$*" > {noted}\necho "42;here"\n'
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NTASKS", "2")  # of an allocation that the user is in, which must not reach the job
    return noted


def test_precision_auto_is_left_to_the_machine_that_runs_the_job(project, sbatch):  # noqa: F811
    main(["submit", "--config", "recipe.yaml", "--run", "run", "--precision", "auto"])
    assert yaml.safe_load(Path("run/submit.yaml").read_text())["precision"] == "auto"


def test_what_slurm_refuses_is_told_in_its_words(project, sbatch, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REFUSED", "invalid partition specified: gpu")
    (sentence,) = refused(capfd, "submit", "--config", "recipe.yaml", "--partition", "gpu")
    assert "SLURM refuses the job (invalid partition specified: gpu)" in sentence


def test_without_slurm_it_says_so_and_the_script_is_there(project, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", str(project))
    (sentence,) = refused(capfd, "submit", "--config", "recipe.yaml")
    assert "there is no SLURM here; run/submit.sh is written" in sentence
    assert Path("run/submit.sh").is_file()


def test_every_wrong_option_is_told(project, capfd):  # noqa: F811
    flags = ("--nodes", "0", "--cpus-per-task", "many", "--sbatch", "time=3:00", "--sbatch", "N 2", "--time", "1\n2")
    said = refused(capfd, "submit", "--config", "recipe.yaml", *flags)
    assert len(said) == 5
    for words_of_it in (
        "--nodes: '0'",
        "--cpus-per-task: 'many'",
        "it comes from --time",
        "'N 2' is not KEY=VALUE",
        "--time: '1",
    ):
        assert any(words_of_it in line for line in said)


def test_a_folder_of_another_run_is_refused_before_the_queue(project, sbatch, capfd):  # noqa: F811
    fit("--test", "false", "--stages", "[stage1]", "--trainer.max_epochs", "1")
    (sentence,) = refused(capfd, "submit", "--config", "recipe.yaml", "--data.temperature", "3")
    assert "started with another recipe" in sentence
    assert not sbatch.exists()


def test_import_paths_are_those_that_python_would_not_find_by_itself(monkeypatch, tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    beside = [
        str(library.with_name(library.name + "-project")),
        f"{sys.base_prefix}3/me",
        str(Path(sys.prefix, "users", "me")),
    ]
    own = [
        str(library),
        str(library / "lib-dynload"),
        sysconfig.get_path("purelib"),
        str(library.parent / "python311.zip"),
    ]
    monkeypatch.setattr(sys, "path", [*own, *beside, str(tmp_path)])
    assert import_paths() == [*beside, str(tmp_path)]


def test_only_a_variable_of_its_own_is_expanded_by_the_script():
    text = Job().script(
        "x", Path("log.txt"), ["alter", "$SLURM_ARRAY_TASK_ID", "$(touch pwned) a/submit.yaml", "$HOME/x"]
    )
    (line,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert line.endswith("alter \"$SLURM_ARRAY_TASK_ID\" '$(touch pwned) a/submit.yaml' '$HOME/x'")
