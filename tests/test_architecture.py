"""Imports go one way: cli -> stages -> {nn, data} -> errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alter"
FORBIDDEN = {
    "nn": ("lightning", "alter.data", "alter.stages", "alter.callbacks", "alter.cli", "alter.recipe", "alter.run"),
    "data": ("alter.nn", "alter.stages", "alter.callbacks", "alter.cli", "alter.recipe", "alter.run"),
    "stages": ("alter.cli", "alter.recipe", "alter.run", "alter.data"),
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_down_only(part):
    found = [
        (str(file), name)
        for file in (PACKAGE / part).rglob("*.py")
        for name in imported(file)
        if any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN[part])
    ]
    assert not found


def test_the_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys; from alter.cli import parser; parser()\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
