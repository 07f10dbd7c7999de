"""Where rows come from: files, a hub data set, or a function."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from alter.errors import AlterError, did_you_mean, first_line

SPLITS = ("train", "validation", "test")
MOST_HEADER_LINES = 100  # of a CSV file; more are quotes that do not end
CHATS = (["user", "assistant"], ["system", "user", "assistant"])  # the roles of a chat's messages
Row = dict[str, Any]
Fields = Mapping[str, Any]  # a row that is only read


class Source(ABC):
    """Rows of a task by split; streams them, so that data need not fit into memory."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "rows" in vars(cls) and "numbered" not in vars(cls):
            cls.numbered = Source.numbered  # type: ignore[method-assign]  # of these rows, not a base class's

    @abstractmethod
    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of ``train``, ``validation`` or ``test``, always in the same order.

        Raises:
            AlterError: the split is not there, or cannot be read.
        """

    def numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a split with the numbers by which messages name them, each once; from 1 unless told otherwise."""
        yield from enumerate(self.rows(split), 1)

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
        folder: that relative paths start from; a task file's own folder.
        root: where they are looked for before; the recipe's ``data.root``.
    """

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
        self._shares = {split: share for split, share in self.splits.items() if not isinstance(share, str)}
        if any(not 0 < share < 1 for share in self._shares.values()) or sum(self._shares.values()) >= 1:
            told = " and ".join(f"{split} {share}" for split, share in self._shares.items())
            raise AlterError(
                f"{train}: the source sets aside {told} of its rows, and no more than a part of them can be; give shares such "
                "as 0.1, or files. The most rows of a split are the task's key limit."
            )
        self.chat = chat
        if group == []:
            raise AlterError(f"{train}: the source's group names no column; name one, or leave it out.")
        self.group = group[0] if isinstance(group, list) and len(group) == 1 else group
        self.seed = seed
        self.places = [*([Path(root).expanduser()] if root else []), Path(folder), Path()]

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split."""
        numbered = (
            self._numbered if type(self).numbered is Source.numbered else self.numbered
        )  # else it would ask this again
        return (row for _, row in numbered(split))

    def numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a split with their numbers in the file, of which other splits may have some."""
        return self._numbered(split)

    def _numbered(self, split: str) -> Iterator[tuple[int, Row]]:
        place = self.splits[split]
        if split != "train" and isinstance(place, str):
            yield from enumerate(self._read(place), 1)
            return
        unseen, columns = set(self._group_columns) if self._shares else set(), dict[str, None]()
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
            raise AlterError(
                f"{path}: no such file; name the folder that holds {name} by the recipe's key data.root (--data.root FOLDER), "
                f"or correct the path in the task's source.{_near(path)}"
            )
        yield from read_file(path) if self.chat is None else read_chats(path, self.chat)

    def _drawn_split(self, row: Row) -> str:
        if not self._shares:
            return "train"
        point = stable_fraction(f"{self.seed}:{self._group_of(row)}")
        for name, share in self._shares.items():
            if point < share:
                return name
            point -= share
        return "train"

    def _group_of(self, row: Row) -> Any:
        values = [row.get(column) for column in self._group_columns]
        if all(value == "" or is_missing(value) for value in values):  # nobody's rows are not one patient's
            return json.dumps(row, sort_keys=True, default=str)
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
        # caches of before put all rows without a group together
        group = None if self.group is None else (self.group, "else the row")
        return _digest(self.splits, group, self.seed, stats, *chat)


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
                f"hub data set '{self.path}', split '{self.splits[split]}': cannot be loaded ({first_line(error)}); check "
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


def read_file(path: Path) -> Iterator[Row]:
    """Streams the rows of a CSV, TSV, JSONL, Parquet or Excel file.

    Raises:
        AlterError: the file is missing, of another kind, or damaged; says the line where there is one.
    """
    if path.is_dir():
        raise AlterError(f"{path}: a folder; name the files in it, such as {path}/*.")
    if not path.is_file():
        raise AlterError(f"{path}: no such file; correct the path.{_near(path)}")
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, **TABLES}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise AlterError(f"{path}: the ending is not one of {', '.join(readers)}; convert the file to one of these.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise AlterError(f"{path}{_first_not_utf8(path)}: not UTF-8; save the file as UTF-8.") from error


def _first_not_utf8(path: Path) -> str:
    """Where the text stops being UTF-8; a decoder counts from the beginning of its buffer, so this reads once more."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number}"
    return ""


