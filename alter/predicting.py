"""``alter predict``: rows of a file in, answers as JSON lines out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from alter.errors import AlterError

if TYPE_CHECKING:
    from alter.answering import Answer
    from alter.guess import Guess


def predict(run: Path, task: str | None, source: str, backbone: str | None = None) -> None:
    """Prints an answer a row, as JSON lines.

    Args:
        run: folder of a finished run.
        task: that every row is for; None to guess each row's.
        source: file with the rows, or ``-`` for JSON lines on standard input.
        backbone: where it is, when not where it was.

    Raises:
        AlterError: the run has no such task, or the rows cannot be read or lack one of the task's fields.
    """
    from transformers.utils.logging import disable_progress_bar

    from alter.loading import load

    disable_progress_bar()
    predictor = load(run, backbone)
    named = task or (predictor.tasks[0] if len(predictor.tasks) == 1 else None)
    rows = _rows(source)
    if named:
        predictor.task(named)
        lines = (_line(answer) for answer in predictor.stream(named, rows, place=f"{source} row"))
    else:
        lines = (_guessed_line(found, answer) for found, answer in predictor.stream_unnamed(rows))
    escaped = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")  # JSON can be written in any encoding
    for line in lines:
        print(json.dumps(line, ensure_ascii=escaped), flush=True)


def _line(answer: Answer) -> dict[str, Any]:
    line: dict[str, Any] = {"answer": answer.text}
    if answer.probabilities is not None:
        line["probabilities"] = {label: round(p, 6) for label, p in answer.probabilities.items()}
    return line


def _guessed_line(found: Guess, answer: Answer | None) -> dict[str, Any]:
    told = {
        "task": found.task,
        "task_probability": round(found.probability, 6),
        "task_typical": round(found.typical, 6),
    }
    if answer is None:
        return {"answer": None, **told, "low_confidence": f"which task it is for is not clear: {found}"}
    return {**_line(answer), **told}


def _open(name: str) -> TextIO:
    if name == "-":
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # JSON is UTF-8, whatever the terminal is
        return sys.stdin
    try:
        return open(name, encoding="utf-8-sig")
    except OSError as error:
        raise AlterError(
            f"--input: {name} cannot be read ({error.strerror}); name a table or a file of JSON lines, or -."
        ) from error


def _rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, told by its ending; of anything else, the objects of JSON lines."""
    from alter.data.files import TABLES, read_file

    if Path(name).suffix.lower() in TABLES and Path(name).is_file():
        yield from read_file(Path(name), holes=True)
    else:
        with _open(name) as stream:
            try:
                yield from _objects(stream, name)
            except UnicodeDecodeError as error:
                raise AlterError(
                    f"{name}: not UTF-8 text; write it as UTF-8, or save a sheet as .xlsx or .csv."
                ) from error


def _objects(stream: TextIO, name: str) -> Iterator[dict[str, Any]]:
    from alter.data.files import json_lines

    for number, line, row in json_lines(stream, name):
        if not isinstance(row, dict):
            raise AlterError(
                f"{name}, line {number}: expected an object with the task's fields, got {line.strip()[:60]}."
            )
        yield row
