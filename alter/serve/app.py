"""The application: OpenAI's endpoints over a run's tasks, and what is beside them."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from alter.data import Task
from alter.data.task import AUTO
from alter.errors import AlterError, did_you_mean
from alter.predict import Predictor
from alter.serve import page
from alter.serve.batching import Batcher, Done, Job, QueueFull, RoutingJob, WorkerEnded
from alter.serve.errors import Refused, content, failure
from alter.serve.guard import HEADERS, Guard
from alter.serve.messages import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Envelope,
    Input,
    RoutingRequest,
    finish_reason,
    usage,
)
from alter.serve.metrics import Measured, Metrics
from alter.serve.streaming import Unfolding

POLL_SECONDS = 0.5  # how often it is asked whether the client has gone
OPEN_PATHS = ("/", "/health")
TYPE = re.compile(r"(str|int|bool|dict|list)(\[.*)?$")  # which of a key's types did not fit, where a mistake is told
log = logging.getLogger("alter.serve")
FAILED = "The answer failed; the server's log says where."
BROKEN = "The model cannot be used any more; the server's log says why, and the server has to be started again."
Result = TypeVar("Result")


@dataclass
class Limits:
    """What the server takes.

    Attributes:
        max_batch: the most inputs answered at once.
        max_waiting: the most inputs that wait; further requests get 429.
        timeout: seconds until a request is given up.
        max_bytes: of a request.
    """

    max_batch: int = 32
    max_waiting: int = 128
    timeout: float = 60.0
    max_bytes: int = 65536

    def __post_init__(self) -> None:
        names = {
            "max_batch": "--max-batch",
            "max_waiting": "--queue",
            "timeout": "--timeout",
            "max_bytes": "--max-bytes",
        }
        problems = [
            f"{flag}: {getattr(self, key):g} is not a number above 0; give one."
            for key, flag in names.items()
            if not (getattr(self, key) > 0 and math.isfinite(getattr(self, key)))
        ]
        if problems:
            raise AlterError(*problems)


class Server:
    """Answers requests with a predictor.

    Args:
        predictor: of a finished run.
        limits: what is taken.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.metrics = Metrics()
        self.batcher = Batcher(predictor, self.metrics, limits.max_batch, limits.max_waiting)
        # Off the event loop, and one bounds how much is read at once.
        self._reader = ThreadPoolExecutor(1, "alter-reading")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The worker lives as long as the application."""
        self.batcher.start()
        yield
        await asyncio.to_thread(self.batcher.close)
        self._reader.shutdown(wait=False, cancel_futures=True)

    # -- endpoints --------------------------------------------------------------------------------------------------

    async def completions(self, asked: CompletionRequest, http: HTTPRequest) -> Response:
        """Answers one prompt or several."""
        prompts = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
        return await self._complete(asked, http, "prompt", prompts, asked.max_tokens, chat=False)

    async def chat(self, asked: ChatRequest, http: HTTPRequest) -> Response:
        """Answers the last message."""
        longest = asked.max_completion_tokens or asked.max_tokens
        return await self._complete(asked, http, "messages", [asked.input], longest, chat=True)

    async def _complete(
        self,
        asked: CompletionRequest | ChatRequest,
        http: HTTPRequest,
        param: str,
        texts: Sequence[Input],
        longest: int | None,
        chat: bool,
    ) -> Response:
        asked.refuse_unsupported()
        jobs = await self._jobs(asked.model, texts, param, limit=longest, streams=bool(asked.stream))
        envelope = Envelope(_model_of(jobs), chat)
        self._submit(jobs)
        if asked.stream:
            told = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(self._stream(jobs, envelope, told), media_type="text/event-stream")
        found = await self._wait(jobs, http)
        if found is None:
            return Response(status_code=499)
        read, written = sum(len(job.prompt) for job in jobs), sum(done.tokens for done in found)
        return JSONResponse(
            envelope.whole([(done.answer.text, finish_reason(done)) for done in found], usage(read, written))
        )

    async def classify(self, asked: ClassifyRequest, http: HTTPRequest) -> Response:
        """Tells the likeliest choice for each input, and the probability of every choice."""
        inputs = asked.input if isinstance(asked.input, list) else [asked.input]
        jobs = await self._jobs(asked.model, inputs, "input", probabilities=True)
        for job in jobs:
            if not job.task.choices:
                raise Refused(400, f"Task '{job.task.name}' has no choices; ask /v1/completions.", "model")
        self._submit(jobs)
        found = await self._wait(jobs, http)
        if found is None:
            return Response(status_code=499)
        rows = [
            {
                "index": index,
                "label": done.answer.text,
                "probabilities": done.answer.probabilities,
                "model": job.task.name,
            }
            for index, (job, done) in enumerate(zip(jobs, found, strict=True))
        ]
        used = usage(sum(len(job.prompt) for job in jobs), 0)
        return JSONResponse({"object": "list", "model": _model_of(jobs), "data": rows, "usage": used})

    async def routing(self, asked: RoutingRequest, http: HTTPRequest) -> Response:
        """Tells which adapters answered an input, by layer."""
        jobs = await self._jobs(asked.model, [asked.input], "input", kind=RoutingJob, given=asked.answer)
        self._submit(jobs)
        found = await self._wait(jobs, http)
        if found is None:
            return Response(status_code=499)
        return JSONResponse({"object": "routing", "model": _model_of(jobs), **found[0].answer})

    async def models(self) -> Response:
        """Lists the tasks as models."""
        names = [*self.predictor.tasks, *([AUTO] if self._guesses(AUTO) else [])]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, name: str) -> Response:
        """One task as a model."""
        return JSONResponse(self._model(name if self._guesses(name) else self._task(name).name))

    def _guesses(self, name: str) -> bool:
        """Whether the name leaves it to the server to find each input's task."""
        return name == AUTO and self.predictor.task_predictor is not None

    def _model(self, name: str) -> dict[str, Any]:
        if self._guesses(name):
            return {"id": AUTO, "object": "model", "created": 0, "owned_by": "alter"}
        task = self.predictor.task(name)
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "alter",
            "kind": task.kind,
            "fields": task.fields,
            "choices": task.choices,
            "max_tokens": task.max_target_tokens,
        }

    async def health(self) -> Response:
        """Says that the server is up, and that its model answers; while it drains nobody reaches it any more."""
        if self.batcher.broken:
            return failure(503, BROKEN)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def index(self) -> Response:
        """The page."""
        return HTMLResponse(page.HTML, headers={"content-security-policy": page.POLICY})

    # -- from a request to its answer -------------------------------------------------------------------------------

    def _task(self, name: str) -> Task:
        if name not in self.predictor.tasks:
            known = ", ".join(self.predictor.tasks) + (f", or {AUTO}" if self._guesses(AUTO) else "")
            near = did_you_mean(name, self.predictor.tasks)
            raise Refused(404, f"There is no model of this name; a model is a task, one of {known}.{near}", "model")
        return self.predictor.task(name)

    async def _jobs(
        self,
        model: str,
        inputs: Sequence[Input],
        param: str,
        limit: int | None = None,
        kind: type[Job] = Job,
        **options: Any,
    ) -> list[Any]:
        """Finds each input's task and tokenises it, beside the event loop."""
        if not 0 < len(inputs) <= self.limits.max_waiting:
            most = self.limits.max_waiting
            raise Refused(400, f"Give 1 to {most} inputs in one request, not {len(inputs)}.", param)
        task = None if self._guesses(model) else self._task(model)

        def encode() -> list[tuple[Task, list[int]]]:
            if task is None:
                return self._guessed(inputs, param)
            rows = [_fields(task, given, param) if isinstance(given, str) else given for given in inputs]
            return [(task, self.predictor.encode(row, task.name, f"input {n}")) for n, row in enumerate(rows, 1)]

        try:
            reading = asyncio.get_running_loop().run_in_executor(self._reader, encode)
            found = await asyncio.wait_for(reading, self.limits.timeout)
        except TimeoutError:
            raise Refused(504, self._too_late()) from None
        except AlterError as error:
            message = " ".join(error.messages)
            for own in map(self.predictor.task, self.predictor.tasks):
                message = message.replace(f"{own.where}: ", "")  # a path of this machine
            raise Refused(400, message, param) from None
        return [
            kind(own, prompt, min(limit or own.max_target_tokens, own.max_target_tokens), **options)
            for own, prompt in found
        ]

    def _guessed(self, inputs: Sequence[Input], param: str) -> list[tuple[Task, list[int]]]:
        texts = [_object(given) or given if isinstance(given, str) else given for given in inputs]
        guesses = self.predictor.guess(texts)
        found = []
        for number, (text, guess) in enumerate(zip(texts, guesses, strict=True), 1):
            if guess.task is None:
                message = f"Which task input {number} is for is not clear: {guess}; name a task as the model."
                raise Refused(422, message, param, "low_confidence")
            found.append(
                (self.predictor.task(guess.task), self.predictor.guessed_prompt(text, guess, f"input {number}"))
            )
        return found

    def _submit(self, jobs: Sequence[Job]) -> None:
        try:
            self.batcher.submit(jobs)
        except QueueFull:
            raise Refused(429, "Too many inputs are waiting; try again in a moment.") from None
        except WorkerEnded:
            raise Refused(503, BROKEN) from None

    async def _wait(self, jobs: Sequence[Job], http: HTTPRequest) -> list[Done] | None:
        """Waits for all; None where the client has gone."""
        try:
            with _awaited(jobs):
                async with asyncio.timeout(self.limits.timeout):
                    return await _unless_gone(http, asyncio.gather(*(job.done() for job in jobs)))
        except TimeoutError:
            raise Refused(504, self._too_late()) from None
        except Exception:  # of the batch, which has told the log
            raise Refused(500, FAILED) from None

    async def _stream(self, jobs: Sequence[Job], envelope: Envelope, tell_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: the answers as they are written, one input after another."""
        with _awaited(jobs):
            try:
                async with asyncio.timeout(self.limits.timeout):
                    written = 0
                    for index, job in enumerate(jobs):
                        text = Unfolding(self.predictor)
                        yield _event(envelope.chunk(index, "", first=True))
                        while not isinstance(event := await job.next(), Done):
                            if new := text.more(event.tokens):
                                yield _event(envelope.chunk(index, new))
                        yield _event(envelope.chunk(index, text.rest(event.answer.text), finish_reason(event)))
                        written += event.tokens
                    if tell_usage:
                        yield _event(envelope.usage_chunk(usage(sum(len(job.prompt) for job in jobs), written)))
                    yield "data: [DONE]\n\n"
            except TimeoutError:
                yield _event(content(504, self._too_late()))
            except Exception:
                log.exception("A stream failed")
                yield _event(content(500, FAILED))

    def _too_late(self) -> str:
        return f"There was no answer within {self.limits.timeout:g} seconds; ask for less, or later."


@contextmanager
def _awaited(jobs: Sequence[Job]) -> Any:
    """However it ends, afterwards nobody waits for the jobs."""
    try:
        yield
    finally:
        for job in jobs:
            job.abandoned = True


async def _unless_gone(http: HTTPRequest, answers: Awaitable[Result]) -> Result | None:
    """Waits, as long as the client does."""
    waiting = asyncio.ensure_future(answers)
    try:
        while not (await asyncio.wait({waiting}, timeout=POLL_SECONDS))[0]:
            if await http.is_disconnected():
                return None
        return waiting.result()
    finally:
        waiting.cancel()
        waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which nobody else asks for


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _model_of(jobs: Sequence[Job]) -> str:
    names = {job.task.name for job in jobs}
    return names.pop() if len(names) == 1 else AUTO


def _object(text: str) -> dict[str, Any] | None:
    """An object in JSON; None where the text is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _fields(task: Task, text: str, param: str) -> Input:
    """The input that a text stands for: of a task with several fields, an object in JSON."""
    if len(task.fields) == 1:
        return text
    if (found := _object(text)) is None:
        names = ", ".join(task.fields) or "(none)"
        raise Refused(400, f"Task '{task.name}' reads the fields {names}; send them as an object in JSON.", param)
    return found


def create_app(
    predictor: Predictor, limits: Limits | None = None, api_key: str | None = None, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """Makes the application.

    Args:
        predictor: of a finished run; from now on the application's alone.
        limits: what is taken.
        api_key: that requests must bring; None for no key.
        hosts: names under which the server may be asked; a page of elsewhere that points its own name here is refused.
    """
    limits = limits or Limits()
    server = Server(predictor, limits)
    # Without FastAPI's own pages, which load from elsewhere.
    app = FastAPI(title="ALTER", lifespan=server.lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/", server.index),
        ("GET", "/health", server.health),
        ("GET", "/metrics", server.metrics_text),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name}", server.model),
        ("POST", "/v1/completions", server.completions),
        ("POST", "/v1/chat/completions", server.chat),
        ("POST", "/v1/classify", server.classify),
        ("POST", "/v1/routing", server.routing),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"] if method == "GET" else [method])
    _tell_errors(app)
    # the last one added is the first that a request meets
    app.add_middleware(Guard, limits.max_bytes, limits.timeout, api_key, OPEN_PATHS)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Measured, server.metrics, {path for _, path, _ in routes})
    return app


def _tell_errors(app: FastAPI) -> None:
    """Every error is told in OpenAI's form, and none quotes what the client sent to anyone but the client."""

    @app.exception_handler(Refused)
    async def refused(http: HTTPRequest, error: Refused) -> Response:
        return failure(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HTTPRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return failure(400, f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.")
        keys = [str(part) for part in first["loc"][1:] if not TYPE.match(str(part))]
        if not keys:
            return failure(400, "The body has to be an object in JSON, sent with 'Content-Type: application/json'.")
        place = ".".join(keys)
        return failure(400, f"{place}: {first['msg']}.", place)

    @app.exception_handler(HTTPException)
    async def other(http: HTTPRequest, error: HTTPException) -> Response:
        response = failure(error.status_code, f"{error.detail}.")
        response.headers.update(error.headers or {})  # at 405 the methods that are allowed
        return response

    @app.exception_handler(Exception)
    async def failed(http: HTTPRequest, error: Exception) -> Response:
        response = failure(500, FAILED)
        response.headers.update(HEADERS)  # it is sent from outside the guard
        return response
