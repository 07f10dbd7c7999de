"""Where rows come from: files, a hub data set, or a function."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from alter.data.files import Row, is_missing, near, read_chats, read_file
from alter.errors import AlterError, did_you_mean, in_short

SPLITS = ("train", "validation", "test")
Fields = Mapping[str, Any]  # a row that is only read


class Source(ABC):
    """Rows of a task by split; streams them, so that data need not fit into memory.

    A subclass has ``rows`` and ``fingerprint``, and where a class that it extends numbers its rows, ``numbered`` too.
    """

    @abstractmethod
    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of ``train``, ``validation`` or ``test``, always in the same order.

        Raises:
            AlterError: the split is not there, or cannot be read.
        """

    def numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a split with the numbers by which messages name them, each once; from 1 unless told otherwise."""
        yield from enumerate(self.rows(split), 1)

    def group_of(self, row: Fields) -> Any:
        """What keeps a row in one split with all that have the same; None for nothing."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the rows may have changed."""


class Files(Source):
    """Local CSV, TSV, JSONL, Parquet or Excel files, told apart by their endings.

    Args:
        train: file of the training rows.
        validation: a file, or the share of ``train`` to set aside.
        test: a file, or the share of ``train`` to set aside.
        chat: column of a chat, a list of messages with ``role`` and ``content``: one of the user and one of the assistant, after at
            most one of the system. Each becomes a column with the role's name.
        group: column, or several together, whose equal values stay in one split (a patient, a customer); by default, and where
            these are empty, only equal rows do.
        seed: of the shares.
        folder: that relative paths start from; a task file's own folder. A subclass is not given it, nor ``root``.
        root: where they are looked for before; the recipe's ``data.root``.
    """

    shares: Mapping[str, float] = {}  # of a subclass that reads rows of its own
    group: str | list[str] | None = None

    def __init__(
        self,
        train: str,
        validation: str | float = 0.1,
        test: str | float = 0.1,
        group: str | list[str] | None = None,
        seed: int = 13,
        folder: str = ".",
        root: str | None = None,
        chat: str | None = None,
    ) -> None:
        self.splits = {"train": train, "validation": validation, "test": test}
        self.shares = {split: share for split, share in self.splits.items() if not isinstance(share, str)}
        if any(not 0 < share < 1 for share in self.shares.values()) or sum(self.shares.values()) >= 1:
            told = " and ".join(f"{split} {share}" for split, share in self.shares.items())
            raise AlterError(
                f"the source sets aside {told} of the rows of {train}, and no more than a part of them can be; give shares "
                "such as 0.1, or files. The most rows of a split are the task's key limit."
            )
        for split, place in (("validation", validation), ("test", test)):
            if isinstance(place, str) and re.fullmatch(r"[\d.,]+ *%?", place):
                raise AlterError(
                    f"the source's {split} is the text '{place}', which is no file; write a share as a number such as 0.2, without "
                    "quotes or a percent sign."
                )
        self.chat = chat
        if group == []:
            raise AlterError("the source's group names no column; name one, or leave it out.")
        self.group = group[0] if isinstance(group, list) and len(group) == 1 else group
        self.seed = seed
        self.places = [*([Path(root).expanduser()] if root else []), Path(folder), Path()]

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split."""
        return (row for _, row in self._numbered(split))

    def numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a split with their numbers in the file, of which other splits may have some."""
        own = type(self).rows is Files.rows  # else those of a subclass
        return self._numbered(split) if own else super().numbered(split)

    def _numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        place = self.splits[split]
        if split != "train" and isinstance(place, str):
            yield from enumerate(self._read(place), 1)
            return
        unseen, columns = set(self._group_columns), dict[str, None]()
        for number, row in enumerate(self._read(str(self.splits["train"])), 1):
            if unseen:
                unseen -= row.keys()
                columns |= dict.fromkeys(row)
            if self._drawn_split(row) == split:
                yield number, row
        if unseen and columns:
            column = min(unseen)
            raise AlterError(
                f"{self.splits['train']}: there is no column '{column}' as the source's group says; "
                f"its columns are {', '.join(columns)}.{did_you_mean(column, columns)}"
            )

    @property
    def _group_columns(self) -> list[str]:
        return [self.group] if isinstance(self.group, str) else self.group or []

    def _path(self, name: str) -> Path:
        paths = [place / name for place in self.places]
        return next((path for path in paths if path.is_file()), paths[0])

    def _read(self, name: str) -> Iterator[Row]:
        path = self._path(name)
        if not path.is_file():
            key = (
                "the recipe's key data.root (--data.root FOLDER)"
                if type(self) is Files
                else "the source's argument folder"
            )
            raise AlterError(
                f"{path}: no such file; name the folder that holds {name} by {key}, or correct the path in the task's source."
                f"{near(path)}"
            )
        yield from read_file(path) if self.chat is None else read_chats(path, self.chat)

    def _drawn_split(self, row: Row) -> str:
        if not self.shares:
            return "train"
        group = self.group_of(row)
        if group is None:
            group = json.dumps(row, sort_keys=True, default=str)
        point = stable_fraction(f"{self.seed}:{group}")
        for name, share in self.shares.items():
            if point < share:
                return name
            point -= share
        return "train"

    def group_of(self, row: Fields) -> Any:
        """The value of the source's ``group``; None without one."""
        values = [row.get(column) for column in self._group_columns]
        if all(value == "" or is_missing(value) for value in values):  # nobody's rows are not one patient's
            return None
        return values[0] if isinstance(self.group, str) else json.dumps(values, sort_keys=True, default=str)

    def fingerprint(self) -> str:
        """Of the settings and of each file's size and time of change."""
        stats = []
        for place in self.splits.values():
            if isinstance(place, str):
                path = self._path(place)
                stat = path.stat() if path.is_file() else None
                stats.append((str(path), stat and (stat.st_size, stat.st_mtime_ns)))
        chat = [] if self.chat is None else [self.chat]
        return _digest(self.splits, self.group, self.seed, stats, *chat)


