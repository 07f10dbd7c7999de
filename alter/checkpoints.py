"""Checkpoints that are whole, or not there: written beside, summed, renamed, and the one before kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from alter.errors import AlterError, disk_is_full

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
SUMS = "sha256"  # a line for each checkpoint that was written whole


class CheckedCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, notes its SHA-256, and only then renames it; the last one becomes the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint.

        Raises:
            AlterError: the disk is full; what was written before stays.
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.part")
        try:
            with beside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            with (file.parent / SUMS).open("a") as sums:
                sums.write(f"{digest(beside)}\n")
                sums.flush()
                os.fsync(sums.fileno())
        except (OSError, RuntimeError) as error:
            needed = beside.stat().st_size if beside.exists() else 0
            beside.unlink(missing_ok=True)
            if not disk_is_full(error):
                raise
            free = shutil.disk_usage(file.parent).free
            raise AlterError(
                f"{file.parent}: the disk is full (a checkpoint of more than {needed / 2**20:.1f} MB, {free / 2**20:.1f} MB free); free "
                "some space and run the same command, it goes on from the last checkpoint, which is whole."
            ) from error
        if file.name == LAST and file.is_file():
            file.replace(file.with_name(PREVIOUS))
        beside.replace(file)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(file: Path) -> bool:
    """Whether a checkpoint is there as it was written; one of a folder without sums is if it can be read."""
    if not file.is_file():
        return False
    sums = file.parent / SUMS
    if sums.is_file():
        return digest(file) in sums.read_text(errors="replace").split("\n")
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged or hostile archive makes of it
        return False
    return True


def _step(file: Path) -> float:
    """How far a checkpoint has come; what cannot be read comes first, to be told."""
    try:
        return float(torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("global_step", 0))
    except Exception:  # as in is_whole
        return float("inf")


def last_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the furthest that is whole, those of weights alone left out; of equals the newest.

    Not by age alone: in a copied folder all are as old as the copy.

    Args:
        folder: of the checkpoints.
        say: told of what is damaged.

    Returns:
        None where none was written.

    Raises:
        AlterError: there are some, and all are damaged.
    """
    damaged = False
    # a sum is of a whole file, so that those behind the one that is taken are left alone
    # those whose names hold a metric's, with its slash, lie in folders of their own
    for file in sorted(folder.rglob("*.ckpt"), key=lambda file: (_step(file), file.stat().st_mtime_ns), reverse=True):
        if not is_whole(file):
            say(f"{file}: damaged, it is not what was written.")
            damaged = True
        elif "optimizer_states" in torch.load(file, map_location="cpu", weights_only=True, mmap=True):
            return file
    if damaged:
        raise AlterError(f"{folder}: every checkpoint is damaged; remove {folder} to train this stage from its start.")
    return None
