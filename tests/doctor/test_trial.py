"""The trial's count of what a whole run takes, against a run that is counted."""

import pytest

from alter.cli import main
from alter.doctor import trial
from alter.recipe import read_recipe
from alter.stages.base import StageModule
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, fit, project  # noqa: F401 (a fixture)

SECONDS = 1000.0  # of a batch; what is not batches takes much less


@pytest.mark.parametrize(
    "plan",
    [
        {"max_epochs": 2},
        {"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 1},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 4, "check_val_every_n_epoch": 2},
        {"max_epochs": 4, "check_val_every_n_epoch": None, "val_check_interval": 5},
        {"max_epochs": -1, "max_steps": 11, "accumulate_grad_batches": 2, "val_check_interval": 0.5},
        {"max_epochs": 2, "max_steps": 3},
    ],
    ids=str,
)
def test_it_counts_the_batches_that_a_run_takes(project, monkeypatch, plan):  # noqa: F811
    change(project, trainer={"accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0, **plan})
    change(project, data__max_tokens=40)
    taken = {}

    def counted(name):
        step = getattr(StageModule, name)

        def one(self, *given):
            taken[type(self).__name__] = taken.get(type(self).__name__, 0) + 1
            return step(self, *given)

        monkeypatch.setattr(StageModule, name, one)

    counted("training_step")
    counted("validation_step")
    fit("--test", "false")
    whole = dict(taken)  # the trial takes steps too
    monkeypatch.setattr(trial, "_typical", lambda seconds: SECONDS)
    found = trial.trial(read_recipe(["--config", "recipe.yaml", "--test", "false", "--run", "other"]))
    batches = {stage: round(seconds / SECONDS) for stage, seconds in found.seconds.items()}
    assert batches == {"stage1": whole["Stage1Module"], "stage2": whole["Stage2Module"]}


def test_stage_two_alone_is_tried_on_the_runs_stage_one(project, capsys):  # noqa: F811
    alone = ["--stages", "[stage2]", "--test", "false"]
    with pytest.raises(SystemExit):
        main(["doctor", "--config", "recipe.yaml", *alone])
    assert "run/stage1/model: no model here" in " ".join(capsys.readouterr().out.split())
    fit("--stages", "[stage1]", "--test", "false")
    main(["doctor", "--config", "recipe.yaml", *alone])
    assert not (project / "run" / "stage2").exists()


def test_it_knows_no_end_where_the_recipe_names_none(project, capsys):  # noqa: F811
    change(project, trainer__max_epochs=-1, stage2__trainer={"max_epochs": 1})
    main(["doctor", "--config", "recipe.yaml", "--test", "false"])
    said = " ".join(capsys.readouterr().out.split())
    assert "not known, since neither trainer.max_epochs nor max_steps ends stage1; the rest: stage2" in said
