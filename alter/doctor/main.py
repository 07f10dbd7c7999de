"""The verb: runs every check and prints a line for each as it is done."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alter.doctor import checks
from alter.doctor.checks import Line
from alter.errors import AlterError
from alter.nn.backbone import load_tokenizer, resolve_backbone
from alter.recipe import read_recipe, recipe_arguments
from alter.run import quiet
from alter.terminal import width

COLOURS = {True: "\033[32m", False: "\033[31m", None: "\033[2m"}


def doctor(arguments: Sequence[str]) -> bool:
    """Looks at a recipe; what is not an option of its own goes to the recipe, as in ``alter fit``.

    Returns:
        whether there was no cross.
    """
    options, flags = _parser().parse_known_args(arguments)
    quiet()
    good = True
    for line in _lines(recipe_arguments(options.config, flags), not options.no_trial):
        good = good and line.good is not False
        print(_shown(line), flush=True)
    print("\nNo cross: alter fit will do." if good else "\nMend what has a cross, and look again.")
    return good


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alter doctor",
        description="Looks at a recipe's data, backbone and machine: a tick or a cross a line. Other flags go to the recipe.",
        epilog="Exits with 1 where there is a cross. The trial trains a few steps in a temporary folder, in a minute or two.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, help="the recipe; again for an overlay")
    parser.add_argument("--no-trial", action="store_true", help="leave out the trial, which tells memory and time")
    return parser


def _lines(arguments: Sequence[str], with_trial: bool) -> Iterator[Line]:
    try:
        recipe = read_recipe(arguments)
    except AlterError as error:
        yield from (Line(False, "recipe", message) for message in error.messages)
        return
    stages = " and ".join(recipe.config["stages"])
    yield Line(True, "recipe", f"{len(recipe.tasks)} tasks, {stages}, run folder {recipe.run}")
    accelerator = recipe.config["trainer"].get("accelerator") or "auto"
    machine = list(checks.machine(recipe.config["precision"], accelerator))
    try:
        folder = resolve_backbone(recipe.config["backbone"])
        tokenizer = load_tokenizer(folder)
    except AlterError as error:
        yield from (Line(False, "backbone", message) for message in error.messages)
        yield from machine
        return
    bad = 0
    tasks = []
    for task in recipe.tasks:
        try:
            data = replace(recipe, tasks=[task]).open_data(folder)
        except AlterError as error:
            bad += 1
            yield from (Line(False, "data", message) for message in error.messages)
            continue
        tasks.append(task)
        task = data.tasks[0]
        yield checks.readable(task, data)
        yield checks.disjoint(task, data)
        if (line := checks.balance(task, data)) is not None:
            yield line
        yield checks.lengths(task, data, tokenizer.eos_token_id)
        yield checks.spelled(task, data, tokenizer)
        yield checks.examples(task, data)
    if tasks:
        yield checks.rates(replace(recipe, tasks=tasks).open_data(folder))
    model = recipe.config["stage1"]["model"].get("init_args") or {}
    found = checks.backbone(recipe.config["backbone"], folder, recipe.config["precision"], model)
    yield found
    yield from machine
    if bad or not all(line.good is not False for line in [found, *machine]):
        yield Line(None, "trial", "of memory and time: not made, since there is a cross above")
    elif with_trial:
        yield from _trial(arguments)


def _trial(arguments: Sequence[str]) -> Iterator[Line]:
    """Memory and time, from a few steps in a process of its own, which may run out of memory without harm."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "trial.json")
        command = [sys.executable, "-m", "alter.doctor.trial", str(output), *arguments]
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds what this process finds
        done = subprocess.run(command, env=paths, capture_output=True, text=True)
        if done.returncode == 0:
            found = json.loads(output.read_text())
    if done.returncode < 0 or "out of memory" in done.stderr.lower():
        yield Line(False, "memory", f"a trial of a few steps ran out of it; {checks.LESS_MEMORY}.")
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        yield Line(False, "trial", f"a few steps failed: {last[0]}; alter fit --debug shows where.")
        return
    for stage, parameters in found["trainable"].items():
        yield Line(None, "trains", f"{stage}: {parameters:,} parameters")
    yield checks.fits(found["memory"], checks.available_memory(), "host")
    if found["device_memory"]:
        import torch

        yield checks.fits(found["device_memory"], torch.cuda.mem_get_info()[0], "device")
    yield _time(found["seconds"])


def _time(seconds: Mapping[str, float | None]) -> Line:
    known = {step: number for step, number in seconds.items() if number is not None}
    parts = ", ".join(f"{step} {_duration(number)}" for step, number in known.items())
    if endless := " and ".join(step for step in seconds if step not in known):
        rest = f"; the rest: {parts}" if known else ""
        return Line(None, "time", f"not known, since neither trainer.max_epochs nor max_steps ends {endless}{rest}")
    return Line(True, "time", f"about {_duration(sum(known.values()))} on this machine as it is now ({parts})")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _shown(line: Line) -> str:
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    mark = {True: "ok" if plain else "✓", False: "NO" if plain else "✗", None: "-" if plain else "·"}[line.good]
    first = f"{mark} {line.topic:<13}"
    text = textwrap.fill(
        line.text, width(), initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
    indent = " " * len(first)
    for part in line.detail:
        text += "\n" + (textwrap.fill(part, width(), initial_indent=indent, subsequent_indent=f"{indent}  ") or indent)
    if plain:
        text = text.replace("█", "#")
    return f"{COLOURS[line.good]}{text[: len(mark)]}\033[0m{text[len(mark) :]}" if sys.stdout.isatty() else text
