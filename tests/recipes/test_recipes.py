"""Every recipe that ships is whole: it parses, says how to run it, and its tasks exist."""

from pathlib import Path

import pytest
import yaml

from alter.data import Task
from alter.recipe import read_recipe
from alter.shipped import shipped_recipes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TASKS = sorted((ROOT / "recipes" / "tasks").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_parses_and_its_header_holds_the_command(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(["--config", str(file.relative_to(ROOT))])
    assert recipe.tasks
    assert f"alter fit --config recipes/{file.name}" in file.read_text()
    for stage in ("stage1", "stage2"):
        arguments = recipe.stage_args(stage, "backbone")
        assert arguments["model"]["init_args"]["tasks"] == [task.name for task in recipe.tasks]
    again = yaml.safe_load(recipe.text)
    assert again["data"]["tasks"] == [task.to_dict() for task in recipe.tasks]


@pytest.mark.parametrize("file", TASKS, ids=lambda f: f.stem)
def test_a_task_is_about_twenty_lines_and_named_as_its_file(file):
    task = Task.from_file(file)
    assert task.name == file.stem
    settings = [line for line in file.read_text().splitlines() if not line.lstrip().startswith(("-", "#"))]
    assert len(settings) <= 22


def test_a_shipped_recipe_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (shipped_recipes() / "medical.yaml").is_file()
    for name in ("medical", "recipes/medical.yaml", "medical.yaml"):
        assert len(read_recipe(["--config", name]).tasks) == 7
