"""A run folder: whether it holds this recipe's run, what of it is finished, and its model."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from alter.errors import AlterError
from alter.machine import is_first, peak_device_memory_bytes, peak_memory_bytes
from alter.nn.backbone import backbone_fingerprint, resolve_backbone, whole_name
from alter.nn.files import CONFIG_FILE
from alter.writing import write_json, write_text
from alter.yaml_file import dump, read_yaml

if TYPE_CHECKING:
    from alter.recipe import Recipe

STAGES = ("stage1", "stage2")
ADDED = "added"  # a folder for each task that was added later
LOCK = ".changing"
PATIENCE = 10  # seconds; workers of a process that was killed have ended after 5
# Keys that may differ between two calls for one run folder, since they do not change what is computed.
UNCOMPARED = re.compile(
    r"run|stages.*|test|trunk_cache.*|data\.tasks\.\d+\.(license|where)|trainer\.(accelerator|devices|num_nodes|strategy)(\..*)?"
)

# Where things are, which changes no result either: a stopped run may go on elsewhere, and is then of the new place.
PLACES = re.compile(r"backbone|data\.(root|cache_dir)|data\.tasks\.\d+\.source\.init_args\.(folder|root)")


@contextmanager
def changing(run: Path) -> Iterator[None]:
    """Within, no other process trains or tests the run, or adds a task to it, or takes one out.

    Raises:
        AlterError: one does.
    """
    # Several processes of one training are one, and what is not there is not changed.
    if not is_first() or not run.is_dir():
        yield
        return
    try:
        held = FileLock(run / LOCK).acquire(timeout=PATIENCE)
    except Timeout:
        raise AlterError(
            f"{run}: another process is changing this run; wait until it has ended, or take another run folder."
        ) from None
    with held:
        yield


def claim(run: Path, recipe: Recipe) -> None:
    """Writes the recipe and the environment, or checks that the folder holds the same recipe."""
    if not is_first():
        return
    if begun_with(run, recipe):
        before = read_yaml(run / "recipe.yaml")
        if before != (moved := _with_open(before, _with_whole_name(recipe.config), _open_keys(run))):
            write_text(run / "recipe.yaml", dump(moved))
        return
    run.mkdir(parents=True, exist_ok=True)
    (run / "progress.json").unlink(missing_ok=True)  # of a start that ended before there was anything to keep
    (run / "env.txt").write_text(_environment())
    write_text(run / "recipe.yaml", recipe.text)


def begun_with(run: Path, recipe: Recipe) -> bool:
    """Whether a folder holds a run of this recipe that has begun; before, there is nothing to lose or to mix up.

    Raises:
        AlterError: it holds one of another recipe.
    """
    file = run / "recipe.yaml"
    if not has_begun(run):
        return False
    before, now = _with_whole_name(read_yaml(file)), _with_whole_name(recipe.config)
    differing = differences(before, now)
    open_keys = _open_keys(run)
    changed = [key for key in compared(differing) if not open_keys.fullmatch(key)]
    if "backbone" in differing and not _is_backbone_of(run, now["backbone"]):
        changed.insert(0, "backbone")
    finished = set(recipe.config["stages"]) <= records(run).keys()  # else a stage would train the first tasks again
    if (any(key.startswith("data.tasks") for key in changed) or not finished) and _has_grown(run):
        raise AlterError(
            f"{file}: tasks have joined or left this run since it was trained, so it is no longer the recipe's; use it as it is "
            f"(alter test --run {run}), go on with alter add-task and alter remove-task, or give a new folder with --run to "
            "train the recipe's tasks together."
        )
    if changed:
        raise AlterError(
            f"{file}: this run was started with another recipe (it differs in {', '.join(changed[:5])}"
            f"{' and more' if len(changed) > 5 else ''}); give a new folder with --run, or remove {run} to start again."
        )
    return True


def has_begun(run: Path) -> bool:
    """Whether a folder holds a run that has come as far as a checkpoint."""
    return (run / "recipe.yaml").is_file() and any(_has_begun(run, stage) for stage in STAGES)


def _with_whole_name(config: Any) -> Any:
    """A recipe whose backbone is named as runs name it; older runs have it as it was given, damaged files not at all."""
    if not isinstance(config, dict) or not isinstance(config.get("backbone"), str):
        return config
    return {**config, "backbone": whole_name(config["backbone"])}


def _is_backbone_of(run: Path, backbone: str) -> bool:
    """Whether a backbone in another place is the one that a run has begun with."""
    begun = records(run).get("data", {}).get("backbone")  # absent in runs from before it was noted
    return begun is not None and begun == backbone_fingerprint(resolve_backbone(backbone))


def _has_begun(run: Path, stage: str) -> bool:
    return any((run / stage / part).is_dir() for part in ("checkpoints", "model"))  # checkpoints may be removed


def _open_keys(run: Path) -> re.Pattern[str]:
    """Keys that another call may still change: places, and those of a stage 2 that has not begun."""
    return PLACES if _has_begun(run, "stage2") else re.compile(rf"{PLACES.pattern}|stage2(\..*)?")


def _with_open(before: Any, now: Any, open_keys: re.Pattern[str], key: str = "") -> Any:
    """The recipe of ``before``, with what ``now`` has under the open keys."""
    if open_keys.fullmatch(key):
        return now
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {name: f"{key}.{name}".lstrip(".") for name in [*before, *now]}
        kept = {name: own for name, own in keys.items() if name in before or open_keys.fullmatch(own)}
        return {name: _with_open(before.get(name), now.get(name), open_keys, own) for name, own in kept.items()}
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [_with_open(b, n, open_keys, f"{key}.{i}") for i, (b, n) in enumerate(zip(before, now, strict=True))]
    return before


def _has_grown(run: Path) -> bool:
    """Whether tasks were added to a finished run, or removed from it."""
    file = run / "model" / CONFIG_FILE
    config = json.loads(file.read_text()) if file.is_file() else {}
    return bool(config.get("newcomers") or config.get("retired"))


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """The keys in which two recipes differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [d for n in names for d in differences(before.get(n), after.get(n), f"{key}.{n}".lstrip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, (b, a) in enumerate(zip(before, after, strict=True)) for d in differences(b, a, f"{key}.{i}")]
    return [] if before == after else [key]


def compared(keys: Iterable[str]) -> list[str]:
    """Those of some keys of a recipe that change what is computed."""
    return [key for key in keys if not (UNCOMPARED.fullmatch(key) or PLACES.fullmatch(key))]


@cache
def _environment() -> str:
    versions = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    machine = f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, {device}"
    return "\n".join([f"# {machine}", *versions, ""])


def measured_in(run: Path) -> list[Path]:
    """The files of what was measured of a run: on test rows, on others, and without tasks' names."""
    return [run / "results.json", *run.glob("results.*.json")]


def replace_model(source: Path, target: Path) -> None:
    """Copies a stage's model to where ``alter.load`` reads, never leaving half of one there."""
    beside, before = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    put_back(target)
    for outdated in (beside, before):
        shutil.rmtree(outdated, ignore_errors=True)
    shutil.copytree(source, beside)
    if target.exists():
        target.rename(before)
    beside.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def put_back(target: Path) -> None:
    """Ends what a kill in the middle of ``replace_model`` began, between its two renamings."""
    before = target.with_name(f".{target.name}.old")
    if before.is_dir() and not target.exists():
        before.rename(target)


def stage_records(run: Path) -> dict[str, dict[str, Any]]:
    """What is known of each finished stage: seconds, trainable parameters, tokens, peak memory, validation loss."""
    return {step: known for step, known in records(run).items() if step in STAGES}


def peak_memory(known: Iterable[Mapping[str, Any]]) -> tuple[int, int | None]:
    """The most memory taken by this process or by one of some records: of the host, and of GPUs or None."""
    peaks = [(peak_memory_bytes(), peak_device_memory_bytes())]
    peaks += [(record["peak_memory_bytes"], record.get("peak_device_memory_bytes")) for record in known]
    return max(host for host, _ in peaks), max((device for _, device in peaks if device is not None), default=None)


def records(run: Path) -> dict[str, dict[str, Any]]:
    """What is known of each finished step of a run: its seconds and more."""
    file = run / "progress.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def record(run: Path, step: str, seconds: float, **facts: Any) -> None:
    """Notes a finished step, with the time it took; the first record stands, since a repeat only reads caches."""
    if is_first() and step not in (before := records(run)):
        write_json(run / "progress.json", {**before, step: {"seconds": seconds, **facts}})
