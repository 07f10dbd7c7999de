"""Shell completion: scripts made once, by ``python -m alter.completion``, and printed by ``alter completion SHELL``.

Made beforehand, since all flags of a recipe are known only once Lightning is imported, which takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
FOLDER = Path(__file__).parent / "completions"


def script(shell: str) -> str:
    """The script that ships, for bash, zsh or fish."""
    return (FOLDER / f"alter.{shell}").read_text(encoding="utf-8")


def generate(shell: str) -> str:
    """Makes the script anew, from the verbs' parsers; needs shtab."""
    import shtab

    from alter.arguments import parser
    from alter.shipped import shipped

    verbs = parser(_recipe_flags())
    groups: Any = verbs._subparsers
    for verb in groups._group_actions[0].choices.values():
        for action in verb._actions:
            if action.type is Path or "--config" in action.option_strings:
                action.complete = shtab.FILE
            elif verb.prog == "alter cp" and action.dest == "name":
                action.choices = [recipe.file.stem for recipe in shipped()]
    return shtab.complete(verbs, shell)


def _recipe_flags() -> argparse.ArgumentParser:
    """Every flag of a recipe, with the choices that jsonargparse knows."""
    from alter.precision import KNOWN
    from alter.recipe import recipe_parser

    recipe = recipe_parser()
    recipe.get_completion_script("shtab-fish")  # for what it does to the parser: choices, and the flags of classes
    flags = argparse.ArgumentParser(add_help=False)
    for action in recipe._actions:  # as shtab itself reads them
        names = [
            name for name in action.option_strings if not name.startswith("--print_") and name not in ("-h", "--help")
        ]
        if names and ".optimizer.lr." not in names[0]:  # a tensor's own arguments
            about = (action.help or "").split("\n")[0].split(" (type:")[0]
            choices = [str(choice) for choice in action.choices] if action.choices else None
            if action.dest == "precision":  # no choices to jsonargparse, since the recipe's check says it better
                choices = list(KNOWN)
            kind = Path if names == ["--config"] else None
            extra: Any = {"type": kind} if kind else {}
            flags.add_argument(*names, dest=action.dest, help=about.replace("%", "%%"), choices=choices, **extra)
    return flags


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in SHELLS:
        (FOLDER / f"alter.{name}").write_text(generate(name), encoding="utf-8")
