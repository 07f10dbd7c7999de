"""The files of a model folder: its description as JSON, its weights as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alter.errors import AlterError
from alter.nn.sharding import slice_like

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "alter.json"
FORMAT = 1


def write_model(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes both files, each at once; the description last, so that a folder without it is not a model.

    Args:
        folder: made where it does not exist.
        config: the description.
        state: the tensors by name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, state)
    beside = folder / f".{CONFIG_FILE}.part"  # always of this name, so that a killed run leaves nothing in the end
    beside.write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")
    os.replace(beside, folder / CONFIG_FILE)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes tensors as safetensors, whole or not at all, for all to read who may read other files of this user.

    Args:
        file: where to.
        tensors: by name.
        metadata: texts that go with them.
    """
    from safetensors.torch import save_file

    beside = file.with_name(f".{file.name}.part")
    beside.touch()
    mode = beside.stat().st_mode  # which safetensors would leave to its owner alone
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(own, beside, metadata={"format": "pt", **metadata})
    beside.chmod(mode)
    os.replace(beside, file)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks the JSON of a model folder.

    Raises:
        AlterError: it is missing, damaged or of another format.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text())
        complete = config["format"] == FORMAT and {"backbone", "tasks", "layers", "ffn", "parts"} <= config.keys()
    except FileNotFoundError as error:
        raise AlterError(
            f"{folder}: no model here, {CONFIG_FILE} is missing; name a folder that a run has finished."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise AlterError(
            f"{file}: not a readable ALTER model description ({error}); train or copy it again."
        ) from error
    if not complete:
        raise AlterError(
            f"{file}: not a description of format {FORMAT}; train again or take the version that wrote it."
        )
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a model folder.

    Raises:
        AlterError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise AlterError(f"{file}: not readable as safetensors ({error}); train or copy the model again.") from error


def copy_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors into those of the same name, each process its own slice.

    Args:
        own: where to.
        state: where from.
        where: the file, for errors.

    Raises:
        AlterError: a key is missing, surplus or of another shape.
    """
    problems = [f"{where}: the key '{key}' is missing." for key in own.keys() - state.keys()]
    problems += [f"{where}: the key '{key}' belongs to no adapter of this model." for key in state.keys() - own.keys()]
    problems += [
        f"{where}: the key '{key}' has shape {list(state[key].shape)}, not {list(own[key].shape)}."
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        raise AlterError(*sorted(problems))
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(slice_like(value, own[key]))
