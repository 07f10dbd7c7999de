"""What Prometheus reads at /metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128)
log = logging.getLogger("alter.serve")


class Metrics:
    """The server's own registry: requests, queue, batches and tokens, and the process's memory and time."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "alter_requests",
            "Requests answered, by endpoint and HTTP status.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "alter_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["endpoint"],
            registry=registry,
            buckets=SECONDS,
        )
        self.in_flight = Gauge("alter_requests_in_flight", "Requests being answered.", registry=registry)
        self.waiting = Gauge("alter_inputs_waiting", "Inputs in the queue.", registry=registry)
        self.waited = Histogram(
            "alter_queue_seconds", "Seconds an input waited for its batch.", registry=registry, buckets=SECONDS
        )
        self.batch_inputs = Histogram("alter_batch_inputs", "Inputs of a batch.", registry=registry, buckets=INPUTS)
        self.batch_tasks = Histogram("alter_batch_tasks", "Tasks in a batch.", registry=registry, buckets=INPUTS)
        self.prompt_tokens = Counter("alter_prompt_tokens", "Tokens of answered prompts.", ["task"], registry=registry)
        self.answer_tokens = Counter("alter_answer_tokens", "Tokens written.", ["task"], registry=registry)


class Measured:
    """Counts, times and logs every request: method, endpoint, status and seconds, and nothing that a client wrote.

    Args:
        app: the application inside.
        metrics: are told.
        endpoints: the paths that are told apart; a client could make up others without end.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics, endpoints: Collection[str]) -> None:
        self.app, self.metrics, self.endpoints = app, metrics, endpoints

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 499  # where nothing was sent, since the client had gone

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, noted)
        except Exception:
            status = 500  # told further out
            raise
        finally:
            took = time.perf_counter() - started
            path = getattr(scope.get("route"), "path", scope["path"])  # /v1/models/{name}, whatever the name
            endpoint = path if path in self.endpoints else "other"  # refused before it had a route
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(took)
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
            log.info("%s %s %d %.3fs", method, endpoint, status, took)
