"""The code on the pages, and how the tests run it."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from alter.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = ROOT / "docs" / "examples" / "small.yaml"
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")  # a block of code without a fence, or a part of a list
LANGUAGES = {"bash", "console", "python", "yaml", "json", "text"}  # and {directives}
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks)$", re.MULTILINE | re.DOTALL
)
INSTALL = re.compile(r"^(.*pip install [^&]*&& )")
DEVELOPMENT = re.compile(r"^(.* )?(pip|nox|pre-commit) ")  # run by .ci/run, or checked by test_development.py


class Block(NamedTuple):
    language: str
    body: str


def blocks(page):
    found = []
    for match in FENCE.finditer(page.read_text()):
        found.append(Block(match["info"].strip(), textwrap.dedent(match["body"])))
    return found


def only_shown(page):
    """The arguments of the ``alter`` commands that a page shows as text, or without a fence, and that no test runs."""
    texts = [block.body for block in blocks(page) if block.language == "text"]
    texts += [textwrap.dedent(found) for found in INDENTED.findall(FENCE.sub("", page.read_text()))]
    return [arguments for text in texts for arguments in alter_commands(Block("bash", f"{text}\n"))]


def runnable(page):
    return [block for block in blocks(page) if block.language in ("bash", "console", "python")]


def commands(block):
    """The shell text of a block: of a console block, the lines behind its prompts."""
    if block.language == "bash":
        return block.body
    lines, going_on = [], False
    for line in block.body.splitlines():
        if line.startswith("$ ") or going_on:
            lines.append(line.removeprefix("$ "))
            going_on = line.endswith("\\")
    return "\n".join(lines) + "\n"


def shell_text(block):
    """What a shell is given of a block: not what installs, nor what .ci/run does."""
    parts = [INSTALL.sub("", part) for part in _logical_lines(commands(block))]
    return "".join(part for part in parts if not DEVELOPMENT.match(part))


def alter_commands(block):
    """The arguments of each line of a block that begins with ``alter``."""
    lines = _joined(shell_text(block))
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("alter ")]


def small(arguments, backbone):
    """A command's arguments at the small setting that docs/index.md tells of."""
    if arguments[:1] not in (["fit"], ["compare"], ["doctor"], ["sweep"], ["submit"]) or "--config" not in arguments:
        return arguments
    added = ["--config", str(SMALL), "--precision", "fp32"]
    if "--backbone" not in arguments:
        added += ["--backbone", str(backbone)]
    return [*arguments, *added, *(["--seeds", "1"] if arguments[0] == "compare" else [])]


def run(block, backbone, namespace):
    """Runs a block; raises where it fails.

    Returns:
        what a shell block printed.
    """
    if block.language == "python":
        exec(compile(block.body, "page", "exec"), namespace)
        return ""
    text = shell_text(block)
    lines = _joined(text)
    if lines and all(line.startswith("alter ") and not set("|><&*~(") & set(line) for line in lines):
        for line in map(os.path.expandvars, lines):
            assert "$" not in line  # a variable that nobody has set
            with suppress_exit():
                main(small(shlex.split(line, comments=True)[1:], backbone))
        return ""
    bin_folder = Path("bin").absolute()
    _wrapper(bin_folder, backbone)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@contextmanager
def suppress_exit():
    """``--print_config`` and ``--help`` end the program, without a mistake."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def _logical_lines(text):
    return re.findall(r"(?:.*\\\n)*.*\n", text)


def _joined(text):
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def _wrapper(folder, backbone):
    """`alter` and `python` on the path, the first at the small setting."""
    if folder.is_dir():
        return
    folder.mkdir()
    (folder / "alter").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.docs.pages "{backbone}" "$@"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("alter", "python"):
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    main(small(sys.argv[2:], sys.argv[1]))
