"""What waits is answered in batches of mixed tasks, by one thread that alone touches the model.

Where the model allows it (`alter.nn.stepping`), an input joins the answers that are being written and leaves at its own end.
Elsewhere a batch is formed from what waits when the one before has ended; its rows end one by one, each told at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from alter.answering import Answer
from alter.data import Task
from alter.predict import Predictor
from alter.serve.metrics import Metrics

GATHER_SECONDS = 0.01  # clients that were answered together come back together, but not in the same millisecond
# Tokens written between two looks at the queue, at least: reading one prompt costs about as much as a token of all rows.
STEPS = 4
TRIM_SECONDS = 5  # batches of ever other sizes leave holes, by which memory would grow by 4% in five minutes
log = logging.getLogger("alter.serve")


def give_back_memory() -> None:
    """Gives what is free but held by the C library back to the system, where that is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class QueueFull(Exception):
    """There is no room for these jobs; they may come again later."""


class WorkerEnded(Exception):
    """A failure has ended the worker, so that nothing is answered any more."""


@dataclass(frozen=True)
class Piece:
    """All tokens of an answer so far."""

    tokens: list[int]


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        answer: the model's ``Answer``; of a ``RoutingJob`` the gates.
        tokens: how many it wrote; 0 for a classification, which is scored.
        cut: whether it was ended by its limit.
    """

    answer: Any
    tokens: int = 0
    cut: bool = False


@dataclass(eq=False)
class Job:
    """One input that waits for its answer; made within a running event loop.

    Attributes:
        task: that it is for.
        prompt: token ids.
        limit: the most tokens of a generated answer.
        probabilities: whether those of all choices are wanted.
        streams: whether the tokens are wanted as they come.
        abandoned: nobody waits for it any more.
    """

    task: Task
    prompt: list[int]
    limit: int
    probabilities: bool = False
    streams: bool = False
    abandoned: bool = False
    ended: bool = False
    since: float = field(default_factory=time.perf_counter)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    @property
    def size(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + (0 if self.task.choices else self.limit)

    def tell(self, event: Piece | Done | Exception) -> None:
        """Hands an event to whoever waits, from any thread."""
        self.ended = self.ended or not isinstance(event, Piece)
        with suppress(RuntimeError):  # the event loop has closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Piece | Done:
        """Waits for the next event.

        Raises:
            Exception: the batch failed.
        """
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def done(self) -> Done:
        """Waits for the end."""
        while not isinstance(event := await self.next(), Done):
            pass
        return event


@dataclass(eq=False)
class RoutingJob(Job):
    """One input whose gates are asked for; its ``Done`` holds them in place of the answer.

    Attributes:
        given: the answer, where it is known.
    """

    given: str | None = None


class Batcher:
    """The queue and its worker.

    Args:
        predictor: answers; nobody else may use its model.
        metrics: are told of every batch.
        max_batch: the most inputs of a batch.
        max_waiting: the most inputs that wait.
    """

    def __init__(self, predictor: Predictor, metrics: Metrics, max_batch: int, max_waiting: int) -> None:
        self.predictor, self.metrics = predictor, metrics
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.broken = False  # the worker has failed for good
        self._decoder = predictor.step_decoder(self._watch)
        self._thread = threading.Thread(target=self._work, name="alter-batches", daemon=True)

    def start(self) -> None:
        """Starts the worker."""
        self._thread.start()

    def close(self) -> None:
        """Answers what waits, and ends the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues the jobs, all or none.

        Raises:
            QueueFull: there is no room for all.
            WorkerEnded: nobody would answer them.
        """
        with self._changed:
            if self.broken:
                raise WorkerEnded
            self._forget()
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise QueueFull
            self._waiting.extend(jobs)
            self._note_waiting()
            self._changed.notify()

    @property
    def _writing(self) -> list[Job]:
        """Whose answers are being written, and may be joined."""
        return [cast(Job, row.key) for row in self._decoder.rows] if self._decoder else []

    def _work(self) -> None:
        try:
            self._answer_all()
        except Exception as error:  # such as a GPU that fails at every call from then on
            log.exception("The model cannot be used any more; the server has to be started again")
            with self._changed:
                self.broken = True
                for job in self._waiting:
                    job.tell(error)
                self._waiting.clear()
                self._note_waiting()

    def _answer_all(self) -> None:
        trimmed = time.monotonic()
        while (jobs := self._take()) is not None:
            if time.monotonic() - trimmed > TRIM_SECONDS:
                give_back_memory()
                trimmed = time.monotonic()
            concerned = [*jobs, *self._writing]
            try:
                began = time.monotonic()
                self._start(jobs)
                self._write(time.monotonic() - began)
            except Exception as error:  # the next batch must be answered all the same
                log.exception("A batch of %d failed", len(concerned))
                for job in concerned:
                    if not job.ended:
                        job.tell(error)
                self._decoder = self.predictor.step_decoder(self._watch)

    def _take(self) -> list[Job] | None:
        """Takes the oldest jobs that fit beside what is being written; waits only where that is nothing.

        A generation that does not fit yet holds up the generations behind it and no classification, and the reverse; while
        ``max_batch`` answers are being written, all wait.

        Returns:
            the jobs, perhaps none; None once it is closed and all is answered.
        """
        writing = self._writing
        with self._changed:
            while not self._waiting and not writing:
                if self._closed:
                    return None
                self._changed.wait()
                if not self._closed:
                    self._changed.wait_for(lambda: len(self._waiting) >= self.max_batch, GATHER_SECONDS)
                self._forget()
            taken: list[Job] = []
            left: list[Job] = []
            full: set[bool] = set()
            # classifications and generations run as batches of their own
            together = {True: [], False: [job.size for job in writing]}
            while self._waiting and len(full) < len(together) and len(writing) + len(taken) < self.max_batch:
                job = self._waiting.popleft()
                scored = bool(job.task.choices)
                sizes = [*together[scored], job.size]
                if scored in full or (len(sizes) > 1 and len(sizes) * max(sizes) > self.predictor.max_batch_tokens):
                    full.add(scored)
                    left.append(job)
                else:
                    together[scored] = sizes
                    taken.append(job)
            self._waiting.extendleft(reversed(left))
            self._note_waiting()
            return [job for job in taken if not job.abandoned]

    def _forget(self) -> None:
        """Drops what nobody waits for."""
        if any(job.abandoned for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.abandoned)

    def _note_waiting(self) -> None:
        self.metrics.waiting.set(len(self._waiting))

    def _start(self, jobs: Sequence[Job]) -> None:
        """Answers what takes one pass, and begins to write what takes many."""
        for job in jobs:
            self.metrics.waited.observe(time.perf_counter() - job.since)
        plain = [job for job in jobs if not isinstance(job, RoutingJob)]
        joining = [job for job in plain if self._decoder and not job.task.choices]
        whole = [job for job in plain if job not in joining]
        if whole:
            self._answer(whole)
        for job in jobs:
            if isinstance(job, RoutingJob):
                self._tell_routing(job)
        if joining and self._decoder:
            self._count([*self._writing, *joining])
            names, prompts = [job.task.name for job in joining], [job.prompt for job in joining]
            self.predictor.join(self._decoder, joining, names, prompts, [job.limit for job in joining])

    def _tell_routing(self, job: RoutingJob) -> None:
        """By itself, so that what goes wrong with it is no other's."""
        try:
            name, answer = job.task.name, job.given
            if answer is None:
                answer = self.predictor.answer(name, [job.prompt], probabilities=False)[0].text
            job.tell(Done(self.predictor.gates(name, job.prompt, answer)))
        except Exception as error:
            log.exception("A request for routing failed")
            job.tell(error)

    def _write(self, seconds: float) -> None:
        """Writes a few tokens of every row, and as long as others' inputs took: else a long answer waits for all of these at each."""
        decoder, end, steps = self._decoder, time.monotonic() + seconds, 0
        while decoder and decoder.rows and (steps < STEPS or time.monotonic() < end):
            decoder.step()
            steps += 1

    def _answer(self, jobs: Sequence[Job]) -> None:
        self._count(jobs)
        answers = self.predictor.answer_mixed(
            [job.task.name for job in jobs],
            [job.prompt for job in jobs],
            [job.probabilities for job in jobs],
            [job.limit for job in jobs],
            lambda row, tokens, ended: self._watch(jobs[row], tokens, ended),
        )
        for job, answer in zip(jobs, answers, strict=True):
            if not job.ended:
                self._end(job, answer, None)

    def _count(self, jobs: Sequence[Job]) -> None:
        self.metrics.batch_inputs.observe(len(jobs))
        self.metrics.batch_tasks.observe(len({job.task.name for job in jobs}))

    def _watch(self, job: Job, tokens: list[int], ended: bool) -> bool:
        """Hands on what has been written; whether to go on."""
        if ended:
            self._end(job, Answer(self.predictor.decode(tokens), None), tokens)
        elif job.streams and not job.abandoned:
            job.tell(Piece(list(tokens)))
        return not job.abandoned

    def _end(self, job: Job, answer: Answer, tokens: list[int] | None) -> None:
        """Tells a job its answer; where it was searched by beams its tokens are counted from the text."""
        if tokens is None:
            ids = [] if job.task.choices else self.predictor.tokenizer(answer.text, add_special_tokens=False).input_ids
            tokens = ids[: job.limit]
        self.metrics.prompt_tokens.labels(job.task.name).inc(len(job.prompt))
        self.metrics.answer_tokens.labels(job.task.name).inc(len(tokens))
        job.tell(Done(answer, len(tokens), not job.task.choices and len(tokens) >= job.limit))
