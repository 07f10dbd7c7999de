"""The recipes that come with ALTER: what each needs and takes, and copies to change."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml

from alter.errors import AlterError, did_you_mean
from alter.terminal import width


def shipped_recipes() -> Path:
    """The folder of the recipes that come with ALTER, in a checkout or in a wheel."""
    return _beside("recipes")


def shipped_pages() -> Path:
    """The folder that these recipes call ``docs``."""
    return _beside("docs")


def _beside(folder: str) -> Path:
    package = Path(__file__).parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


@dataclass
class Shipped:
    """A recipe that comes with ALTER.

    Attributes:
        file: the recipe.
        about: the first sentence of its header.
        needs: what has to be there, from its header.
        takes: time and memory, from its header.
        backbone: that it names.
        tasks: its task files.
    """

    file: Path
    about: str
    needs: str
    takes: str
    backbone: str
    tasks: list[Path]


def shipped() -> list[Shipped]:
    """All recipes that come with ALTER, by name."""
    return [_read(file) for file in sorted(shipped_recipes().glob("*.yaml"))]


def find_shipped(name: str) -> Shipped:
    """The recipe of a name, with or without its ending.

    Raises:
        AlterError: there is none.
    """
    known = {recipe.file.stem: recipe for recipe in shipped()}
    stem = Path(name).name.removesuffix(".yaml")
    if stem not in known:
        raise AlterError(
            f"{name}: no recipe of this name comes with ALTER; there are {', '.join(known)}.{did_you_mean(stem, known)}"
        )
    return known[stem]


def _read(file: Path) -> Shipped:
    text = file.read_text(encoding="utf-8")
    comments = re.match(r"(#.*\n)+", text)
    header = "\n".join(line[2:] for line in (comments[0] if comments else "").splitlines())
    content = yaml.safe_load(text)
    tasks = [task for entry in content["data"]["tasks"] for task in sorted(file.parent.glob(entry))]
    return Shipped(
        file,
        header.split("\n\n")[0].replace("\n", " "),
        _paragraph(header, "Needs"),
        _paragraph(header, "Takes"),
        content["backbone"],
        tasks,
    )


def _paragraph(header: str, label: str) -> str:
    """What stands in a header behind ``label:``, there and on indented lines below."""
    found = re.search(rf"^{label}: (.*(?:\n +.*)*)", header, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def listing() -> str:
    """Every recipe that comes with ALTER, for the terminal."""
    lines = []
    for recipe in shipped():
        names = ", ".join(task.stem for task in recipe.tasks)
        facts = {
            "tasks": f"{len(recipe.tasks)}: {names}",
            "backbone": recipe.backbone,
            "needs": recipe.needs,
            "takes": recipe.takes,
        }
        lines += textwrap.wrap(f"{recipe.file.stem}: {recipe.about}", width(), subsequent_indent="  ")
        for label, fact in facts.items():
            first = f"  {label:<10}"
            lines += textwrap.wrap(fact, width(), initial_indent=first, subsequent_indent=" " * len(first))
        lines.append("")
    lines.append("To train one: alter fit --config NAME. For a copy to change: alter cp NAME DIR.")
    lines.append(f"What recipes call docs is {shipped_pages()}")
    return "\n".join(lines)


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copies a recipe and its task files; the recipe finds the tasks there as it did here.

    Args:
        name: of a recipe that comes with ALTER.
        folder: made where it does not exist.

    Returns:
        the copies, the recipe first.

    Raises:
        AlterError: there is no such recipe, or a file is there already; nothing is copied then.
    """
    recipe = find_shipped(name)
    root = recipe.file.parent
    copies = {file: folder / file.relative_to(root) for file in [recipe.file, *recipe.tasks]}
    if there := [str(copy) for copy in copies.values() if copy.exists()]:
        raise AlterError(f"{there[0]}: is there already; copy into another folder, or remove the file first.")
    try:
        for file, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except OSError as error:
        raise AlterError(f"{folder}: cannot be written ({error.strerror}); name another folder.") from error
    return list(copies.values())
