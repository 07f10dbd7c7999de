"""Whose turn it is, with a model and a clock that are made up."""

import asyncio
from itertools import groupby
from types import SimpleNamespace

import pytest

from alter.answering import MAX_BATCH_TOKENS, Answer
from alter.serve import batching
from alter.serve.batching import STEPS, Batcher, Job, RoutingJob, WorkerEnded
from alter.serve.metrics import Metrics

SCORED = SimpleNamespace(name="scored", choices=["a", "b"])
WRITTEN = SimpleNamespace(name="written", choices=None)


def test_a_failing_request_for_routing_is_no_others_failure():
    # Its calls are made at once: a browser test in the same process may have left a loop of its own running here.
    loop = SimpleNamespace(call_soon_threadsafe=lambda call, *given: call(*given))
    answered = Job(SCORED, [1], limit=4, _loop=loop)
    asked = RoutingJob(SCORED, [1], limit=4, _loop=loop, given="a")

    def gates(*args):
        raise ValueError("longer than the model's table of positions")

    def answer_mixed(*args):
        return [Answer("a", None)]

    predictor = SimpleNamespace(
        max_batch_tokens=MAX_BATCH_TOKENS, step_decoder=lambda watch: None, answer_mixed=answer_mixed, gates=gates
    )
    batcher = Batcher(predictor, Metrics(), max_batch=32, max_waiting=64)
    batcher.submit([asked, answered])
    batcher._closed = True
    batcher._work()
    assert isinstance(asked._events.get_nowait(), ValueError)
    assert answered._events.get_nowait().answer.text == "a"


def test_a_worker_that_cannot_go_on_tells_all_that_wait_and_takes_no_more():
    loop = SimpleNamespace(call_soon_threadsafe=lambda call, *given: call(*given))
    jobs = [Job(SCORED, [1], limit=4, _loop=loop) for _ in range(3)]
    decoders = iter([object()])

    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    predictor = SimpleNamespace(
        max_batch_tokens=MAX_BATCH_TOKENS,
        step_decoder=lambda watch: next(decoders, None) or broken(),
        answer_mixed=broken,
    )
    batcher = Batcher(predictor, Metrics(), max_batch=2, max_waiting=64)
    batcher._decoder = None
    batcher.submit(jobs)
    batcher._work()
    assert batcher.broken
    assert all(isinstance(job._events.get_nowait(), RuntimeError) for job in jobs)
    with pytest.raises(WorkerEnded):
        batcher.submit(jobs)


@pytest.mark.parametrize("cost", [0.5, 10])
def test_an_answer_is_written_for_as_long_as_others_were_scored(monkeypatch, cost):
    clock, events, loop = [0.0], [], asyncio.new_event_loop()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0]))

    def job(task):
        return Job(task, [1, 2], limit=40, since=0.0, _loop=loop)

    class Decoder:
        def __init__(self):
            self.rows = [SimpleNamespace(key=job(WRITTEN))]

        def step(self):
            clock[0] += 1
            events.append("step")
            batcher.submit([job(SCORED)])  # there is always someone who waits
            if events.count("step") == 40:
                self.rows = []

    def answer_mixed(names, *rest):
        clock[0] += cost
        events.append("scored")
        return [Answer("a", None)] * len(names)

    predictor = SimpleNamespace(
        max_batch_tokens=MAX_BATCH_TOKENS, step_decoder=lambda watch: Decoder(), answer_mixed=answer_mixed
    )
    batcher = Batcher(predictor, Metrics(), max_batch=32, max_waiting=64)
    batcher.submit([job(SCORED)])
    batcher._closed = True  # ends once all is answered
    batcher._work()
    loop.close()
    turns = [len(list(group)) for event, group in groupby(events) if event == "step"]
    assert sum(turns) == 40
    assert set(turns) == {max(STEPS, cost)}
    assert not batcher._waiting


def test_an_input_that_does_not_fit_yet_holds_up_its_own_kind_alone():
    def job(task, tokens, limit=0):
        return Job(task, [1] * tokens, limit=limit, _loop=SimpleNamespace(call_soon_threadsafe=lambda *given: None))

    writing = job(WRITTEN, 10, 90)
    predictor = SimpleNamespace(
        max_batch_tokens=MAX_BATCH_TOKENS,
        step_decoder=lambda watch: SimpleNamespace(rows=[SimpleNamespace(key=writing)]),
    )
    batcher = Batcher(predictor, Metrics(), max_batch=8, max_waiting=64)
    small, large, behind = job(WRITTEN, 50, 50), job(WRITTEN, MAX_BATCH_TOKENS - 100, 50), job(WRITTEN, 50, 50)
    scored = [job(SCORED, 30), job(SCORED, 40)]
    batcher.submit([small, large, scored[0], behind, scored[1]])
    assert batcher._take() == [small, *scored]
    assert batcher._take() == []  # while the others are written
    batcher._decoder.rows.clear()
    assert batcher._take() == [large]
    assert batcher._take() == [behind]
