"""One cell of the grid: a method with a seed, trained, and its answers written down."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from alter import __version__
from alter.cells import only_one
from alter.compare import handover
from alter.compare.baselines import SETTINGS, BaselineModel
from alter.data import Task
from alter.errors import AlterError, Diverged
from alter.evaluate import answers
from alter.inside import gates_by_task
from alter.loading import answering_device, load, made_on
from alter.machine import hardware, is_first
from alter.metrics import bootstrap, metric
from alter.nn.backbone import load_backbone, load_tokenizer, resolve_backbone
from alter.nn.decoding import Generation
from alter.nn.model import MTAModel
from alter.predict import Predictor
from alter.recipe import Recipe, read_recipe
from alter.run import fit
from alter.run_folder import peak_memory, stage_records
from alter.stopping import stoppable
from alter.writing import write_json

PLAN = "cell.json"
CLOCK = "seconds.json"  # of a cell that is not complete
DRAWS = "draws of "  # before a task's name among arrays, where numpy has names of its own
TRAINED = "trained"  # in place of a split: no test row is answered

Answered = list[tuple[Task, list[str], list[str]]]  # answers and targets


def cell_folder(folder: Path, method: str, seed: int, factor: float) -> Path:
    """Of a comparison, the folder of one cell."""
    return folder / "cells" / method / (f"seed{seed}" if factor == 1.0 else f"seed{seed}-lr{factor:g}")


def run_cell(folder: Path, split: str) -> None:
    """Trains what a cell's plan names and is not trained yet, then answers the rows of the split.

    Args:
        folder: holds ``cell.json``: ``recipes`` (files in the folder), ``trains`` and ``runner``. Leaves ``SPLIT.jsonl``, a
            line a row with task, target and answer, ``SPLIT.npz`` with each task's first metric on resampled rows, and
            ``SPLIT.json`` with what was measured.
        split: whose rows to answer; ``trained`` is for training alone, so that trials of learning rates read no test rows.
    """
    plan, commit = json.loads((folder / PLAN).read_text()), _commit()
    recipes = [read_recipe(["--config", str(folder / file)]) for file in plan["recipes"]]
    with _clocked(folder) as seconds_so_far:
        try:
            result = _train_and_measure(recipes, plan, split)
        except Diverged as error:
            if split != TRAINED:
                raise
            # What a trial finds out: this rate will not do.
            result = {"validation_loss": None, "diverged": str(error), "tokens": 0, "step_seconds": 0.0}, []
        if not is_first():
            return  # of a training's several processes; an exit status of failure would end the first one
        found, answered = result
        seconds = found.pop("step_seconds")
        found |= {
            "tasks": {
                task.name: {name: metric(name, said, targets, task.choices).value() for name in task.metrics}
                for task, said, targets in answered
            },
            "tokens_per_second": found["tokens"] / seconds if seconds else None,
            "seconds": seconds_so_far(),
            "hardware": hardware(),
            "commit": commit,
        }
        if answered:
            _write_answers(folder, split, answered)
        write_json(folder / f"{split}.json", found)  # last: it says that the cell is complete
    (folder / CLOCK).unlink()
    for checkpoints in folder.glob("*/stage*/checkpoints"):
        shutil.rmtree(checkpoints)  # the models stay


@contextmanager
def _clocked(folder: Path) -> Iterator[Callable[[], float]]:
    """Gives what tells the seconds so far: of this start, and of those before that were interrupted or have failed, if not killed."""
    file, started = folder / CLOCK, time.perf_counter()
    before = json.loads(file.read_text()) if file.is_file() else 0.0
    try:
        yield lambda: before + time.perf_counter() - started
    finally:
        if is_first():
            write_json(file, before + time.perf_counter() - started)


def _commit() -> str:
    """The commit of a checkout, else the version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return f"version {__version__}"
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or f"version {__version__}"


def _train_and_measure(recipes: Sequence[Recipe], plan: dict[str, Any], split: str) -> tuple[dict[str, Any], Answered]:
    """What was measured, and the answers; nothing of both on a training's other processes."""
    if plan["runner"] == "adapter_fusion":
        return handover.train_and_answer(recipes[0], "validation" if split == TRAINED else split)
    for recipe in recipes if plan["trains"] else ():
        fit(recipe)
    return _measure(recipes, plan, split) if is_first() else ({}, [])


