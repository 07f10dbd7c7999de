"""Runs the cells of a sweep: some at once on this machine, or as a job array on SLURM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alter.cells import LOG, run_cells
from alter.slurm import Job, sbatch
from alter.sweep.plan import JOBS, Sweep
from alter.writing import write_json, write_text

ARRAY = "array.sh"


def run_here(sweep: Sweep, numbers: Sequence[int], processes: int) -> None:
    """Runs cells in processes of their own; one that fails is told, and the others go on."""
    by_folder = {sweep.cell(number): number for number in numbers}
    run_cells(
        list(by_folder),
        lambda cell: ["-m", "alter.sweep.cell", str(sweep.folder.absolute()), str(by_folder[cell])],
        lambda cell: f"cell {cell.name}",
        processes,
    )


def array_script(sweep: Sweep, numbers: Sequence[int], job: Job, config: Mapping[str, Any], at_once: int) -> str:
    """The batch script of a job array, an index for each cell.

    Args:
        sweep: whose cells.
        numbers: of the cells.
        job: of one cell.
        config: the recipe.
        at_once: how many may run at a time; 0 for as many as there is room for.
    """
    settings = job.trainer(config)
    flags = [word for key, value in settings.items() for word in (f"--trainer.{key}", str(value))]
    command = ["-m", "alter.sweep.cell", str(sweep.folder.absolute()), "$SLURM_ARRAY_TASK_ID", *flags]
    limit = f"%{at_once}" if at_once else ""
    name = f"alter-{sweep.folder.absolute().name}"
    return job.script(name, sweep.folder / "cells" / "%3a" / LOG, command, f"{_ranges(numbers)}{limit}")


def submit_array(sweep: Sweep, numbers: Sequence[int], script: str) -> str:
    """Submits cells by their script; returns the array's number."""
    file = sweep.folder / ARRAY
    write_text(file, script)
    array = sbatch(file)
    write_json(sweep.folder / JOBS, {**sweep.jobs, **{str(number): f"{array}_{number}" for number in numbers}})
    return array


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3 and 7 as ``1-3,7``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
