"""Where the cells of a sweep stand, best first, and the recipe of the best."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.cells import LOG, is_running, last_line
from alter.errors import AlterError
from alter.slurm import outside
from alter.sweep.plan import FAILED, RESULT, Sweep
from alter.sweep.points import Point
from alter.terminal import columns
from alter.writing import write_text
from alter.yaml_file import dump, read_yaml

BEST = "best.yaml"
OVER = ("failed", "stopped")  # not done, and nobody runs it; a stopped one was killed before it could say why


@dataclass(frozen=True)
class Row:
    """A cell.

    Attributes:
        number: of the cell.
        point: its values.
        state: done, running, failed, stopped, waiting, or SLURM's word such as pending.
        value: of the sweep's metric.
        seconds: that it took.
        said: why it failed, or the last line of its log.
    """

    number: int
    point: Point
    state: str
    value: float | None = None
    seconds: float | None = None
    said: str = ""


def rows(sweep: Sweep) -> list[Row]:
    """All cells, the best first, then those that are under way, then those that failed."""
    queue = _queue() if sweep.jobs else {}
    found = [_row(sweep, number, queue) for number in sweep.numbers]
    sign = -1 if sweep.mode == "max" else 1

    def rank(row: Row) -> tuple[int, float, int]:
        value = row.value if row.value is not None else math.inf * sign
        return (0 if row.state == "done" else 2 if row.state in OVER else 1, sign * value, row.number)

    return sorted(found, key=rank)


def _row(sweep: Sweep, number: int, queue: Mapping[str, str]) -> Row:
    cell, point = sweep.cell(number), sweep.points[number - 1]
    if (cell / RESULT).is_file():
        known = json.loads((cell / RESULT).read_text())
        return Row(number, point, "done", known["value"], known["seconds"])
    state = queue.get(sweep.jobs.get(str(number), ""))
    if state is None and is_running(cell):
        state = "running"
    if state is not None:
        return Row(number, point, state)
    if (cell / FAILED).is_file():
        return Row(number, point, "failed", said=json.loads((cell / FAILED).read_text())["said"])
    said = last_line(cell / LOG)
    return Row(number, point, "stopped" if said else "waiting", said=said)


def _queue() -> dict[str, str]:
    """The states of the user's jobs in SLURM, by their number; of those that are over there are none.

    Raises:
        AlterError: SLURM does not answer, so that cells in its queue would look as if they waited to be submitted.
    """
    try:
        done = subprocess.run(
            ["squeue", "--me", "-h", "-r", "-o", "%i %T"], env=outside(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return {}
    if done.returncode:
        said = " ".join(line.removeprefix("squeue: error: ") for line in done.stderr.splitlines())
        raise AlterError(f"squeue: SLURM does not say which cells are in its queue ({said}); try again in a while.")
    pairs = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return {job: state.lower() for job, state in pairs}


def table(sweep: Sweep, cells: Sequence[Row]) -> str:
    """The cells as a plain table, then what is to be known of those that failed."""
    keys = list(dict.fromkeys(key for point in sweep.points for key in point))
    head = ["", "cell", *keys, sweep.metric, "seconds", "state"]
    lines = [head]
    for place, row in enumerate(cells, 1):
        lines.append(
            [
                f"{place}" if row.state == "done" else "",
                f"{row.number:03d}",
                *(_shown(row.point[key]) if key in row.point else "-" for key in keys),
                "-" if row.value is None else f"{row.value:.4f}",
                "-" if row.seconds is None else f"{row.seconds:,.0f}",
                row.state,
            ]
        )
    text = [columns(lines)]
    counted = {state: sum(row.state == state for row in cells) for state in dict.fromkeys(row.state for row in cells)}
    text += ["", ", ".join(f"{count} {state}" for state, count in counted.items()) + f" of {len(cells)}"]
    for row in cells:
        if row.state in OVER:
            text.append(f"cell {row.number:03d} {row.state}: {row.said} ({sweep.cell(row.number) / LOG})")
    if any(row.state in OVER for row in cells):
        text.append(f"To try these again: alter sweep retry {shlex.quote(str(sweep.folder))}")
    return "\n".join(text)


def _shown(value: Any) -> str:
    """A value in few characters: of a class the name alone."""
    if isinstance(value, str):
        name = re.fullmatch(r"(?:[A-Za-z_]\w*\.)+([A-Z]\w*)", value)
        return name[1] if name else value if value.isprintable() else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={_shown(inner)}" for name, inner in (value.get("init_args") or {}).items())
        return f"{_shown(value['class_path'])}({arguments})"
    return json.dumps(value, ensure_ascii=False)


def write_best(sweep: Sweep, cells: Sequence[Row]) -> Path | None:
    """Writes ``best.yaml``, the best cell's recipe for a run of its own; None where no cell has been measured."""
    best = next((row for row in cells if row.state == "done" and row.value is not None), None)
    if best is None:
        return None
    folder = sweep.folder if Path.cwd() == Path(sweep.start) else sweep.folder.absolute()
    config = read_yaml(sweep.recipe(best.number)) | {"run": str(folder / "best"), "test": sweep.test}
    point = ", ".join(f"{key}={_shown(value)}" for key, value in best.point.items())
    head = (
        f"# The best of {len(cells)} cells, number {best.number:03d}: {sweep.metric} {best.value:.4f} with {point}.\n"
    )
    write_text(sweep.folder / BEST, head + dump(config))
    return sweep.folder / BEST


def best_command(sweep: Sweep, file: Path) -> str:
    """What runs ``best.yaml``: where the sweep was started, and with the modules that stood beside its recipe."""
    modules = set(re.findall(r"class_path: (\w+)\.", file.read_text(encoding="utf-8"))) - {"alter"}
    beside = [path for path in sweep.paths if path != sweep.start and any(_holds(path, module) for module in modules)]
    paths = f"PYTHONPATH={shlex.quote(os.pathsep.join(beside))} " if beside else ""
    place = "" if Path.cwd() == Path(sweep.start) else f"cd {shlex.quote(sweep.start)} && "
    return f"{place}{paths}alter fit --config {shlex.quote(str(file.absolute() if place else file))}"


def _holds(path: str, module: str) -> bool:
    return any((Path(path) / name).exists() for name in (f"{module}.py", module))
