"""What every request passes first: its size, its time to arrive, the API key, the headers of every response."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from alter.serve.errors import failure

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """Refuses what is too large, too slow or without the key, before anything of it is parsed.

    Args:
        app: the application inside.
        max_bytes: of a request's body.
        timeout: seconds within which the body must have come.
        api_key: that requests must bring as ``Authorization: Bearer KEY``; None for no key.
        open_paths: that need no key.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        max_bytes: int,
        timeout: float,
        api_key: str | None,
        open_paths: Collection[str],
    ) -> None:
        self.app, self.max_bytes, self.timeout, self.open_paths = app, max_bytes, timeout, open_paths
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if not self._has_key(scope):
            refused = failure(401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.")
            refused.headers["www-authenticate"] = "Bearer"
            return await refused(scope, receive, with_headers)
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.timeout)
        except TimeoutError:
            refused = failure(408, f"The request's body did not come within {self.timeout:g} seconds.")
            return await refused(scope, receive, with_headers)
        except ClientDisconnect:
            return  # nobody is left to be answered
        if body is None:
            refused = failure(413, f"The request's body is larger than {self.max_bytes} bytes; send less at a time.")
            refused.headers["connection"] = "close"  # what is left of it is not read
            return await refused(scope, receive, with_headers)
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return parts.pop() if parts else await receive()

        await self.app(scope, replayed, with_headers)

    def _has_key(self, scope: Any) -> bool:
        if self.expected is None or scope["path"] in self.open_paths:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self.expected)  # takes as long wherever they differ

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """The whole body; None where it is too large."""
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self.max_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)
