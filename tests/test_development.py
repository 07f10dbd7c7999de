"""Files for those who develop ALTER agree with each other."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_hooks_run_the_ruff_that_the_lint_session_runs():
    (pinned,) = re.findall(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {need for hook in hooks for need in hook["additional_dependencies"]} == {pinned}


def test_contributing_names_sessions_and_places_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for named in re.findall(r"nox -s ([\w ]+?)(?: --|  )", text):
        assert set(named.split()) <= sessions
    paths = [path for path in re.findall(r"`([\w./]+/[\w./]*|[\w./]+\.(?:py|md))`", text) if path != "__init__.py"]
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path
