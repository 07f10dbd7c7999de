"""Files and folders that are whole or not there, whenever who writes them is stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alter.errors import AlterError


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes JSON as ``write_text`` writes text.

    NumPy numbers become plain ones, and NaN and infinities, which JSON has not, become null.
    """
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text so that the file is, at every moment, the old one or the whole new one.

    Raises:
        AlterError: when the file can't be written, such as on a full disk; the old file stays.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash after the rename may leave an empty file
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise AlterError(
            f"Could not write {path}: {error.strerror}. Mend that and run the same command again; "
            "what was there before is unchanged."
        ) from error


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if hasattr(obj, "tolist") and not isinstance(obj, (str, bytes)):  # NumPy and torch: arrays and scalars
        return _plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def refuse_full(folder: Path) -> None:
    """Checks that a folder is new or empty.

    Raises:
        AlterError: it is there and holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlterError(f"{folder}: already there and not empty; give a new folder, or remove it first.")


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the place of a new or empty one once it is complete; else nothing new is left.

    Raises:
        AlterError: the folder is there and holds something.
    """
    refuse_full(folder)
    folder = folder.absolute()  # ``.`` has no name
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    new = [parent for parent in folder.parents if not parent.exists()]
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that holds something
            for parent in new:
                parent.rmdir()
