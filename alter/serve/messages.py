"""The requests, and the shapes of the responses that OpenAI's clients expect."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from alter.serve.batching import Done
from alter.serve.errors import Refused

Input = str | dict[str, Any]
# What would change the answer in a way that is not on offer, and the value that asks for nothing. Sampling parameters are not
# among them: clients send some unasked, and the answers are the likeliest ones whatever they say.
UNSUPPORTED: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "top_logprobs": None, "stop": None, "tools": None,
    "functions": None, "logit_bias": None, "response_format": {"type": "text"}, "audio": None,
}  # fmt: skip


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class Request(BaseModel, extra="allow"):
    """What all requests have: the model is the name of a task."""

    model: str

    def refuse_unsupported(self) -> None:
        """Raises what would be answered differently from what it asks."""
        for key, nothing in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(key)
            if key == "stop" and _never_met(value):
                continue
            if value is not None and value != nothing and value not in (False, [], {}):
                raise Refused(400, f"'{key}' is not supported; leave it out.", key)


def _never_met(stop: Any) -> bool:
    """Whether answers end before they would meet any of these texts: an answer is one line."""
    stops = stop if isinstance(stop, list) else [stop]
    return all(isinstance(text, str) and "\n" in text for text in stops)


class CompletionRequest(Request):
    """``/v1/completions``: texts, or objects with the task's fields."""

    prompt: Input | list[Input]
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class Message(BaseModel):
    """A message of a chat; of its parts only texts can be read."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """All text of it."""
        if isinstance(self.content, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
                raise Refused(400, "Only parts of type 'text' can be read.", "messages")
            return "".join(part["text"] for part in self.content)
        return self.content or ""


class ChatRequest(Request):
    """``/v1/chat/completions``: the input is the last message, which is the user's."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def input(self) -> str:
        """The last message's text."""
        last = self.messages[-1]
        if last.role != "user":
            raise Refused(
                400, f"The last message is the input and must be the user's, not of role '{last.role}'.", "messages"
            )
        return last.text


class ClassifyRequest(Request):
    """``/v1/classify``: texts, or objects with the task's fields."""

    input: Input | list[Input]


class RoutingRequest(Request):
    """``/v1/routing``: an input, and the answer where it is known."""

    input: Input
    answer: str | None = None


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }


def finish_reason(done: Done) -> str:
    """Why an answer ended."""
    return "length" if done.cut else "stop"


class Envelope:
    """What the response to one request, or all chunks of it, have in common.

    Args:
        model: the task's name.
        chat: whether it is of ``/v1/chat/completions``.
    """

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.common: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, choices: list[tuple[str, str]], used: Mapping[str, int]) -> dict[str, Any]:
        """The response: of each choice its text and why it ended."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self.common,
            "object": kind,
            "choices": [
                {"index": index, "logprobs": None, "finish_reason": reason, **self._text("message", text)}
                for index, (text, reason) in enumerate(choices)
            ],
            "usage": used,
        }

    def chunk(self, index: int, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A part of a streamed response."""
        inside = self._text("delta", text)
        if self.chat and not first:
            inside["delta"].pop("role")
        return {
            **self.common,
            "object": self._chunk_kind,
            "choices": [{"index": index, "logprobs": None, "finish_reason": reason, **inside}],
        }

    def usage_chunk(self, used: Mapping[str, int]) -> dict[str, Any]:
        """The last part, where it was asked for."""
        return {**self.common, "object": self._chunk_kind, "choices": [], "usage": used}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _text(self, key: str, text: str) -> dict[str, Any]:
        return {key: {"role": "assistant", "content": text}} if self.chat else {"text": text}
