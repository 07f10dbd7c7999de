"""The verb: reads the arguments, plans and runs the cells, shows where they stand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from alter.errors import AlterError

if TYPE_CHECKING:
    from alter.slurm import Job
    from alter.sweep.plan import Sweep

DESCRIPTION = "Varies values of a recipe, trains each point and ranks them by validation. Other flags go to the recipe."
EPILOG = """of a sweep that was started:
  alter sweep status DIR     where its cells stand, the best first
  alter sweep results DIR    the same, and best.yaml, which alter fit --config takes
  alter sweep retry DIR      runs the cells that failed or were stopped again (with --local or --slurm)

values: those of a YAML list without its brackets, so commas part them: 1,2,5; lists are [a,b],[c]; text with a comma
'one, two',three; a class with arguments {class_path: alter.nn.TopK, init_args: {k: 2}}. With --random also ranges:
log(1e-5,1e-3), uniform(0,1), int(1,8)."""


def sweep(arguments: Sequence[str]) -> None:
    """Runs, resumes or shows a sweep.

    Raises:
        AlterError: an argument, a value or the recipe is wrong, or cells have failed.
    """
    if arguments[:1] and arguments[0] in ("status", "results", "retry"):
        return _started(arguments[0], arguments[1:])
    options, flags = parser().parse_known_args(arguments)
    from alter.recipe import read_recipe, recipe_arguments
    from alter.sweep.plan import plan

    points = _points(options)
    recipe = read_recipe(recipe_arguments(options.config, flags), here=False)
    folder = options.out or Path("runs/sweep") / recipe.run.name
    base = Path(options.config[0]).parent
    planned = plan(folder, recipe, points, base, options.dry_run)
    _run(planned, options, recipe.config, again=False)


def parser(**settings: Any) -> argparse.ArgumentParser:
    """The options of ``alter sweep``; what is none of them goes to the recipe."""
    parser = argparse.ArgumentParser(
        prog="alter sweep",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )
    parser.add_argument("--config", action="append", required=True, help="a recipe; again for an overlay")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUES", help="what to vary; again for more")
    parser.add_argument("--random", type=int, metavar="N", help="N points at random in place of the whole grid")
    parser.add_argument("--seed", type=int, default=13, help="of these; 13 by default")
    parser.add_argument("--points", type=Path, metavar="FILE", help="the points as YAML, a list of mappings, for --set")
    parser.add_argument("--out", type=Path, help="the folder; the same command in the same folder goes on")
    _add_places(parser)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    from alter.slurm import add_options

    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", type=int, default=1, metavar="N", help="on this machine, N at once; the default, 1")
    where.add_argument(
        "--slurm", type=int, nargs="?", const=0, metavar="N", help="as a job array on SLURM, at most N at once"
    )
    add_options(parser)


def _points(options: argparse.Namespace) -> list[dict[str, Any]]:
    from alter.sweep.points import drawn, grid, read_points, read_sets

    if bool(options.set) == bool(options.points):
        raise AlterError("alter sweep: say what to vary, either by --set KEY=VALUES or by --points FILE.")
    if options.points:
        if options.random is not None:
            raise AlterError(
                "alter sweep: --random draws from --set, and --points lists every point; give one of them."
            )
        return read_points(options.points)
    sets = read_sets(options.set)
    if options.random is None:
        return grid(sets)
    if options.random < 1:
        raise AlterError(f"--random {options.random}: ask for one point at least.")
    return drawn(sets, options.random, options.seed)


def _started(what: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"alter sweep {what}", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", type=Path, help="of the sweep")
    if what == "retry":
        _add_places(parser)
    options = parser.parse_args(arguments)
    from alter.sweep.plan import read_sweep
    from alter.yaml_file import read_yaml

    found = read_sweep(options.folder)
    if what == "retry":
        _run(found, options, read_yaml(found.recipe(1)), again=True)
    else:
        _show(found, best=what == "results")


def _run(found: Sweep, options: argparse.Namespace, config: dict[str, Any], again: bool) -> None:
    """Runs the cells that wait, or those that failed, here or on SLURM."""
    from alter.slurm import read_options
    from alter.sweep.table import OVER, rows, table

    if options.local < 1 or (options.slurm is not None and options.slurm < 0):
        raise AlterError("--local, --slurm: give a number from 1.")
    cells = rows(found)
    wanted = OVER if again else ("waiting", "stopped")
    todo = sorted(row.number for row in cells if row.state in wanted)
    job = read_options(options, config)
    if Path.cwd() != Path(found.start):
        found = replace(found, folder=found.folder.absolute())
    if options.dry_run:
        print(table(found, cells))
    if not todo or (options.dry_run and options.slurm is None):
        return None if options.dry_run else _show(found, best=True)
    if not Path(found.start).is_dir():
        raise AlterError(
            f"{found.folder}: the sweep was started in {found.start}, from where its recipe's paths are, and that folder is gone; "
            "put it back, or start the sweep anew."
        )
    if options.slurm is None:
        return _run_here(found, todo, options.local)
    with chdir(found.start):  # the recipes' relative paths are from there
        return _run_on_slurm(found, todo, job, config, options)


def _run_here(found: Sweep, todo: Sequence[int], processes: int) -> None:
    from alter.sweep.run import run_here
    from alter.sweep.table import OVER, rows

    print(f"{len(found.points)} cells, {len(todo)} to run, in {found.folder}", flush=True)
    with chdir(found.start):  # the recipes' relative paths are from there
        run_here(found, todo, processes)
    _show(found, best=True)
    failed = sum(row.state in OVER for row in rows(found))
    if failed:
        raise AlterError(
            f"{failed} of {len(found.points)} cells have failed; to try them again: alter sweep retry {quote(str(found.folder))}"
        )


def _run_on_slurm(
    found: Sweep, todo: Sequence[int], job: Job, config: dict[str, Any], options: argparse.Namespace
) -> None:
    from alter.sweep.run import array_script, submit_array

    script = array_script(found, todo, job, config, options.slurm)
    if options.dry_run:
        print(f"\n{script}", end="")
        return
    print(f"Job array {submit_array(found, todo, script)}: {len(todo)} of {len(found.points)} cells.")
    print(f"Where they stand: alter sweep status {quote(str(found.folder))}")


def _show(found: Sweep, best: bool) -> None:
    from alter.sweep.table import best_command, rows, table, write_best

    cells = rows(found)
    print(table(found, cells))
    if not best:
        return
    file = write_best(found, cells)
    if file is None:
        known = "measured by a validation" if any(row.state == "done" for row in cells) else "done"
        print(f"No cell is {known}, so there is no best one yet.")
    else:
        print(f"\nThe best recipe: {best_command(found, file)}")
        print(f"Its run, trained and not yet tested: alter test --run {quote(str(found.cell(cells[0].number)))}")
