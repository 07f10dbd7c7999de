"""Imports go one way: cli -> stages -> {nn, data} -> errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alter"
# What of ALTER a package may import beside itself.
ALLOWED = {
    "nn": {"errors", "home"},
    "data": {"errors", "home", "metrics", "schema", "terminal", "writing", "yaml_file"},
    "stages": {"errors", "nn", "writing"},
}
WITHOUT = {"nn": {"lightning"}}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_package_imports_itself_and_what_it_stands_on(part):
    for file in (PACKAGE / part).rglob("*.py"):
        names = [name.split(".") for name in imported(file)]
        assert not {name[0] for name in names} & WITHOUT.get(part, set()), file
        assert {name[1] for name in names if name[0] == "alter" and len(name) > 1} <= ALLOWED[part] | {part}, file


def test_the_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys; from alter import cli; cli.parser()\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_answering_takes_no_lightning():
    code = "import sys, alter.loading; print([m for m in ('lightning', 'matplotlib', 'datasets') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
