"""A Python that starts at once: each of its processes is a fork of one that has imported what ``alter`` needs.

Imports are most of what a tiny run takes, and the tests start runs in processes of their own by the dozen. With the fixture
``warm``, ``sys.executable`` is a small program that sends ``-m alter ...`` here, with its streams, folder, environment and
signals, and ends as that process does; anything else it hands to the real Python.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
IMPORTED = (
    "alter.cli", "alter.run", "alter.compare.cell", "alter.doctor.trial", "alter.predict",
    # what these import when they need it
    "bitsandbytes", "datasets", "functorch.compile", "peft", "torch.utils.tensorboard", "transformers.optimization",
)  # fmt: skip
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
given = sys.argv[1:]
if given[:1] != ["-m"] or given[1].partition(".")[0] not in ("alter", "tests"):
    os.execv({python!r}, [{python!r}, *given])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in {signals}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
request = json.dumps([given[1], given[2:], os.getcwd(), dict(os.environ), {client!r}]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
code = int(server.recv(16) or -9)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start(folder: Path) -> tuple[subprocess.Popen, Path]:
    """Starts a server; returns it and the program that stands for Python."""
    address, client = folder / "server", folder / "python"
    client.write_text(
        CLIENT.format(
            python=sys.executable, address=str(address), client=str(client), signals=[int(number) for number in SIGNALS]
        )
    )
    client.chmod(0o755)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", str(address)], env=environment, cwd=root, stdin=subprocess.DEVNULL
    )
    while not address.exists():
        assert server.poll() is None, "the warm Python did not start"
        time.sleep(0.1)
    return server, client


def serve(address: str) -> None:
    """Imports, and forks for each who asks."""
    for name in IMPORTED:
        with suppress(ImportError):  # not all is installed everywhere
            importlib.import_module(name)
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for them is _attend
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen(64)
    os.rename(f"{address}.new", address)
    while True:
        asking, _ = listening.accept()
        if not os.fork():
            listening.close()
            _attend(asking)
        asking.close()


def _attend(asking: socket.socket) -> None:
    """Runs what is asked for in a further fork, hands signals on, and tells how it ended; ends it where nobody waits any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(asking, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += asking.recv(1 << 16)
    worker = os.fork()
    if not worker:
        asking.close()
        _run(streams, *json.loads(request))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(worker)
    while True:
        ready, *_ = select.select([asking, ended], [], [])
        if ended in ready:
            asking.sendall(str(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])).encode())
            os._exit(0)
        if received := asking.recv(1):
            os.kill(worker, received[0])
        else:
            os.killpg(worker, signal.SIGKILL)  # with what it has started


def _run(
    streams: list[int], module: str, arguments: list[str], folder: str, environment: dict[str, str], python: str
) -> None:
    """What ``python -m module arguments`` would do; does not return."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.argv = [module, *arguments]
    sys.executable = python
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of any Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