class Hub(Source):
    """A data set of the Hugging Face hub, or of its local cache.

    Args:
        path: the data set's id.
        name: its configuration.
        splits: what the hub calls train, validation and test.
        revision: a branch, tag or commit.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        splits: dict[str, str] | None = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.splits = {**{split: split for split in SPLITS}, **(splits or {})}
        self.revision = revision

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split, memory-mapped."""
        import datasets

        try:
            yield from datasets.load_dataset(self.path, self.name, split=self.splits[split], revision=self.revision)
        except Exception as error:
            raise AlterError(
                f"hub data set '{self.path}', split '{self.splits[split]}': cannot be loaded ({in_short(error)}); check "
                "the id, name and splits, or download it where the hub is reached and name the files with a Files source."
            ) from error

    def fingerprint(self) -> str:
        """Of the settings; a moving revision is not noticed, so name a commit where that matters."""
        return _digest(self.path, self.name, self.splits, self.revision)


class Function(Source):
    """A Python function ``f(split, **arguments)`` that yields rows.

    Args:
        function: called once a split.
        arguments: passed on.
    """

    def __init__(self, function: Callable[..., Iterator[Row]], **arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def rows(self, split: str) -> Iterator[Row]:
        """Yields what the function yields."""
        yield from self.function(split, **self.arguments)

    def fingerprint(self) -> str:
        """Of the arguments, the source of the function's whole module, where its helpers are, and its ``PACKAGES``.

        A module that reads the data of other packages names them in ``PACKAGES``; new versions are then noticed.
        """
        module = sys.modules[self.function.__module__]
        versions = [_version(package) for package in getattr(module, "PACKAGES", ())]
        return _digest(self.function.__qualname__, self.arguments, inspect.getsource(module), versions)


def stable_fraction(text: str) -> float:
    """Maps a text to [0, 1), the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _version(package: str) -> str | None:
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