def _measure(recipes: Sequence[Recipe], plan: dict[str, Any], split: str) -> tuple[dict[str, Any], Answered]:
    """What was measured, and the answers of all runs."""
    answers_too = split != TRAINED
    found: dict[str, Any] = {"routing": {}, "trainable_parameters": 0} if answers_too else {}
    answered: Answered = []
    for recipe in recipes if answers_too else ():
        answered += _answer(recipe, plan, split, found)
    records = [record for recipe in recipes for record in stage_records(recipe.run).values()]
    ends = [list(stage_records(recipe.run).values())[-1] for recipe in recipes if records]
    host, device = peak_memory(records)
    found |= {
        "tokens": sum(r["tokens"] for r in records),
        "step_seconds": sum(r["step_seconds"] for r in records),
        "peak_memory_bytes": device or host,
        "validation_loss": _mean(end["validation_loss"] for end in ends),
    }
    if ends:
        found["best"] = {**ends[0]["best"], "value": _mean(end["best"]["value"] for end in ends)}
    return found, answered


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return fmean(value for value in known if value is not None) if known and None not in known else None


def _answer(recipe: Recipe, plan: dict[str, Any], split: str, found: dict[str, Any]) -> Answered:
    backbone = resolve_backbone(recipe.config["backbone"])
    data = recipe.open_data(backbone)
    if not plan["trains"]:
        names = [task.name for task in recipe.tasks]
        ffn = recipe.config["stage1"]["model"]["init_args"].get("ffn")
        precision, device = recipe.config["precision"], answering_device(recipe.config["trainer"]["accelerator"])
        model = made_on(device, precision, lambda: MTAModel(load_backbone(str(backbone), precision), names, "all", ffn))
        generation = Generation(**recipe.config["generation"])
        predictor = Predictor(model.eval(), load_tokenizer(backbone), recipe.tasks, generation)
    else:
        baseline = (recipe.run / "model" / SETTINGS).is_file()
        predictor = load(recipe.run, str(backbone), BaselineModel if baseline else MTAModel)
    answered: Answered = []
    for task in recipe.tasks:
        examples = data.examples(task.name, split)
        print(f"{split}: {task.name}, {len(examples)} rows", flush=True)
        answered.append((task, answers(predictor, data, task.name, split), examples["target"][:]))
    if plan["trains"]:
        parts = predictor.model.part_parameters()
        backbone_parameters = parts.pop("backbone")
        trained = [p for part in parts.values() for p in part if p.requires_grad]
        trained += backbone_parameters if predictor.model.has_own_backbone else []
        found["trainable_parameters"] += sum(p.numel() for p in trained)
        if len(plan["recipes"]) == 1:
            found["routing"] = gates_by_task(predictor, data)
    return answered


def _write_answers(folder: Path, split: str, answered: Answered) -> None:
    # What the comparison draws from each task's rows: numbers alone, so that cells can be kept where answers must not be.
    draws = {
        f"{DRAWS}{task.name}": bootstrap(metric(task.metrics[0], said, targets, task.choices))
        for task, said, targets in answered
    }
    np.savez_compressed(folder / f"{split}.npz", **draws)  # type: ignore[arg-type]  # numpy's types take names for options
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
        for task, said, targets in answered:
            for answer, target in zip(said, targets, strict=True):
                row = {"task": task.name, "target": target, "answer": answer}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


@stoppable()
def main() -> None:
    """``python -m alter.compare.cell FOLDER SPLIT``: runs a cell, unless another process does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("split")
    parser.add_argument("--wait", action="store_true", help="until the other process has ended")
    options = parser.parse_args()
    try:
        with only_one(options.folder, options.wait):
            if not (options.folder / f"{options.split}.json").is_file():
                run_cell(options.folder, options.split)
    except AlterError as error:
        sys.exit("\n".join(error.messages))


if __name__ == "__main__":
    main()
