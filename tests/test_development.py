"""Files for those who develop ALTER agree with each other."""

import re
import tomllib
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


def test_every_session_says_what_it_does_and_the_readme_is_short():
    listed = re.findall(r'@nox.session\ndef (\w+)\(.*?\n    """(.+?)\.?"""', (ROOT / "noxfile.py").read_text())
    assert len(listed) == (ROOT / "noxfile.py").read_text().count("@nox.session")
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_what_is_not_counted_by_coverage_has_its_reason():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]
    assert settings["report"]["fail_under"] >= 90
    assert settings["run"]["source"] == ["alter"]
    lines = (ROOT / "pyproject.toml").read_text().partition("exclude_also = [")[2].partition("]")[0].splitlines()
    assert all("#" in line for line in lines if line.strip())
    marked = [
        line for file in (ROOT / "alter").rglob("*.py") for line in file.read_text().splitlines() if "no cover" in line
    ]
    assert all(re.search(r"# pragma: no cover \(\w.*\)", line) for line in marked)