def read_chats(path: Path, chat: str) -> Iterator[Row]:
    """Streams a file's rows with a column for each role of the chat in their column ``chat``, instead of it.

    Raises:
        AlterError: as ``read_file``; or a chat has other messages than one of the user and one of the assistant.
    """
    for number, row in enumerate(read_file(path), 1):
        messages = row.pop(chat, None)
        if not is_chat(messages) or [message["role"] for message in messages] not in CHATS:
            raise AlterError(
                f"{path}, row {number}: '{chat}' is not one text of the user and one of the assistant, after at most one of the "
                "system; leave the row out, or make it rows of two messages."
            )
        yield {**row, **{message["role"]: message["content"] for message in messages}}


def is_chat(messages: Any) -> bool:
    """Whether it is a list of messages with a role and a text."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _near(path: Path) -> str:
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the library's 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = _first_record(stream)
        stream.seek(0)
        reader = csv.DictReader(stream, delimiter=_separator(header, path), strict=True)
        try:
            reader.fieldnames = next(filter(any, reader.reader), [])  # lines without a text may come before
            _require_names(reader.fieldnames, f"{path}, line {reader.reader.line_num}")
            for row in reader:
                if None in row or None in row.values():
                    raise AlterError(
                        f"{path}, line {reader.line_num}: not as many fields as the header has ({len(reader.fieldnames)}); "
                        f"quote fields that hold the separator {reader.reader.dialect.delimiter!r}."
                    )
                yield row
        except csv.Error as error:
            raise AlterError(
                f"{path}, line {reader.line_num + 1}: not valid CSV ({error}); mend the quotes."  # where the record begins
            ) from error


def _first_record(lines: Iterable[str]) -> str:
    """The line of a CSV file's header, or the lines of one whose names have several, without empty ones before."""
    header = ""
    for line in islice(filter(lambda line: header or line.strip(), lines), MOST_HEADER_LINES):
        header += line
        if header.count('"') % 2 == 0:
            break
    return header


def _require_names(names: Sequence[str], where: str) -> None:
    if "" in names or len(set(names)) < len(names):
        raise AlterError(f"{where}: every column needs a name of its own; write them into the first row.")


def _separator(header: str, path: Path) -> str:
    """What stands between a header's names: what is most often there; a comma may stand in a name more easily than the others.

    In a TSV file it is the tab; of a single name, what the ending says.
    """
    names = re.sub(r'"[^"]*"', "", header)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    found = max(";\t|,", key=names.count)
    return usual if not names.count(found) or (usual == "\t" and "\t" in names) else found


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line, row in json_lines(stream, path):
            if not isinstance(row, dict):
                raise AlterError(f"{path}, line {number}: not an object; write one object a line.")
            if "\\ud" in line.lower():  # a surrogate, and so perhaps half of a character
                row = json.loads(writable(json.dumps(row, ensure_ascii=False)))
            yield row


def json_lines(stream: Iterable[str], name: str | Path) -> Iterator[tuple[int, str, Any]]:
    """Yields the number, the text and the value of each line that is not empty.

    Args:
        stream: lines of JSON.
        name: of where they come from.

    Raises:
        AlterError: a line is not JSON.
    """
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AlterError(f"{name}, line {number}: not JSON ({error}); write one object a line.") from error
            yield number, line, value


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    yield {name: _text_where_it_is(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise AlterError(f"{path}: not readable as Parquet ({first_line(error)}); write the file again.") from error


def _text_where_it_is(value: Any) -> Any:
    """Bytes as the text that some programs write so; a picture, say, stays bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _read_excel(path: Path) -> Iterator[Row]:
    """The first sheet; its first row names the columns. An empty cell is an empty text, as in CSV."""
    try:
        import openpyxl
    except ImportError as error:
        raise AlterError(
            f'{path}: reading Excel needs openpyxl; pip install "alter-mta[excel]", or save the sheet as CSV.'
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises many kinds here
        raise AlterError(f"{path}: not readable as Excel ({first_line(error)}); save it again as .xlsx.") from error
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # as the file tells them, which some programs write wrongly; rows beyond would be lost
        lines = sheet.iter_rows(values_only=True)
        first, header = next(
            ((n, line) for n, line in enumerate(lines, 1) if any(line)), (1, ())
        )  # empty rows may come before
        names = ["" if name is None else str(name) for name in header]
        while names and not names[-1]:
            names.pop()
        _require_names(names, f"{path}, row {first}")
        for line in lines:
            cells = ["" if cell is None else cell for cell in line[: len(names)]]
            if any(cell != "" for cell in cells):
                yield dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=True))
    finally:
        book.close()


TABLES = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".xlsx": _read_excel}


def is_missing(value: Any) -> bool:
    """Whether it is what JSON, Parquet and pandas write where there is no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def writable(text: str) -> str:
    """The text with a question mark for half a character, which JSON can escape (an emoji cut in two) and no file can hold."""
    return text.encode("utf-8", "replace").decode()


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
