"""Rows of local files: CSV, TSV, JSONL, Parquet and Excel, streamed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from alter.errors import AlterError, did_you_mean, in_short

MOST_HEADER_LINES = 100  # of a CSV file; more are quotes that do not end
CHATS = (["user", "assistant"], ["system", "user", "assistant"])  # the roles of a chat's messages
Row = dict[str, Any]


def read_file(path: Path, holes: bool = False) -> Iterator[Row]:
    """Streams the rows of a CSV, TSV, JSONL, Parquet or Excel file.

    Args:
        path: of the file.
        holes: whether the empty rows of a table that have others behind them come too, as empty texts, so that rows keep their
            places; else they are passed over.

    Raises:
        AlterError: the file is missing, of another kind, or damaged; says the line where there is one.
    """
    if path.is_dir():
        raise AlterError(f"{path}: a folder; name the files in it, such as {path}/*.")
    if not path.is_file():
        raise AlterError(f"{path}: no such file; correct the path.{near(path)}")
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, **TABLES}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise AlterError(f"{path}: the ending is not one of {', '.join(readers)}; convert the file to one of these.")
    try:
        empty = 0
        for row in reader(path):
            if row is None:
                empty += 1
                continue
            if holes:
                yield from (dict.fromkeys(row, "") for _ in range(empty))
            empty = 0
            yield row
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


def near(path: Path) -> str:
    """Ends a sentence about a file that is not there: which one of its folder may be meant."""
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])


def _read_csv(path: Path) -> Iterator[Row | None]:
    """None for a row of separators alone; a line of nothing is no row."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the library's 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as stream:
        header = _first_record(_lines(stream, path))
        stream.seek(0)
        declared = re.fullmatch(r"sep=([^\r\n])\s*", header, re.IGNORECASE)  # how Excel is told
        separator = declared[1] if declared else _separator(header, path)
        reader = csv.reader(_lines(stream, path), delimiter=separator, strict=True)
        ended = 0  # the line of the last record
        try:
            if declared:
                next(filter(any, reader))
            columns = next(filter(_has_text, reader), [])  # lines without a text may come before
            ended = reader.line_num
            names = _without_empty_end(columns)
            _require_names(names, f"{path}, line {ended}")
            for record in reader:
                ended = reader.line_num
                if not record:
                    continue
                if not any(record) and len(record) > 1:
                    yield None
                    continue
                if len(record) < len(names) or len(record) > len(columns):
                    raise AlterError(
                        f"{path}, line {ended}: not as many fields as the header has ({len(columns)}); "
                        f"quote fields that hold the separator {separator!r}."
                    )
                if any(record[len(names) :]):
                    raise AlterError(
                        f"{path}, line {ended}: a text in a column without a name; write one into the header."
                    )
                yield dict(zip(names, record, strict=False))
        except csv.Error as error:
            raise AlterError(
                f"{path}, line {ended + 1}: not valid CSV ({error}); mend the quotes."  # where the record begins
            ) from error


def _lines(stream: Iterable[str], path: Path) -> Iterator[str]:
    """The same lines, if they are text."""
    for number, line in enumerate(stream, 1):
        if "\0" in line:
            raise AlterError(
                f"{path}, line {number}: it has NUL characters, as UTF-16 has; save the file as UTF-8, or remove them."
            )
        yield line


def _has_text(record: Sequence[str]) -> bool:
    return any(field.strip() for field in record)


def _without_empty_end(names: Sequence[str]) -> list[str]:
    return list(names[: max((place for place, name in enumerate(names, 1) if name), default=0)])


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
        for number, line, row in json_lines(_lines(stream, path), path):
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
            _require_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    yield {name: _text_where_it_is(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:  # the latter of a page that cannot be unpacked
        raise AlterError(f"{path}: not readable as Parquet ({in_short(error)}); write the file again.") from error


def _text_where_it_is(value: Any) -> Any:
    """Bytes as the text that some programs write so; a picture, say, stays bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _read_excel(path: Path) -> Iterator[Row | None]:
    """The first sheet; its first row names the columns. An empty cell is an empty text, as in CSV; None for an empty row."""
    try:
        import openpyxl
    except ImportError as error:
        raise AlterError(
            f'{path}: reading Excel needs openpyxl; pip install "alter-mta[excel]", or save the sheet as CSV.'
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises many kinds here
        raise AlterError(f"{path}: not readable as Excel ({in_short(error)}); save it again as .xlsx.") from error
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # as the file tells them, which some programs write wrongly; rows beyond would be lost
        lines = _sheet_rows(sheet, path)
        named = ((number, line) for number, line in enumerate(lines, 1) if any(line))  # empty rows may come before
        first, header = next(named, (1, ()))
        names = _without_empty_end(["" if name is None else str(name) for name in header])
        _require_names(names, f"{path}, row {first}")
        for number, line in enumerate(lines, first + 1):
            if any(cell not in (None, "") for cell in line[len(names) :]):
                raise AlterError(f"{path}, row {number}: a text in a column without a name; write one into the header.")
            cells = ["" if cell is None else cell for cell in line[: len(names)]]
            filled = any(cell != "" for cell in cells)
            yield dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=True)) if filled else None
    finally:
        book.close()


def _sheet_rows(sheet: Any, path: Path) -> Iterator[tuple[Any, ...]]:
    try:
        yield from sheet.iter_rows(values_only=True)
    except Exception as error:  # what is read late may be damaged too
        raise AlterError(f"{path}: not readable as Excel ({in_short(error)}); save it again as .xlsx.") from error


TABLES = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".xlsx": _read_excel}


def is_missing(value: Any) -> bool:
    """Whether it is what JSON, Parquet and pandas write where there is no value."""
    nan = isinstance(value, Real) and value != value
    return value is None or nan or type(value).__name__ in ("NAType", "NaTType")


def writable(text: str) -> str:
    """The text with a question mark for half a character, which JSON can escape (an emoji cut in two) and no file can hold."""
    return text.encode("utf-8", "replace").decode()
