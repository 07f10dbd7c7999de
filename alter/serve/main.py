"""`alter serve`: from a run folder to a server that listens."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from alter.errors import AlterError

KEY_VARIABLE = "ALTER_API_KEY"
MAX_CONNECTIONS = 1024  # as many files as a process may usually open; beyond them a connection gets 503
GRACE_SECONDS = 5  # to send what was answered at the last moment
# How many shapes of products oneDNN keeps code for, a third of a MB each; of its own accord 1,024. Batches have ever other shapes,
# but those of one layer come again in the next.
KEPT_SHAPES = "64"


def serve(
    run: Path, backbone: str | None, host: str, port: int, api_key_file: Path | None, limits: dict[str, Any]
) -> None:
    """Serves a finished run until SIGTERM or Ctrl+C, which let the requests in flight finish.

    Raises:
        AlterError: the run, an option or the port is not as needed.
    """
    try:
        import uvicorn

        from alter.serve.app import Limits, create_app
    except ModuleNotFoundError as error:
        raise AlterError(
            f"alter serve: the package '{error.name}' is missing; pip install \"alter-mta[serve]\"."
        ) from error
    from transformers.utils.logging import disable_progress_bar

    from alter.loading import load

    disable_progress_bar()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_SHAPES)  # read at the first product
    taken, key = Limits(**limits), read_key(api_key_file)
    listening = bind(host, port)
    predictor = load(run, backbone)
    local = is_loopback(host)
    app = create_app(predictor, taken, key, ("localhost", "127.0.0.1", "::1", "[::1]", host) if local else ("*",))
    handler = logging.StreamHandler()
    handler.setFormatter(WithoutMessages("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("alter.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # alter.serve writes its own, without what clients wrote
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(taken.timeout) + GRACE_SECONDS,
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    ready = f"{len(predictor.tasks)} tasks of {run} at {address} ({', '.join(predictor.tasks)})"
    if not local and key is None:
        print(
            f"alter: {host} can be reached from other machines and no key is asked for; set {KEY_VARIABLE} or --api-key-file.",
            file=sys.stderr,
            flush=True,
        )
    # uvicorn drains at a signal and then raises it again; by then all is done
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(ready, flush=True)  # from now on it is answered

    Announced(config).run(sockets=[listening])


class WithoutMessages(logging.Formatter):
    """Tells of an exception what kind it is and where it was raised: its message may quote a prompt."""

    def formatException(self, ei: Any) -> str:
        """The traceback and the exception's kind."""
        return "".join(traceback.format_tb(ei[2])) + ei[0].__name__


def read_key(file: Path | None) -> str | None:
    """The API key: of a file, or of the environment, where no other user of the machine sees it as they see arguments.

    Raises:
        AlterError: the file cannot be read, or the key is empty or has characters that no header carries.
    """
    if file is not None:
        try:
            key, where = file.read_text(encoding="utf-8").strip(), f"--api-key-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise AlterError(f"--api-key-file: {file} cannot be read ({error}); name a file with the key.") from error
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE].strip(), KEY_VARIABLE
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise AlterError(
            f"{where}: the key is empty or has blanks or other than ASCII letters; give one line of ASCII."
        )
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet: whoever comes before the model is loaded is refused.

    Raises:
        AlterError: the port is taken or not allowed, or the host is not this machine's.
    """
    try:
        if not 0 <= port < 2**16:  # some resolvers take it modulo that
            raise OverflowError("a port is a number from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise AlterError(
            f"--host, --port: cannot listen at {host} port {port} ({why}); choose another, 0 takes a free one."
        ) from error
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
