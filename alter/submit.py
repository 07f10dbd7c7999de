"""`alter submit`: a run as a job of SLURM."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alter.slurm import add_options, read_options, sbatch

if TYPE_CHECKING:
    from alter.recipe import Recipe

SCRIPT, RECIPE = "submit.sh", "submit.yaml"


def parser(**settings: Any) -> argparse.ArgumentParser:
    """The options of ``alter submit``; what is none of them goes to the recipe."""
    parser = argparse.ArgumentParser(
        prog="alter submit",
        description="Submits `alter fit` as a job to SLURM. Other flags go to the recipe.",
        allow_abbrev=False,
        **settings,
    )
    parser.add_argument("--config", action="append", required=True, help="a recipe; again for an overlay")
    add_options(parser)
    return parser


def submit(arguments: Sequence[str]) -> None:
    """Writes and submits the batch script of a run, or prints it.

    Raises:
        AlterError: an option or the recipe is wrong, the run folder holds another recipe, or SLURM refuses.
    """
    options, flags = parser().parse_known_args(arguments)
    from alter.recipe import read_recipe, recipe_arguments
    from alter.yaml_file import dump

    recipe = read_recipe(recipe_arguments(options.config, flags), here=False)
    _begun(recipe)
    job = read_options(options, recipe.config)
    recipe.config["trainer"] |= job.trainer(recipe.config)
    run = recipe.run
    command = ["-m", "alter", "fit", "--config", str(run / RECIPE)]
    script = job.script(f"alter-{run.name}", run / "slurm-%j.log", command)
    if options.dry_run:
        print(script, end="")
        return
    run.mkdir(parents=True, exist_ok=True)
    (run / RECIPE).write_text(dump(recipe.config), encoding="utf-8")
    (run / SCRIPT).write_text(script, encoding="utf-8")
    number = sbatch(run / SCRIPT)
    print(
        f"Job {number}: {run / SCRIPT}, its log {run / f'slurm-{number}.log'}. To see where it stands: squeue -j {number}"
    )


def _begun(recipe: Recipe) -> None:
    from alter.run_folder import begun_with

    if begun_with(recipe.run, recipe):
        print(f"{recipe.run} has begun before; the job goes on there.", file=sys.stderr)
