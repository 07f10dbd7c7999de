"""A Python that starts at once: each of its processes is a fork of one that has imported what ``alter`` needs.

Imports are most of what a tiny run takes, and the tests start runs in processes of their own by the dozen. With the fixture
``warm``, ``sys.executable`` is a small program that sends ``-m alter ...`` here, with its streams, folder, environment and
signals, and ends as that process does; anything else it hands to the real Python.

What is read while modules are imported (``OMP_NUM_THREADS``, ``HF_*``, ``PYTHON*``) is the server's, and a fork's peak of memory
begins at the server's: a test of these starts the real Python.
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
import traceback
import uuid
from contextlib import suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
IMPORTED = (
    "alter.cli", "alter.run", "alter.compare.cell", "alter.doctor.trial", "alter.loading",
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
request = json.dumps([given[1], given[2:], os.getcwd(), dict(os.environ), {client!r}]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
for number in {signals}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
code = int(server.recv(16) or -9)
if code < 0:
    if code != -9:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start(folder: Path) -> tuple[subprocess.Popen, Path]:
    """Starts a server; returns it and the program that stands for Python."""
    address, client = f"\0alter-{uuid.uuid4()}", folder / "python"  # no file: paths of sockets may not be long
    numbers = [int(number) for number in SIGNALS]
    client.write_text(CLIENT.format(python=sys.executable, address=address, client=str(client), signals=numbers))
    client.chmod(0o755)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.warm", address[1:]]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # it ends when its stdin does, with this process
    server = subprocess.Popen(command, env=environment, cwd=root, **pipes)
    assert server.stdout.readline() == b"ready\n", "the warm Python did not start"
    return server, client


def serve(address: str) -> None:
    """Imports, says that it is ready, and forks for each who asks."""
    for name in IMPORTED:
        with suppress(ImportError):  # not all is installed everywhere
            importlib.import_module(name)
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who asked ends, and so do they
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the attendants
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{address}")
    listening.listen(64)
    print("ready", flush=True)
    while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
        asking, _ = listening.accept()
        if not os.fork():
            listening.close()
            _attend(asking)
        asking.close()


def _attend(asking: socket.socket) -> None:
    """Runs what is asked for in a further fork, hands signals on, and tells how it ended; ends it where nobody waits any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, *_ = socket.recv_fds(asking, 4, 3)
    request = _received(asking, int.from_bytes(head, "big"))
    worker = os.fork()
    if not worker:
        asking.close()
        _run(streams, *json.loads(request))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(worker)
    while ended not in select.select([asking, ended], [], [])[0]:
        if received := asking.recv(1):
            os.kill(worker, received[0])
            continue
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
            os.killpg(worker, signal.SIGKILL)  # and what it has started
        os.waitpid(worker, 0)
        os._exit(0)
    with suppress(OSError):
        asking.sendall(str(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])).encode())
    os._exit(0)


def _received(asking: socket.socket, size: int) -> bytes:
    """So many bytes; ends this process where they do not come."""
    found = b""
    while len(found) < size:
        if not (part := asking.recv(size - len(found))):
            os._exit(0)
        found += part
    return found


def _run(
    streams: list[int], module: str, arguments: list[str], folder: str, environment: dict[str, str], python: str
) -> None:
    """What ``python -m module arguments`` would do; does not return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.argv = [module, *arguments]
    sys.executable = python
    sys.modules.pop(module, None)  # runpy warns of a module that has been imported
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
