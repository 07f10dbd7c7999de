"""A sweep's folder: ``sweep.json`` (what is varied, from what), and under ``cells/`` a recipe and a run folder for each point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.errors import AlterError
from alter.recipe import Recipe
from alter.run_folder import compared, differences
from alter.schema import find_classes_in, import_name
from alter.slurm import import_paths
from alter.stage_settings import named_callbacks, stage_trainer
from alter.sweep.points import Config, Point, check_points
from alter.writing import write_text
from alter.yaml_file import dump

SWEEP, JOBS = "sweep.json", "jobs.json"
RESULT, FAILED = "result.json", "failed.json"  # of a cell; the first says that it is done


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        folder: of the sweep.
        points: values by key, a cell each, numbered from 1.
        metric: by which cells are ranked: what the recipe's checkpoints are chosen by.
        mode: ``min`` or ``max``.
        start: the folder in which it was started, which a recipe's relative paths are from.
        test: whether the recipe tests at its end.
        paths: where modules of the recipe's own are looked for.
    """

    folder: Path
    points: list[Point]
    metric: str
    mode: str
    start: str
    test: bool
    paths: list[str]

    def cell(self, number: int) -> Path:
        """The run folder of a cell; its recipe stands beside, as NUMBER.yaml."""
        return self.folder / "cells" / f"{number:03d}"

    def recipe(self, number: int) -> Path:
        """The recipe of a cell."""
        return self.cell(number).with_suffix(".yaml")

    @property
    def numbers(self) -> range:
        """Of all cells."""
        return range(1, len(self.points) + 1)

    @property
    def jobs(self) -> dict[str, str]:
        """The last SLURM job of each cell that had one, by its number."""
        file = self.folder / JOBS
        return json.loads(file.read_text()) if file.is_file() else {}


def plan(folder: Path, recipe: Recipe, points: Sequence[Point], base: Path, dry_run: bool = False) -> Sweep:
    """Checks all points and writes their recipes; what is there has to be the same.

    Args:
        folder: of the sweep.
        recipe: whose values are varied.
        points: to run.
        base: for the relative paths of task files.
        dry_run: to write nothing.

    Raises:
        AlterError: with every mistake, or where the folder holds another sweep.
    """
    configs = check_points(recipe.config, points, base)
    monitors = {_monitor(config) for config in configs}
    if len(monitors) > 1:
        raise AlterError(
            f"--set: the points choose their checkpoints by different metrics ({', '.join(sorted(m for m, _ in monitors))}), so "
            "they cannot be ranked; sweep one of them at a time."
        )
    ((metric, mode),) = monitors
    known = {
        "metric": metric,
        "mode": mode,
        "start": str(Path.cwd()),
        "test": recipe.config["test"],
        "paths": import_paths(),
        "points": list(points),
        "recipe": recipe.config,
    }
    file = folder / SWEEP
    if file.is_file() and (changed := _changed(json.loads(file.read_text()), json.loads(json.dumps(known)))):
        raise AlterError(
            f"{file}: this sweep was started with other settings (it differs in {', '.join(changed[:5])}"
            f"{' and more' if len(changed) > 5 else ''}); give a new folder with --out, or remove {folder}."
        )
    sweep = Sweep(folder, list(points), metric, mode, known["start"], known["test"], known["paths"])
    if not dry_run:  # also of a sweep that goes on, perhaps elsewhere than it began
        for number, config in zip(sweep.numbers, configs, strict=True):
            sweep.cell(number).mkdir(parents=True, exist_ok=True)
            write_text(sweep.recipe(number), dump(config | {"run": str(sweep.cell(number).absolute()), "test": False}))
        # Last: it says that the recipes are there. With infinities, which a recipe may have and ``write_json`` has not.
        write_text(file, json.dumps(known, indent=2) + "\n")
    return sweep


def read_sweep(folder: Path) -> Sweep:
    """A sweep that was started.

    Raises:
        AlterError: the folder holds none.
    """
    file = folder / SWEEP
    if not file.is_file():
        raise AlterError(f"{folder}: no sweep is there (it has no {SWEEP}); name the folder that `alter sweep` told.")
    known = json.loads(file.read_text())
    for path in known["paths"]:
        find_classes_in(Path(path))
    names = ("points", "metric", "mode", "start", "test", "paths")
    return Sweep(folder, **{name: known[name] for name in names})


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two plans differ that changes a cell or makes it one that cannot be ranked with the others."""
    keys = ("metric", "mode", "start", "points")
    recipe = differences(before["recipe"], now["recipe"])
    fixed = [key for key in recipe if key.split(".")[0] in ("stages", "backbone")]  # a run by itself may change them
    return differences({k: before[k] for k in keys}, {k: now[k] for k in keys}) + fixed + compared(recipe)


def _monitor(config: Config) -> tuple[str, str]:
    """What the last stage's checkpoints are chosen by, and whether less or more of it is better."""
    if not config["stages"]:
        raise AlterError(
            "stages: a sweep ranks by what the last one is validated by, and there is none; name stage1 or both."
        )
    from lightning.pytorch.callbacks import ModelCheckpoint

    trainer = stage_trainer(config, config["stages"][-1])
    for class_path, arguments in named_callbacks(trainer):
        if arguments.get("monitor") and issubclass(import_name(class_path, "trainer.callbacks"), ModelCheckpoint):
            return arguments["monitor"], arguments.get("mode", "min")
    return "val/loss", "min"
