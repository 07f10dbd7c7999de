"""One cell of a sweep: a run, and what its validation said."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from alter.requeue import REQUEUE, leave_allocation
from alter.stopping import stoppable


@stoppable()
def main() -> None:
    """``python -m alter.sweep.cell SWEEP NUMBER [FLAGS OF THE RECIPE]``: runs a cell, unless another process does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("--wait", action="store_true", help="until the other process has ended")
    options, flags = parser.parse_known_args()
    leave_allocation()
    REQUEUE.listen()
    from alter.cells import only_one
    from alter.errors import AlterError
    from alter.machine import is_first
    from alter.sweep.plan import FAILED, RESULT, read_sweep
    from alter.writing import write_json

    sweep = read_sweep(options.folder)
    cell = sweep.cell(options.number)
    with only_one(cell, options.wait):
        if (cell / RESULT).is_file():
            return
        (cell / FAILED).unlink(missing_ok=True)
        try:
            place = ["--run", str(cell.absolute())]  # wherever the sweep has moved
            known = _run(sweep.recipe(options.number), [*flags, *place])
            if is_first():
                write_json(cell / RESULT, known)
        except Exception as error:
            traceback.print_exc()
            said = " ".join(error.messages) if isinstance(error, AlterError) else f"{type(error).__name__}: {error}"
            write_json(cell / FAILED, {"said": said})
            sys.exit(f"alter: {said}")


def _run(recipe_file: Path, flags: list[str]) -> dict[str, float | None]:
    from alter.recipe import read_recipe
    from alter.run import fit
    from alter.run_folder import records, stage_records

    recipe = read_recipe(["--config", str(recipe_file), *flags])
    fit(recipe)
    stages = stage_records(recipe.run)
    return {
        "value": stages[recipe.config["stages"][-1]]["best"]["value"],
        "seconds": sum(record["seconds"] for record in records(recipe.run).values()),
        "trainable_parameters": max(record["trainable_parameters"] for record in stages.values()),
    }


if __name__ == "__main__":
    main()
