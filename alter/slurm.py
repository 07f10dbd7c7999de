"""Jobs for SLURM: what is asked of it, and the batch script."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alter.errors import AlterError

LEAD = 90  # seconds before the end of its time at which a job is told
# What a job asks for, by the name of sbatch's option; the names here are the same.
ASKED = {
    "time": "most time, such as 8:00:00; requeued after it until the run is done",
    "partition": "where",
    "account": "who pays",
    "mem": "memory of a node, such as 64G",
    "cpus-per-task": "cores of a process",
    "gpus-per-node": "GPUs of a node, and processes unless --tasks-per-node says otherwise",
}
GIVEN_OTHERWISE = {
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "array": "--slurm N",
    "chdir": "the folder you are in",
    **{name: f"--{name}" for name in ASKED},
}


@dataclass
class Job:
    """What a job asks SLURM for.

    Attributes:
        nodes: how many.
        tasks: processes of a node.
        asked: further options of sbatch by name; an empty value is a switch.
        setup: shell lines before the run, such as ``module load cuda``.
    """

    nodes: int = 1
    tasks: int = 1
    asked: dict[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()

    def trainer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe's trainer has to know of it: nodes, devices, and ddp for several where it names no strategy."""
        several = self.nodes * self.tasks > 1 and config["trainer"]["strategy"] == "auto"
        return {"num_nodes": self.nodes, "devices": self.tasks, **({"strategy": "ddp"} if several else {})}

    def script(self, name: str, log: Path, command: Sequence[str], array: str | None = None) -> str:
        """The batch script.

        Args:
            name: of the job.
            log: where its output goes, with sbatch's own placeholders.
            command: of every process; ``$NAME`` stands for a variable.
            array: the indices of a job array.
        """
        options = {
            "job-name": name,
            "chdir": str(Path.cwd()),
            "output": str(log.absolute()),
            "open-mode": "append",
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.tasks),
            **({"array": array} if array else {}),
            "requeue": "",
            "signal": f"SIGUSR1@{LEAD}",
            **self.asked,
        }
        lines = [f"#SBATCH --{key}{'=' + _quoted(value) if value else ''}" for key, value in options.items()]
        environment = []
        if paths := import_paths():
            environment.append(f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}")
        if cores := self.asked.get("cpus-per-task"):
            # srun does not take it from the job by itself
            environment += [f"export SRUN_CPUS_PER_TASK={cores}", f"export OMP_NUM_THREADS={cores}"]
        words = [f'"{word}"' if re.fullmatch(r"\$\w+", word) else shlex.quote(word) for word in command]
        run = f"srun --kill-on-bad-exit=1 --wait=0 {shlex.quote(sys.executable)} {' '.join(words)}"
        return "\n".join(["#!/bin/bash", *lines, "", *environment, *self.setup, run, ""])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a job asks for."""
    parser.add_argument("--nodes", type=int, help="how many; trainer.num_nodes by default")
    parser.add_argument(
        "--tasks-per-node", type=int, help="processes of a node; its GPUs, else trainer.devices, else 1"
    )
    for name, about in ASKED.items():
        parser.add_argument(f"--{name}", help=about)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE",
        help="any other option of sbatch, such as constraint=a100 or exclusive; again for more",
    )  # fmt: skip
    parser.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="a shell line before the run, such as 'module load cuda'"
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")


def read_options(options: argparse.Namespace, config: Mapping[str, Any]) -> Job:
    """What was asked for, and for the rest what the recipe's trainer says.

    Raises:
        AlterError: with every mistake.
    """
    asked = {name: getattr(options, name.replace("-", "_")) for name in ASKED}
    problems = [
        f"--{name}: '{value}' is not a number from 1; give one."
        for name, value in (
            ("nodes", options.nodes),
            ("tasks-per-node", options.tasks_per_node),
            ("cpus-per-task", asked["cpus-per-task"]),
            ("gpus-per-node", asked["gpus-per-node"]),
        )
        if value is not None and not (str(value).isdecimal() and int(value) > 0)
    ]
    further = {}
    for text in options.sbatch:
        key, _, value = text.partition("=")
        key = key.lstrip("-")
        if key in GIVEN_OTHERWISE:
            problems.append(f"--sbatch {key}: it comes from {GIVEN_OTHERWISE[key]}; give it there.")
        elif not re.fullmatch(r"[a-z][a-z-]*", key) or re.search(r"[\r\n]", value):
            problems.append(f"--sbatch: '{text}' is not KEY=VALUE with a long option of sbatch; correct it.")
        else:
            further[key] = value
    problems += [
        f"--{name}: '{value}' is more than one line; correct it."
        for name, value in asked.items()
        if value and re.search(r"[\r\n]", value)
    ]
    if problems:
        raise AlterError(*problems)
    gpus, trainer = asked["gpus-per-node"], config["trainer"]
    tasks = options.tasks_per_node or int(gpus or 0) or _number(trainer["devices"])
    nodes = options.nodes or _number(trainer["num_nodes"])
    return Job(nodes, tasks, {k: v for k, v in asked.items() if v} | further, options.setup)


def _number(given: Any) -> int:
    """How many a trainer's ``devices`` or ``num_nodes`` are; one where it leaves that open (auto, -1)."""
    if isinstance(given, str) and "," in given:  # such as 0,1
        given = given.split(",")
    if isinstance(given, list):
        return max(1, len(given))
    return int(given) if str(given).isdecimal() and int(given) > 0 else 1


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./:%@,+=\[\]-]*", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def import_paths() -> list[str]:
    """Where Python finds modules here and would not by itself, such as a router in a file beside the recipe."""
    own = [*site.getsitepackages(), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))]
    # a .zip is the library in one file, which is seldom there
    paths = [Path(path).absolute() for path in sys.path if not path.endswith(".zip")]
    return list(dict.fromkeys(str(path) for path in paths if not any(path.is_relative_to(place) for place in own)))


def outside() -> dict[str, str]:
    """The environment without that of the allocation this may be called from."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_")) or k == "SLURM_CONF"}


def sbatch(script: Path) -> str:
    """Submits a script; returns the job's number.

    Raises:
        AlterError: there is no SLURM here, or it refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], env=outside(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise AlterError(
            f"sbatch is not on the PATH, so there is no SLURM here; {script} is written and can be submitted where there is."
        ) from error
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines())
        raise AlterError(f"{script}: SLURM refuses the job ({said}); correct what it asks for.")
    return done.stdout.strip().split(";")[0]
