"""What can be typed after ``alter``: the verbs and their flags; those of a recipe are made in `alter/recipe.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alter import __version__

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


def parser(flags: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The parser of the verbs.

    Args:
        flags: of a recipe, for shell completion; the verbs that take them parse them themselves.
    """
    from alter.submit import parser as submit_parser
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
        "--draws",
        type=int,
        help="training examples drawn; default an equal share of stage 1's epochs, as the run's tasks had",
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
    for verb in verbs.choices.values():
        verb.set_defaults(parser=verb)
    return parser
