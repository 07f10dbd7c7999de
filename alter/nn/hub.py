"""Model folders: what a whole one holds, and how one comes from the Hugging Face hub."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from alter.errors import AlterError, in_short

# Weights as safetensors only (a pickle can run code), and no Python files. Sub-folders hold other formats.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["*/*"]
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
PROBE_SECONDS = 6.0


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        AlterError: there are none, or one that the index names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise AlterError(f"{index}: it names {', '.join(missing)}, which the folder lacks; copy the folder again.")
        if files:
            return files
    if any(folder.glob("*.bin")):
        raise AlterError(
            f"{folder}: its weights are in a pickle (.bin), which can run code and is not opened; save the model again "
            "with save_pretrained, which writes safetensors."
        )
    raise AlterError(f"{folder}: no model.safetensors here; name a folder that save_pretrained has written.")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        AlterError: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AlterError(
            f"{file.parent}: no {file.name} here; name a folder that save_pretrained has written."
        ) from error
    except (OSError, ValueError) as error:
        raise AlterError(f"{file}: not readable as JSON ({error}); copy the folder again.") from error
    if not isinstance(content, dict):
        raise AlterError(f"{file}: not a JSON object; copy the folder again.")
    return content


def check_folder(folder: Path) -> None:
    """Checks that a model folder has its configuration and weights.

    Raises:
        AlterError: something is missing.
    """
    read_json(folder / "config.json")
    weight_files(folder)


def is_whole(folder: Path) -> bool:
    """True where configuration, weights and a tokenizer are there."""
    try:
        check_folder(folder)
    except AlterError:
        return False
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def cached_snapshot(repo_id: str) -> Path | None:
    """The whole copy of a hub model in the hub's own cache, without the network; None where there is none.

    Raises:
        AlterError: this is no hub id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found: str | None = snapshot_download(
            repo_id, local_files_only=True, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except HFValidationError as error:
        raise AlterError(
            f"backbone: '{repo_id}' is neither a folder nor a hub id such as 'owner/model'; name one by --backbone."
        ) from error
    except Exception as error:  # not cached, or fetched by another program that left out files we may not need
        found = getattr(error, "snapshot_path", None)
    return Path(found) if found and is_whole(Path(found)) else None


def download_snapshot(repo_id: str, into: Path | None = None) -> Path:
    """Downloads a hub model.

    Args:
        repo_id: such as ``owner/model``.
        into: a folder; by default the hub's own cache.

    Returns:
        the folder.

    Raises:
        AlterError: the hub is not reachable, or has no such model or no safetensors of it.
    """
    from huggingface_hub import snapshot_download

    check_reachable()
    try:
        folder = Path(
            snapshot_download(
                repo_id, local_dir=into, allow_patterns=WANTED, ignore_patterns=UNWANTED, etag_timeout=PROBE_SECONDS
            )
        )
    except Exception as error:  # 401, 404, gated, broken connection: all mean that this source has not delivered
        raise AlterError(f"the hub did not deliver '{repo_id}' ({in_short(error)}).") from error
    check_folder(folder)
    return folder


def check_reachable() -> None:
    """Asks the hub for one answer, so that a closed network costs seconds and not a chain of retries.

    Raises:
        AlterError: no answer in time, or the environment says to stay offline.
    """
    from huggingface_hub import constants, get_session

    offline = {"1", "on", "yes", "true"}
    if constants.HF_HUB_OFFLINE or any(
        os.environ.get(name, "").lower() in offline for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise AlterError("the hub was not asked, since HF_HUB_OFFLINE is set.")
    failures: list[Exception] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception as error:
            failures.append(error)

    # In a thread, because a name server that does not answer holds a connection back beyond its timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 2)
    if thread.is_alive() or failures:
        reason = in_short(failures[0]) if failures else "no answer"
        raise AlterError(f"the hub at {constants.ENDPOINT} is not reachable ({reason}).")
