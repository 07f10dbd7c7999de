"""Reads a finished run, or what ``save_pretrained`` wrote: ``alter.load``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alter.data import Task
from alter.errors import AlterError, in_short
from alter.guess import read_task_predictor
from alter.nn.backbone import QUANTISED, load_tokenizer, resolve_backbone
from alter.nn.decoding import Generation
from alter.nn.files import CONFIG_FILE, read_config
from alter.nn.model import MTAModel
from alter.precision import answering_precision
from alter.predict import Predictor
from alter.yaml_file import read_yaml

CALIBRATION_FILE = "calibration.json"


def load(
    run: str | Path,
    backbone: str | None = None,
    kind: type[MTAModel] = MTAModel,
    stage: str | None = None,
    device: str | None = None,
) -> Predictor:
    """Loads a finished run, or what ``save_pretrained`` wrote.

    Args:
        run: the folder.
        backbone: where the backbone is, when not where it was.
        kind: of the model, for one that is not an `MTAModel` itself.
        stage: whose model, of a run folder; by default that of the last.
        device: that answers; by default the GPU where there is one, unless the run's ``trainer.accelerator`` is ``cpu``.

    Raises:
        AlterError: the folder holds no finished run, or it is damaged; or this machine has no such device.
    """
    run = Path(run)
    content, folder = run_recipe(run), model_folder(run, stage)
    tasks = [Task.from_run(entry, str(run / "recipe.yaml")) for entry in content["data"]["tasks"]]
    where = resolve_backbone(backbone or read_config(folder)["backbone"]["name"])
    accelerator = str((content.get("trainer") or {}).get("accelerator") or "auto")
    device = _checked_device(device) if device else answering_device(accelerator)
    precision = answering_precision(content["precision"], "cpu" if device == "cpu" else accelerator)
    model = made_on(device, precision, lambda: kind.from_pretrained(folder, str(where), precision))
    by_name = {task.name: task for task in tasks}
    generation = Generation(**content.get("generation", {}))
    names = answered_tasks(run, folder) if stage else [name for name in model.tasks if name not in model.retired]
    found = Predictor(model.settle(), load_tokenizer(where), [by_name[name] for name in names], generation)
    found.folder, found.stage = run, stage
    found.temperatures = read_temperatures(folder)
    found.task_predictor = read_task_predictor(folder)
    return found


def _checked_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise AlterError(
            f"device: there is no '{device}' here ({in_short(error)}); leave it out for the machine's own, or give cpu."
        ) from error
    return device


def answering_device(accelerator: str = "auto") -> str:
    """Where a finished run answers: on the GPU where there is one, unless its recipe's accelerator is ``cpu``."""
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def made_on(device: str, precision: str, make: Callable[[], MTAModel]) -> MTAModel:
    """Makes a model that is on a device afterwards; with quantised maps there, since these cannot move."""
    if precision not in QUANTISED:
        return make().to(device)
    with torch.device(device):
        return make()


def model_folder(run: Path, stage: str | None = None) -> Path:
    """Where the model of a run or of one of its stages is, or of a folder that ``save_pretrained`` wrote: the folder itself."""
    if stage:
        return run / stage / "model"
    return run if (run / CONFIG_FILE).is_file() else run / "model"


def answered_tasks(run: Path, folder: Path) -> list[str]:
    """The tasks of a run's model folder that the run still answers, in the order of their ids.

    An earlier stage's model still has those that were removed since, whose names others may have taken meanwhile.

    Raises:
        AlterError: it answers none of them.
    """
    found = still_answered(run, folder)
    if not found:
        raise AlterError(f"{folder}: all tasks of this model were removed from the run; leave the stage out.")
    return found


def still_answered(run: Path, folder: Path) -> list[str]:
    """The same, and none where all have left."""
    now, then = read_config(model_folder(run)), read_config(folder)
    still = zip(then["tasks"], now["tasks"], strict=False)  # a task that joined later stands behind them
    return [name for name, same in still if name == same and name not in now.get("retired", [])]


def run_recipe(run: Path) -> dict[str, Any]:
    """Reads the recipe of a run.

    Raises:
        AlterError: there is none.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise AlterError(f"{run}: no run here, recipe.yaml is missing; name a folder that `alter fit` has written.")
    content = read_yaml(recipe)
    if not (isinstance(content, dict) and isinstance(content.get("data"), dict) and "precision" in content):
        raise AlterError(f"{recipe}: not the recipe of a run; copy or train it again.")
    if not all(isinstance(task, dict) for task in content["data"].get("tasks") or [None]):
        raise AlterError(f"{run}: no run here, its recipe.yaml is one to train: alter fit --config {recipe}.")
    return content


def read_temperatures(folder: Path) -> dict[str, float]:
    """The temperatures of a model folder; none where it is not calibrated.

    Raises:
        AlterError: the file is damaged.
    """
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return {}
    try:
        return {name: float(task["temperature"]) for name, task in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AlterError(
            f"{file}: not a readable calibration ({error}); remove it, `alter test` makes it again."
        ) from error
