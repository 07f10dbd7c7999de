"""The recipes that come with ALTER, listed and copied by their verbs."""

import re
from pathlib import Path

import pytest

from alter.cli import main
from alter.recipe import read_recipe
from alter.shipped import shipped, shipped_recipes

NAMES = sorted(file.stem for file in shipped_recipes().glob("*.yaml"))


def test_ls_tells_of_every_recipe_what_it_needs_and_takes(capsys):
    main(["ls"])
    out = capsys.readouterr().out
    blocks = {block.partition(":")[0]: block for block in out.split("\n\n")[:-1]}
    assert sorted(blocks) == NAMES
    for recipe in shipped():
        labels = re.findall(r"^  (\w+) ", blocks[recipe.file.stem], re.MULTILINE)
        assert labels[-4:] == ["tasks", "backbone", "needs", "takes"]
        assert recipe.needs.endswith(".")
        assert recipe.takes.endswith(".")
        assert recipe.backbone in blocks[recipe.file.stem]
    assert "22 minutes" in blocks["medical"]
    assert max(map(len, "\n\n".join(blocks.values()).splitlines())) <= 110
    pages = Path(out.splitlines()[-1].removeprefix("What recipes call docs is "))
    assert "docs/data.md" in out
    assert (pages / "data.md").is_file()


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.file.stem)
def test_a_header_names_the_flag_of_its_data_and_a_time(recipe):
    if re.search(r"\bDIR\b", recipe.needs):
        assert "--data.root DIR" in recipe.needs
    assert re.search(r"\d+ (minutes|hours)|\btime depends on\b", recipe.takes)


def test_ls_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main(["ls"])
    assert 70 < max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 80  # the last is a path


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_recipe_with_its_tasks_and_nothing_more(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["cp", name, "mine"])
    assert f"alter fit --config mine/{name}.yaml" in capsys.readouterr().out
    copy, original = (read_recipe(["--config", file]) for file in (f"mine/{name}.yaml", name))
    assert [task.prompt for task in copy.tasks] == [task.prompt for task in original.tasks]
    assert all(task.where.startswith("mine/") for task in copy.tasks)
    files = [file for file in (tmp_path / "mine").rglob("*") if file.is_file()]
    assert len(files) == 1 + len(copy.tasks)
    for file in files:
        assert file.read_bytes() == (shipped_recipes() / file.relative_to(tmp_path / "mine")).read_bytes()


def test_a_copy_overwrites_nothing_and_a_wrong_name_is_corrected(tmp_path, capsys):
    main(["cp", "medical", str(tmp_path)])
    (tmp_path / "medical.yaml").write_text("mine")
    for arguments, expected in ((["medical"], "is there already"), (["medicl"], "Did you mean 'medical'?")):
        with pytest.raises(SystemExit) as stop:
            main(["cp", *arguments, str(tmp_path)])
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err
    assert (tmp_path / "medical.yaml").read_text() == "mine"
