"""How many devices a recipe takes; what it may not name is in ``test_cli``."""

import pytest
from lightning.pytorch.accelerators import CPUAccelerator

from alter.recipe import read_recipe
from alter.training import StageCLI
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.test_cli import change, project  # noqa: F401


@pytest.mark.parametrize(
    ("trainer", "taken"),
    [
        ({}, 1),
        ({"devices": "auto"}, 1),
        ({"strategy": "ddp"}, 4),
        ({"strategy": "ddp", "devices": "auto"}, 4),
        ({"strategy": "ddp", "devices": 2}, 2),
        ({"devices": 3}, 3),
        ({"devices": -1}, 4),
    ],
)
def test_all_devices_are_taken_only_where_a_recipe_says_so(project, monkeypatch, trainer, taken):  # noqa: F811
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 4))
    monkeypatch.setattr(CPUAccelerator, "parse_devices", staticmethod(lambda devices: 4 if devices == -1 else devices))
    change(project, **{f"trainer__{key}": value for key, value in trainer.items()})
    recipe = read_recipe(["--config", "recipe.yaml"])
    stage = StageCLI(recipe.run / "stage1", recipe.stage_args("stage1", "backbone"))
    assert stage.trainer.num_devices == taken
