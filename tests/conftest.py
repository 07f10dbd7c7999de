import gc
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from alter.errors import AlterError
from tests import warm as warm_python

# A busy machine is no defect; and a change is judged by the same examples as the one before it, while others draw anew.
settings.register_profile("shared", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shared")


def pytest_collection_finish():
    """What the imports made stays: each of the many collections of garbage would walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """Tests keep what they fetch and compute to themselves."""
    monkeypatch.setenv("ALTER_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _own_environment():
    """Lightning notes seeds and ranks in the environment; the next test must not see them."""
    before = dict(os.environ)
    os.environ.pop("COLUMNS", None)  # screens are as wide as they are by default, whatever the terminal
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def cells_here(monkeypatch):
    """`alter compare` runs its cells in this process: starting one of its own takes longer than what a tiny one does."""
    from alter.compare import cell, grid

    def run_cells(cells, command, name, processes):
        for folder in cells:
            before = dict(os.environ)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", command(folder)[1:])
                cell.main()
            os.environ.clear()
            os.environ.update(before)
        return []

    monkeypatch.setattr(grid, "run_cells", run_cells)


@pytest.fixture(scope="session")
def _warm_python(tmp_path_factory):
    server, python = warm_python.start(tmp_path_factory.mktemp("warm"))
    yield python
    server.kill()
    server.wait()


@pytest.fixture
def warm(_warm_python, monkeypatch):
    """Processes of ``alter`` that this process starts begin at once; see ``tests/warm.py``."""
    monkeypatch.setattr(sys, "executable", str(_warm_python))


def _real(name):
    folder = os.environ.get("ALTER_TEST_MODELS")
    return Path(folder, name) if folder and Path(folder, name).is_dir() else None


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M: from ALTER_TEST_MODELS, or fetched as a user's would be."""
    from alter.nn.backbone import resolve_backbone

    try:
        return _real("smollm2-135m") or resolve_backbone("smollm2-135m")
    except AlterError as error:
        pytest.skip(f"no real smollm2-135m: {error}")


@pytest.fixture(scope="session")
def t5_small():
    """The folder of a real T5, from ALTER_TEST_MODELS."""
    return _real("t5-small") or pytest.skip("no real t5-small: ALTER_TEST_MODELS names no folder that holds it")


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, headless."""
    api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine; Debian's package chromium brings it")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
