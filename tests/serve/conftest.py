"""A server over a tiny run, in a thread of the test's own process."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")

import uvicorn

import alter
from alter.serve.app import Limits, create_app
from tests.data.conftest import words  # noqa: F401 (a fixture)
from tests.runs import make_run


@contextmanager
def serving(predictor, limits=None, api_key=None):
    """Serves at a free port of loopback; yields the address."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(predictor, limits or Limits(), api_key, ("127.0.0.1",))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def run(tmp_path, words):  # noqa: F811
    return make_run(tmp_path, words)


@pytest.fixture
def predictor(run):
    return alter.load(run)


@pytest.fixture
def alone(run):
    """The same model, for what it says by itself: the server's is the server's alone."""
    return alter.load(run)
