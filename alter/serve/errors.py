"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from alter.data.files import writable

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: a sentence for the client's author.
        param: the key of the request that it is about.
        code: for programs, where the status says too little.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def content(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = writable(message)  # it may quote the client
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """The response that tells an error."""
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(content(status, message, param, code), status, headers)
