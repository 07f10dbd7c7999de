import os

import pytest


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """Tests keep what they fetch and compute to themselves."""
    monkeypatch.setenv("ALTER_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _own_environment():
    """Lightning notes seeds and ranks in the environment; the next test must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
