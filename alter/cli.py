"""The ``alter`` command: its verbs, and how it says what is wrong.

Heavy imports wait until a verb needs them, so that help is there at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from alter.arguments import parser
from alter.errors import AlterError, did_you_mean, disk_is_full
from alter.stopping import GOES_ON, STOPPED, stoppable

RESUMED = ("fit", "compare", "sweep", "add-task", "remove-task")  # verbs that go on where they were stopped


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb; a mistake in the input is one sentence on stderr and exit code 2 (``--debug`` shows the traceback)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where it is not UTF-8, better an escape than no line
    with stoppable(GOES_ON if arguments[:1] and arguments[0] in RESUMED else STOPPED):
        _run_or_explain(arguments, debug)


def _run_or_explain(arguments: list[str], debug: bool) -> None:
    try:
        _run(arguments)
    except AlterError as error:
        _stop(error, error.messages, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing more to say
        sys.exit(0)
    except Exception as error:
        message = _explanation(error)
        if message is None:
            raise
        _stop(error, [message], debug)


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


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
    options, unknown = parser().parse_known_args(arguments)
    if unknown:  # told with the verb's own usage, where argparse would print that of all verbs
        known = [option for action in options.parser._actions for option in action.option_strings]
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}.{did_you_mean(unknown[0], known)}")
    _import(getattr(options, "modules", []))
    VERBS[options.verb](options)


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
    print(f"{recipe} and its {len(tasks)} task files. Next: alter fit --config {shlex.quote(str(recipe))}")


def _init(options: argparse.Namespace) -> None:
    from alter.init.write import init

    print(init(options.folder, options.files, options.backbone, options.answer))


def _test(options: argparse.Namespace) -> None:
    from alter import run
    from alter.run_folder import changing

    with changing(options.run):  # its results and what calibrates its answers
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
    from alter.run_folder import changing

    with changing(options.run):
        add_task(
            options.run, options.task, options.shots, options.draws, options.lr, options.consolidate, options.backbone
        )


def _remove_task(options: argparse.Namespace) -> None:
    from alter.growth import remove_task
    from alter.run_folder import changing

    with changing(options.run):
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
    from alter.predicting import predict

    predict(options.run, options.task, options.input, options.backbone)


WITH_RECIPE = {  # verbs that read a recipe's flags themselves
    "compare": ("alter.compare.main", "compare"),
    "doctor": ("alter.doctor.main", "doctor"),
    "submit": ("alter.submit", "submit"),
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
