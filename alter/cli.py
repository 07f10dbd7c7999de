"""The ``alter`` command: its verbs, and how it says what is wrong.

Heavy imports wait until a verb needs them, so that help is there at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from alter import __version__
from alter.errors import AlterError, disk_is_full

if TYPE_CHECKING:
    from alter.answering import Answer
    from alter.guess import Guess

DESCRIPTION = "One small language model, good at all the tasks of a domain."
EPILOG = """examples:
  alter ls                                              the recipes that come with ALTER
  alter cp medical mine                                 a copy of one, to change
  alter init mine data/*.csv                            tasks and a recipe for your files
  alter doctor --config recipes/medical.yaml            look before a run: data, backbone, memory, time
  alter fit --config recipes/medical.yaml               train both stages, then test
  alter fit --config recipes/medical.yaml --print_config   the whole recipe, with comments
  alter fit --help                                      every field of a recipe
  alter test --run runs/medical                         test again
  alter runs runs                                       a table of your runs, the best first
  alter compare --config recipes/medical.yaml --seeds 3  against full fine-tuning, LoRA and others
  alter sweep --config recipes/medical.yaml --set data.temperature=1,2,5   the best by validation
  alter submit --config recipes/medical.yaml --nodes 2 --time 8:00:00   as a job on SLURM
  alter predict --run runs/medical --task hpo_system --input rows.jsonl
  alter export --run runs/medical --stage stage1        a plain Hugging Face checkpoint a task
  alter serve --run runs/medical                        a page, and endpoints for OpenAI's clients
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb; a mistake in the input is one sentence on stderr and exit code 2 (``--debug`` shows the traceback)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where it is not UTF-8, better an escape than no line
    try:
        _run(arguments)
    except AlterError as error:
        _stop(error, error.messages, debug)
    except KeyboardInterrupt:
        print("alter: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing more to say
        sys.exit(0)
    except Exception as error:
        message = _explanation(error)
        if message is None:
            raise
        _stop(error, [message], debug)


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def _explanation(error: Exception) -> str | None:
    """What to tell of another library's error that a recipe or a machine, not the code, is to blame for."""
    if disk_is_full(error):
        return "The disk is full; free some space and run the same command, it goes on from the last checkpoint."
    if isinstance(error, OSError) and error.filename is not None and error.errno in UNWRITABLE:
        return f"{error.filename}: {error.strerror}; name another place, or ask for the right to write there."
    # Lightning's, by name: its import takes seconds; and the one that it raises as a plain ValueError.
    if type(error).__name__ == "MisconfigurationException" or str(error).lstrip().startswith("`val_check_interval`"):
        return f"trainer: {' '.join(str(error).split())}"
    return None


def _stop(error: BaseException, messages: Sequence[str], debug: bool) -> None:
    if debug:
        raise error
    for message in messages:
        print(f"alter: {message}", file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str]) -> None:
    from alter.requeue import leave_allocation

    leave_allocation()
    if arguments[:1] == ["fit"]:
        return _fit(arguments[1:])
    if arguments and arguments[0] in WITH_RECIPE:
        module, name = WITH_RECIPE[arguments[0]]
        if getattr(importlib.import_module(module), name)(arguments[1:] or ["--help"]) is False:
            sys.exit(1)
        return
    options = parser().parse_args(arguments)
    _import(getattr(options, "modules", []))
    VERBS[options.verb](options)


def parser(flags: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The parser of the verbs.

    Args:
        flags: of a recipe, for shell completion; the verbs that take them parse them themselves.
    """
    from alter.slurm import parser as submit_parser
    from alter.sweep.main import parser as sweep_parser

    own: dict[str, Any] = {"add_help": False, "parents": [flags] if flags else []}
    parser = argparse.ArgumentParser(
        prog="alter", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"alter {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("ls", help="the recipes that come with ALTER")
    copy = verbs.add_parser("cp", help="copy one of them with its tasks, to change it")
    copy.add_argument("name", metavar="NAME", help="of a recipe")
    copy.add_argument("folder", metavar="DIR", type=Path, help="where to")
    init = verbs.add_parser("init", help="propose tasks and a recipe for labelled files")
    init.add_argument("folder", metavar="DIR", type=Path, help="for the recipe and its tasks")
    init.add_argument("files", metavar="FILE", type=Path, nargs="+", help="CSV, TSV, JSON lines, Parquet or Excel")
    init.add_argument("--backbone", default="smollm2-135m", help="a hub id, a folder or a bundled name")
    init.add_argument("--answer", metavar="COLUMN", help="the column to learn; guessed where it is left out")
    verbs.add_parser("doctor", help="look at a recipe's data, backbone and machine before a run", **own)
    verbs.add_parser("fit", help="train a recipe's stages and test them", **own)
    verbs.add_parser("compare", help="train a recipe beside other methods, with a table", **own)
    for name, about, options in (
        ("sweep", "train a recipe with some values varied, ranked by validation", sweep_parser),
        ("submit", "train a recipe as a job on SLURM", submit_parser),
    ):
        verbs.add_parser(name, help=about, add_help=False, parents=[options(add_help=False)])
    test = verbs.add_parser("test", help="measure a finished run beside its references")
    test.add_argument("--run", required=True, type=Path, help="the run folder")
    test.add_argument("--split", choices=("test", "validation"), default="test", help="validation while tuning")
    test.add_argument(
        "--no-task-id", action="store_true", help="with and without the tasks' names: what guessing them costs"
    )
    runs = verbs.add_parser("runs", help="a table of the runs in a folder, the best first")
    runs.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path("runs"), help="runs by default")
    diff = verbs.add_parser("diff", help="how two runs differ: recipe lines and metrics")
    diff.add_argument("first", metavar="RUN", type=Path, help="a run folder")
    diff.add_argument("second", metavar="RUN", type=Path, help="another")
    predict = verbs.add_parser("predict", help="answer rows with a finished run, as JSON lines")
    predict.add_argument("--run", required=True, type=Path, help="the run folder")
    predict.add_argument("--task", help="a task of the run; without it each row's is guessed, or told not to be clear")
    predict.add_argument(
        "--input",
        required=True,
        help="rows with the task's fields: JSON lines, CSV, TSV, Parquet or Excel; - for JSON lines on standard input",
    )
    add = verbs.add_parser("add-task", help="train a new task beside a finished run's, which stay as they are")
    add.add_argument("--run", required=True, type=Path, help="the run folder")
    add.add_argument("--task", required=True, type=Path, metavar="FILE", help="the task's YAML file")
    add.add_argument("--shots", type=int, help="learn from this many rows of each class; default all")
    add.add_argument(
        "--draws", type=int, help="training examples drawn; default as many as the run's tasks had on average"
    )
    add.add_argument("--lr", type=float, help="learning rate; default stage 1's")
    remove = verbs.add_parser("remove-task", help="take a task out of a finished run; the others stay as they are")
    remove.add_argument("--run", required=True, type=Path, help="the run folder")
    remove.add_argument("--task", required=True, help="a task of the run")
    for verb in (add, remove):
        verb.add_argument("--consolidate", action="store_true", help="train stage 2's part again, for all tasks")
    export = verbs.add_parser("export", help="write a finished run for other programs")
    export.add_argument("--run", required=True, type=Path, help="the run folder")
    export.add_argument(
        "--format", choices=("hf", "adapter", "onnx", "alter"), default="hf",
        help="hf: a plain Hugging Face checkpoint a task (default); adapter: one adapter a task; onnx: a graph a task; "
        "alter: the whole model with its card, for the hub",
    )  # fmt: skip
    export.add_argument("--task", action="append", default=[], help="a task of the run; again for more; default all")
    export.add_argument("--out", type=Path, help="folder for one folder a task; default RUN/export/FORMAT")
    export.add_argument("--stage", choices=("stage1", "stage2"), help="whose model; default the last stage's")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the plain checkpoint")
    serve = verbs.add_parser("serve", help="answer over HTTP: a page, and endpoints for OpenAI's clients")
    serve.add_argument("--run", required=True, type=Path, help="the run folder")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; 127.0.0.1, this machine alone, by default")
    serve.add_argument("--port", type=int, default=8000, help="8000 by default; 0 takes a free one")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        help="a file with the key to ask for; default the variable ALTER_API_KEY, else none",
    )
    serve.add_argument("--max-batch", type=int, default=32, help="the most inputs answered at once; 32 by default")
    serve.add_argument(
        "--queue", type=int, default=128, help="the most inputs that wait, further get 429; 128 by default"
    )
    serve.add_argument("--timeout", type=float, default=60, help="seconds until a request is given up; 60 by default")
    serve.add_argument("--max-bytes", type=int, default=65536, help="the largest request; 65536 by default")
    completion = verbs.add_parser("completion", help="print the script that completes alter's commands in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    for verb in (test, predict, add, remove, export, serve):
        verb.add_argument("--backbone", help="where the backbone is, when not where it was")
        verb.add_argument(
            "--import", dest="modules", action="append", default=[], metavar="MODULE",
            help="import a module of your own first, where the run uses a router or expert from it",
        )  # fmt: skip
    return parser


def _import(modules: Sequence[str]) -> None:
    from alter.schema import TRUSTED

    if modules:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
            TRUSTED.add(module)
        except ImportError as error:
            raise AlterError(
                f"--import: '{module}' cannot be imported from here ({error}); correct the name."
            ) from error


def _fit(arguments: list[str]) -> None:
    if not arguments:
        raise AlterError("fit: --config is missing; name a recipe, such as one that alter ls lists.")
    arguments = ["--print_config=comments" if a == "--print_config" else a for a in arguments]
    from alter.requeue import REQUEUE

    REQUEUE.listen()
    from alter import recipe, run

    run.fit(recipe.read_recipe(arguments))


def _ls(options: argparse.Namespace) -> None:
    from alter import shipped

    print(shipped.listing())


def _cp(options: argparse.Namespace) -> None:
    from alter import shipped

    recipe, *tasks = shipped.copy_recipe(options.name, options.folder)
    print(f"{recipe} and its {len(tasks)} task files. Next: alter fit --config {recipe}")


def _init(options: argparse.Namespace) -> None:
    from alter.init.write import init

    print(init(options.folder, options.files, options.backbone, options.answer))


def _test(options: argparse.Namespace) -> None:
    from alter import run

    if options.no_task_id:
        from alter.unnamed import measure_unnamed

        measure_unnamed(options.run, *run.ready(options.run, backbone=options.backbone), options.split)
    else:
        run.measure(options.run, split=options.split, backbone=options.backbone)


def _export(options: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from alter.export import Exporter

    disable_progress_bar()
    exporter = Exporter(options.run, options.out, options.stage, options.backbone)
    exporter.write(options.format, options.task, options.dtype)


def _add_task(options: argparse.Namespace) -> None:
    from alter.growth import add_task

    add_task(options.run, options.task, options.shots, options.draws, options.lr, options.consolidate, options.backbone)


def _remove_task(options: argparse.Namespace) -> None:
    from alter.growth import remove_task

    remove_task(options.run, options.task, options.consolidate, options.backbone)


def _serve(options: argparse.Namespace) -> None:
    from alter.serve.main import serve

    limits = {
        "max_batch": options.max_batch,
        "max_waiting": options.queue,
        "timeout": options.timeout,
        "max_bytes": options.max_bytes,
    }
    serve(options.run, options.backbone, options.host, options.port, options.api_key_file, limits)


def _runs(options: argparse.Namespace) -> None:
    from alter.runs import runs_table

    print(runs_table(options.folder))


def _diff(options: argparse.Namespace) -> None:
    from alter.runs import diff

    print(diff(options.first, options.second))


def _completion(options: argparse.Namespace) -> None:
    from alter import completion

    print(completion.script(options.shell))


def _predict(options: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from alter.loading import load

    disable_progress_bar()
    predictor = load(options.run, options.backbone)
    named = options.task or (predictor.tasks[0] if len(predictor.tasks) == 1 else None)
    if named:
        predictor.task(named)
    rows = _rows(options.input)
    if named:
        lines = (_line(answer) for answer in predictor.stream(named, rows, place=f"{options.input} row"))
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
    from alter.data.sources import TABLES, read_file

    if Path(name).suffix.lower() in TABLES and Path(name).is_file():
        yield from read_file(Path(name))
    else:
        with _open(name) as stream:
            try:
                yield from _json_lines(stream, name)
            except UnicodeDecodeError as error:
                raise AlterError(f"{name}: not UTF-8 (byte {error.start}); write it as UTF-8.") from error


def _json_lines(stream: TextIO, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AlterError(f"{name}, line {number}: not JSON ({error}); write one object a line.") from error
        if not isinstance(row, dict):
            raise AlterError(
                f"{name}, line {number}: expected an object with the task's fields, got {line.strip()[:60]}."
            )
        yield row


WITH_RECIPE = {  # verbs that read a recipe's flags themselves
    "compare": ("alter.compare.main", "compare"),
    "doctor": ("alter.doctor.main", "doctor"),
    "submit": ("alter.slurm", "submit"),
    "sweep": ("alter.sweep.main", "sweep"),
}
VERBS = {
    "ls": _ls,
    "cp": _cp,
    "init": _init,
    "test": _test,
    "runs": _runs,
    "diff": _diff,
    "predict": _predict,
    "add-task": _add_task,
    "remove-task": _remove_task,
    "export": _export,
    "serve": _serve,
    "completion": _completion,
}
