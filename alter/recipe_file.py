"""What one recipe file, or an overlay of a recipe, may say: keys that are misspelt and values that do not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer

from alter import run_folder
from alter.data import MultiTaskDataModule
from alter.errors import AlterError, did_you_mean
from alter.nn import TrunkCache
from alter.nn.decoding import Generation
from alter.schema import check, check_class
from alter.stages import Stage1Module, Stage2Module, StageModule
from alter.yaml_file import read_yaml

STAGES: dict[str, type[StageModule]] = dict(zip(run_folder.STAGES, (Stage1Module, Stage2Module), strict=True))
SET_BY_RUN = {"backbone", "tasks", "precision", "trunk_cache", "start_from"}  # of a stage, from the recipe's own keys
TRAINER_SKIP = {"default_root_dir", "logger", "use_distributed_sampler", "enable_model_summary", "barebones"}
DATA_SKIP = {"tokenizer", "seq2seq"}


def read_content(file: Path) -> dict[str, Any]:
    """What a recipe file or an overlay says.

    Raises:
        AlterError: it cannot be read, or is no mapping.
    """
    content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise AlterError(
            f"{file}: a recipe is a mapping of sections such as data and stage1, this is {type(content).__name__}."
        )
    return content


def check_content(content: Mapping[str, Any], file: str) -> list[str]:
    """Finds all misspelt keys and misfit values of what a recipe file says."""
    problems = list[str]()
    plain = {"run": str, "stages": list, "test": bool, "seed_everything": int, "backbone": str, "precision": str}
    sections = {
        "trunk_cache": (TrunkCache, set()),
        "generation": (Generation, set()),
        "data": (MultiTaskDataModule, DATA_SKIP),
        "trainer": (Trainer, TRAINER_SKIP),
    }
    known = [*plain, *sections, *STAGES]
    for key, value in content.items():
        where = f"{file}: {key}"
        if key not in known:
            problems.append(
                f"{file}: unknown key '{key}'; a recipe has {', '.join(known)}.{did_you_mean(str(key), known)}"
            )
        elif key in plain:
            if not isinstance(value, plain[key]):
                problems.append(f"{where}: expected {plain[key].__name__}, got {value!r}.")
        elif not isinstance(value, Mapping):
            problems.append(f"{where}: expected a mapping of settings, got {value!r}.")
        elif key in STAGES:
            problems += _check_stage(STAGES[key], value, where)
        else:
            cls, skipped = sections[key]
            problems += check(cls, value, where, skip=skipped)
    return problems


def _check_stage(default: type[StageModule], section: Mapping[str, Any], where: str) -> list[str]:
    problems = [
        f"{where}: unknown key '{key}'; a stage has model and trainer.{did_you_mean(str(key), ['model', 'trainer'])}"
        for key in section
        if key not in ("model", "trainer")
    ]
    if isinstance(trainer := section.get("trainer", {}), Mapping):
        problems += check(Trainer, trainer, f"{where}.trainer", skip=TRAINER_SKIP)
    model = section.get("model", {})
    if not isinstance(model, Mapping):
        return [*problems, f"{where}.model: expected class_path and init_args, got {model!r}."]
    return problems + check_class(model, StageModule, f"{where}.model", default, SET_BY_RUN)
