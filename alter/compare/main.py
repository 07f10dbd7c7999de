"""The verb: reads the arguments, runs the grid, writes the tables."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from alter.compare.grid import SEEDS, Grid, Planner, run_grid
from alter.compare.methods import METHODS, Method, find_method
from alter.compare.summary import summarise
from alter.compare.tables import markdown, page, routing_pictures, with_heatmaps
from alter.errors import AlterError
from alter.precision import AUTO, choose_precision
from alter.recipe import Recipe, read_recipe, recipe_arguments
from alter.writing import write_json, write_text
from alter.yaml_file import dump, read_yaml

DEFAULT = "untouched,full,shared,alone,peft_lora,peft_poly,stage1,one_stage,two_stage"


def compare(arguments: Sequence[str]) -> None:
    """Runs or resumes a comparison; what is not an option of its own goes to the recipe, as in ``alter fit``.

    Raises:
        AlterError: an argument or the recipe is wrong, or cells have failed.
    """
    options, flags = _parser().parse_known_args(arguments)
    if options.processes < 1:
        raise AlterError(f"--processes: {options.processes} is below 1; give how many cells run at once.")
    methods = _methods([method.strip() for method in options.methods.split(",")])
    recipe = read_recipe(recipe_arguments(options.config, flags), here=False)
    if recipe.config["stages"] != ["stage1", "stage2"]:
        raise AlterError("stages: a comparison starts from a recipe with both stages; leave the key out.")
    folder = options.out or Path("runs/compare") / recipe.run.name
    kept = folder / "comparison.yaml"
    _complete(recipe)
    recipe.config["precision"] = _precision(recipe, kept)
    grid = Grid(
        folder,
        recipe,
        methods,
        _seeds(options.seeds),
        options.split,
        _factors(options.tune),
        options.processes,
    )
    planner = Planner(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():  # what began it; another call's cells may be refused
        write_text(kept, dump(recipe.config))
    cells, seconds = run_grid(grid, planner)
    result = summarise(cells, methods, recipe.tasks, options.split)
    result |= {
        "backbone": planner.backbone,
        "parameter_budget": planner.budget.parameters,
        "command": shlex.join(["alter", "compare", *arguments]),
        "hours": round(seconds / 3600, 2),
    }
    write_json(folder / "compare.json", result)
    title = f"Comparison on {recipe.run.name}"
    text, drawn = markdown(result), routing_pictures(result)
    write_text(folder / "compare.md", with_heatmaps(text, drawn, folder))
    write_text(folder / "compare.html", page(result, title, drawn))
    print(f"\n{text}\nWritten to {folder}: compare.json, compare.md, compare.html")


def _complete(recipe: Recipe) -> None:
    """Gives classes without arguments an empty mapping of them, which the methods change."""
    for stage in ("stage1", "stage2"):
        for part in ("expert", "router"):
            recipe.config[stage]["model"]["init_args"][part].setdefault("init_args", {})


def _precision(recipe: Recipe, kept: Path) -> str:
    """What ``auto`` stands for: a comparison that has begun keeps its precision, on whatever machine it goes on."""
    begun = recipe.config["precision"] == AUTO and kept.is_file()
    return str(read_yaml(kept)["precision"]) if begun else choose_precision(recipe.config)


def _methods(given: Sequence[str]) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for argument in given:
        name, method = find_method(argument)
        if name in methods:
            raise AlterError(
                f"--methods: '{argument}' is a second method named '{name}'; rename the file, or leave one out."
            )
        methods[name] = method
    return methods


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alter compare",
        description="Compares methods of tuning one backbone on a recipe's tasks. Other flags go to the recipe.",
        epilog="methods:\n" + "\n".join(f"  {name:<12}{method.about}" for name, method in METHODS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="the two-stage recipe; again for an overlay")
    parser.add_argument(
        "--methods", default=DEFAULT, help="names with commas between, or YAML files laid over the recipe; all but the "
        "router designs and adapter_fusion by default",
    )  # fmt: skip
    parser.add_argument("--seeds", default="3", help="how many, or a list with commas (42, is one)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="validation while tuning")
    parser.add_argument(
        "--tune", default="1", metavar="FACTORS",
        help="factors on every method's learning rate, such as 0.5,1,2, tried with the first seed and chosen by "
        "validation loss",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="cells run at once")
    parser.add_argument("--out", type=Path, help="the folder; the same command in the same folder goes on")
    return parser


def _seeds(given: str) -> list[int]:
    try:
        numbers = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," in given and len(set(numbers)) == len(numbers) > 0:
        return numbers
    if len(numbers) != 1 or not 1 <= numbers[0] <= len(SEEDS):
        raise AlterError(
            f"--seeds: '{given}' is neither a count from 1 to {len(SEEDS)} nor a list such as 13,21,42 or 42,."
        )
    return list(SEEDS[: numbers[0]])


def _factors(given: str) -> list[float]:
    try:
        factors = [float(part) for part in given.split(",")]
    except ValueError:
        factors = []
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise AlterError(f"--tune: '{given}' is not a list of positive factors such as 0.5,1,2.")
    return factors
