"""What is published: the wheel from a checkout and from the sdist are the same, and hold what the commands read."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path
from subprocess import run

import pytest

pytest.importorskip("hatchling", reason='needs pip install "alter-mta[dev]"')
ROOT = Path(__file__).parents[1]


def build(source, target, out):
    run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (made,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return made


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pages_named():
    """The pages that what is installed sends its readers to."""
    files = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "alter").rglob("*.py")]
    found = {page for file in files for page in re.findall(r"\bdocs/\w+\.md", file.read_text(encoding="utf-8"))}
    assert "docs/data.md" in found
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return contents(build(ROOT, "wheel", tmp_path_factory.mktemp("wheel")))


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build(source, "wheel", tmp_path / "again")) == wheel
    for name in ("tests/test_package.py", "docs/index.md", "constraints.txt", "noxfile.py", "CITATION.cff"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_wheel_holds_the_code_the_recipes_and_the_scripts_that_commands_read(wheel):
    wheel = dict(wheel)
    for page in pages_named():
        assert wheel.pop(f"alter/{page}") == (ROOT / page).read_bytes()
    for folder, inside in (("alter", "alter"), ("recipes", "alter/recipes")):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert wheel.pop(f"{inside}/{file.relative_to(ROOT / folder)}") == file.read_bytes()
    rest = {name.rpartition("/")[2] for name in wheel}
    assert rest == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}
