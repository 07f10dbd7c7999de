"""The server as its clients use it: OpenAI's own client, and plain HTTP."""

import gc
import http.client
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import alter
from alter.errors import AlterError
from alter.serve import guard
from alter.serve.app import Limits
from tests.runs import add_newcomer, make_run
from tests.serve.conftest import serving
from tests.test_unnamed import (
    PAIR,
    SORT,
    tested,  # noqa: F401 (what it copies)
)
from tests.test_unnamed import run as unnamed_run  # noqa: F401 (a fixture)

TEXTS = ["w5 w9", "w7", "w12 w3 w4", "w1 w2 w3 w8", "w33"]


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def said(model, task, text):
    """What the model itself answers."""
    return model.answer(task, [model.encode(text, task)])[0].text


def ask(address, method, path, body=None, headers=None):
    """One plain request; its status and what came back."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    try:
        connection.request(method, path, content, {"content-type": "application/json", **(headers or {})})
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers
    finally:
        connection.close()


def post(address, path, body, **headers):
    status, content, _ = ask(address, "POST", path, body, headers)
    return status, json.loads(content)


def samples(address, **key):
    """The values at /metrics, by name; of one with labels the last."""
    _, text, _ = ask(address, "GET", "/metrics", headers=key)
    families = text_string_to_metric_families(text.decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_openais_client_gets_what_the_model_says(predictor, alone):
    with serving(predictor) as address:
        server = client(address)
        assert [model.id for model in server.models.list()] == alone.tasks
        assert server.models.retrieve("echo").owned_by == "alter"
        whole = server.completions.create(model="echo", prompt=TEXTS)
        expected = alone.generate(TEXTS, task="echo")
        assert [choice.text for choice in whole.choices] == expected
        assert whole.model == "echo"
        assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
        assert whole.usage.prompt_tokens == sum(len(alone.encode(text, "echo")) for text in TEXTS)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

        row = {"text": "w4 w6", "label": "w2"}
        chat = server.chat.completions.create(
            model="pair", messages=[{"role": "system", "content": "w1"}, {"role": "user", "content": json.dumps(row)}]
        )
        assert chat.choices[0].message.content == alone.generate([row], task="pair")[0]
        assert chat.choices[0].message.role == "assistant"
        chosen = server.completions.create(model="sort", prompt=TEXTS[0], temperature=0.7)
        assert chosen.choices[0].text == alone.classify(TEXTS[:1], task="sort")[0]
        short = server.completions.create(model="echo", prompt=TEXTS[2], max_tokens=1)
        assert short.choices[0].text == alone.generate(TEXTS[2:3], task="echo", max_new_tokens=1)[0]


def test_streams_add_up_to_the_whole_answer(predictor, alone):
    with serving(predictor) as address:
        server = client(address)
        for task, text in (("echo", TEXTS[0]), ("sort", TEXTS[1])):
            chunks = list(server.completions.create(model=task, prompt=text, stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == said(alone, task, text)
            assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")
        messages = [{"role": "user", "content": TEXTS[2]}]
        chunks = list(
            server.chat.completions.create(
                model="echo", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == said(alone, "echo", TEXTS[2])
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.prompt_tokens == len(alone.encode(TEXTS[2], "echo"))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_mixed_company_changes_no_answer(tmp_path, words, family):
    run = make_run(tmp_path, words, family)
    alone, wanted = alter.load(run), []
    for n in range(40):
        task, text = ("echo", "sort", "pick", "pair")[n % 4], TEXTS[n % 5]
        wanted.append((task, text if task != "pair" else json.dumps({"text": text, "label": "w2"})))
    with serving(alter.load(run)) as address, ThreadPoolExecutor(16) as clients:
        server = client(address)

        def asked(given):
            return server.completions.create(model=given[0], prompt=given[1]).choices[0].text

        answers = list(clients.map(asked, wanted))
        found = samples(address)
    for (task, text_given), answer in zip(wanted, answers, strict=True):
        row = json.loads(text_given) if task == "pair" else text_given
        assert answer == said(alone, task, row)
    assert found["alter_batch_inputs_sum"] > found["alter_batch_inputs_count"]  # they shared batches,
    assert found["alter_batch_tasks_sum"] > found["alter_batch_tasks_count"]  # also with other tasks


def test_probabilities_and_routing_are_those_of_the_model(predictor, alone):
    with serving(predictor) as address:
        status, told = post(address, "/v1/classify", {"model": "sort", "input": TEXTS})
        expected = alone.classify(TEXTS, task="sort", return_probs=True)
        assert status == 200
        assert [row["label"] for row in told["data"]] == [answer.text for answer in expected]
        for row, answer in zip(told["data"], expected, strict=True):
            assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
        status, told = post(address, "/v1/routing", {"model": "echo", "input": TEXTS[0], "answer": "w3"})
        routing = alone.routing(TEXTS[:1], task="echo", answers=["w3"])[0]
        for kind, layers in routing.items():
            for layer, gates in layers.items():
                assert told[kind][layer] == pytest.approx(gates, abs=1e-5)
        told = [
            post(address, "/v1/routing", {"model": "echo", "input": TEXTS[0], "answer": " ".join(["w3"] * count)})
            for count in (3, 2000)
        ]
        assert told[0] == told[1]  # echo writes three tokens at most, and no more are read
        fields = {"text": "w1 w2", "label": "no"}
        told = [
            post(address, "/v1/routing", {"model": "pair", "input": given, "answer": "yes"})
            for given in (fields, json.dumps(fields))
        ]
        assert told[0] == told[1]  # as text too, as every endpoint takes it
        assert told[0][0] == 200
        told = [
            post(address, "/v1/completions", {"model": "pair", "prompt": given})
            for given in (fields, json.dumps(fields))
        ]
        assert told[0][1]["choices"] == told[1][1]["choices"]


def test_a_stream_of_null_is_none_and_a_path_leads_nowhere_else(predictor, alone):
    with serving(predictor) as address:
        whole = client(address).completions.create(model="echo", prompt=TEXTS[0], stream=None)
        assert whole.choices[0].text == alone.generate(TEXTS[:1], task="echo")[0]
        for method, path in (("POST", "/v1/completions/"), ("GET", "/health/")):
            assert ask(address, method, path, {})[0] == 404  # not to another host, as a proxy may name this one


def test_a_body_that_is_cut_off_is_not_answered(predictor):
    with serving(predictor) as address:
        place = urlsplit(address)
        body = json.dumps({"model": "echo", "prompt": TEXTS[0]}).encode()
        with socket.create_connection((place.hostname, place.port), timeout=20) as gone:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body) + 9}\r\n\r\n"
            gone.sendall(head.encode() + body)

        def statuses():
            families = text_string_to_metric_families(ask(address, "GET", "/metrics")[1].decode())
            labels = [sample.labels for family in families for sample in family.samples if "status" in sample.labels]
            return {own["status"] for own in labels if own["endpoint"] == "/v1/completions"}

        until(statuses)
        assert statuses() == {"499"}


def test_keys_are_compared_in_constant_time(predictor, monkeypatch):
    compared = []

    def digest(given, expected):
        compared.append((given, expected))
        return given == b"Bearer kex"  # what this says counts, and nothing else

    monkeypatch.setattr(guard.hmac, "compare_digest", digest)
    with serving(predictor, api_key="key") as address:
        assert ask(address, "GET", "/v1/models", headers={"authorization": "Bearer key"})[0] == 401
        assert ask(address, "GET", "/v1/models", headers={"authorization": "Bearer kex"})[0] == 200
    assert compared == [(b"Bearer key", b"Bearer key"), (b"Bearer kex", b"Bearer key")]


def test_the_model_auto_guesses_each_inputs_task_or_says_that_it_is_not_clear(unnamed_run):  # noqa: F811
    with serving(alter.load(unnamed_run)) as address:
        server = client(address)
        assert "auto" in [model.id for model in server.models.list()]
        assert server.completions.create(model="auto", prompt=SORT).model == "sort"
        both = server.completions.create(model="auto", prompt=[SORT, json.dumps({"text": PAIR, "note": "w3"})])
        assert both.model == "auto"
        with pytest.raises(openai.UnprocessableEntityError, match="is not clear") as refused:
            server.completions.create(model="auto", prompt="w450 w470 w480 w490")
        assert refused.value.code == "low_confidence"
        status, told = post(address, "/v1/routing", {"model": "auto", "input": SORT})
        assert (status, told["model"]) == (200, "sort")
        half = {"model": "auto", "messages": [{"role": "user", "content": f"{SORT} \ud83d"}]}  # an emoji cut in two
        assert post(address, "/v1/chat/completions", half)[0] in (200, 422)
        assert server.models.retrieve("auto").id == "auto"
        with pytest.raises(openai.NotFoundError, match="or auto"):
            server.models.retrieve("none")
        status, told = post(address, "/v1/classify", {"model": "auto", "input": [SORT]})
        assert (status, told["data"][0]["model"]) == (200, "sort")


def test_mistakes_are_told_as_openai_tells_them(predictor):
    with serving(predictor, Limits(max_bytes=2000, max_waiting=4)) as address:
        server = client(address)
        with pytest.raises(openai.NotFoundError, match=r"one of sort, pick, echo, pair\. Did you mean 'sort'\?"):
            server.completions.create(model="sorte", prompt="w1")
        with pytest.raises(openai.BadRequestError, match="'n' is not supported") as refused:
            server.completions.create(model="echo", prompt="w1", n=2)
        assert refused.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="must be the user's"):
            server.chat.completions.create(model="echo", messages=[{"role": "assistant", "content": "w1"}])
        with pytest.raises(openai.BadRequestError, match="send them as an object in JSON"):
            server.completions.create(model="pair", prompt="w1")
        with pytest.raises(openai.BadRequestError, match="Give 1 to 4 inputs"):
            server.completions.create(model="echo", prompt=["w1"] * 5)
        for path, body, status, words in [
            ("/v1/classify", {"model": "echo", "input": "w1"}, 400, "has no choices"),
            ("/v1/classify", {"model": "sort"}, 400, "input"),
            ("/v1/completions", b"{not json", 400, "JSON"),
            (
                "/v1/completions",
                b"",
                400,
                "The body has to be an object in JSON, sent with 'Content-Type: application/json'.",
            ),
            ("/v1/completions", [1], 400, "The body has to be an object in JSON"),
            ("/v1/completions", {"model": "echo", "prompt": [1, 2]}, 400, "prompt: Input should be a valid string."),
            ("/v1/completions", {"model": "echo", "prompt": None}, 400, "prompt: Input should be a valid string."),
            ("/v1/completions", {"model": "echo", "prompt": []}, 400, "Give 1 to 4 inputs"),
            (
                "/v1/completions",
                {"model": "echo", "prompt": {"\ud800": "x"}},
                400,
                "not a field of the row; its fields are ?.",
            ),
            (
                "/v1/chat/completions",
                {"model": "echo", "messages": [{"role": "\ud800", "content": "w1"}]},
                400,
                "of role '?'",
            ),
            ("/v1/completions", b"[" * 1500, 400, ""),
            ("/v1/completions", {"model": "echo", "prompt": "w1 " * 900}, 413, "larger than 2000 bytes"),
            ("/v1/elsewhere", {}, 404, "Not Found"),
        ]:
            found, told = post(address, path, body)
            assert found == status, (path, told)
            assert words in told["error"]["message"]
            assert told["error"].keys() == {"message", "type", "param", "code"}
        form = ask(
            address, "POST", "/v1/completions", {"model": "echo", "prompt": "w1"}, {"content-type": "text/plain"}
        )
        assert form[0] == 400
        assert b"Content-Type: application/json" in form[1]
        for stop in ("\n", ["\n", "\n\n"]):  # answers end there in any case
            found = server.completions.create(model="echo", prompt="w1", stop=stop).choices[0].text
            assert found == server.completions.create(model="echo", prompt="w1").choices[0].text
        for stop in (".", ["\n", "."]):
            with pytest.raises(openai.BadRequestError, match="'stop' is not supported"):
                server.completions.create(model="echo", prompt="w1", stop=stop)
        for method, path, allowed in (("GET", "/v1/completions", {"POST"}), ("POST", "/v1/models", {"GET", "HEAD"})):
            status, _, headers = ask(address, method, path, {} if method == "POST" else None)
            assert (status, set(headers["allow"].split(", "))) == (405, allowed)
        assert ask(address, "GET", "/v1/models", headers={"host": "elsewhere.example"})[0] == 400
        assert server.completions.create(model="echo", prompt="w1").choices


def test_a_key_is_asked_for_where_there_is_one(predictor):
    with serving(predictor, api_key="right") as address:
        assert client(address, "right").models.list().data
        for key in ("wrong", "right2", "rig"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client(address, key).models.list()
        assert ask(address, "GET", "/metrics")[0] == 401
        assert [ask(address, "HEAD", path)[:2] for path in ("/health", "/", "/metrics")] == [
            (200, b""),
            (200, b""),
            (401, b""),
        ]
        status, _, headers = ask(address, "GET", "/health")
        assert (status, headers["x-content-type-options"]) == (200, "nosniff")


@pytest.fixture
def held(predictor, monkeypatch):
    """A predictor that answers when it is let."""
    go, answer = threading.Event(), predictor.answer_mixed

    def waits(*args, **kwargs):
        go.wait(20)
        return answer(*args, **kwargs)

    monkeypatch.setattr(predictor, "answer_mixed", waits)
    yield predictor, go
    go.set()


def test_a_full_queue_is_429_and_too_long_is_504(held, caplog):
    predictor, go = held
    with serving(predictor, Limits(max_waiting=2, max_batch=1, timeout=10)) as address, ThreadPoolExecutor(8) as pool:
        body = {"model": "sort", "input": "w1"}
        waiting = [pool.submit(post, address, "/v1/classify", body)]
        until(lambda: waits(address) == 0 and in_flight(address) >= 1)
        time.sleep(0.5)  # the one is being answered
        waiting += [pool.submit(post, address, "/v1/classify", body) for _ in range(2)]
        until(lambda: waits(address) == 2)
        status, told = post(address, "/v1/classify", body)
        assert (status, told["error"]["type"]) == (429, "rate_limit_error")
        assert [answer.result()[0] for answer in waiting] == [504] * 3
        go.set()
        until(lambda: post(address, "/v1/classify", body)[0] == 200)  # what nobody waits for is not in the way
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_what_does_not_arrive_in_time_is_408_and_a_body_of_unknown_size_is_counted(predictor):
    with serving(predictor, Limits(timeout=1, max_bytes=2000)) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n{")
            reply = slow.makefile("rb").readline()
        assert reply.split()[1] == b"408"
        with socket.create_connection((place.hostname, place.port), timeout=20) as endless:
            endless.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n")
            endless.sendall(b"3e8\r\n" + b"w" * 1000 + b"\r\n")
            endless.sendall(b"3e9\r\n" + b"w" * 1001 + b"\r\n")  # its end does not come
            reply = endless.makefile("rb").readline()
        assert reply.split()[1] == b"413"
        assert ask(address, "GET", "/health")[0] == 200


def test_a_stream_that_takes_too_long_ends_with_the_error(held):
    predictor, go = held
    with serving(predictor, Limits(timeout=1)) as address:
        with pytest.raises(openai.APIError, match="no answer within 1 seconds"):
            list(client(address).completions.create(model="sort", prompt="w1", stream=True))
        go.set()


def waits(address):
    return samples(address)["alter_inputs_waiting"]


def in_flight(address):
    return samples(address)["alter_requests_in_flight"] - 1  # the question itself


def until(holds):
    for _ in range(80):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to that")


def test_a_batch_that_fails_is_500_and_the_next_is_answered(predictor, monkeypatch):
    answer, failed = predictor.answer_mixed, []

    def fails_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("w1 is what somebody wrote")
        return answer(*args, **kwargs)

    monkeypatch.setattr(predictor, "answer_mixed", fails_once)
    with serving(predictor) as address:
        status, told = post(address, "/v1/classify", {"model": "sort", "input": "w1"})
        assert (status, told["error"]["type"]) == (500, "server_error")
        assert "somebody" not in told["error"]["message"]
        assert post(address, "/v1/classify", {"model": "sort", "input": "w1"})[0] == 200


def test_a_model_that_cannot_go_on_is_told_as_unhealthy(predictor, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error")

    with serving(predictor) as address:
        assert ask(address, "GET", "/health")[0] == 200
        monkeypatch.setattr(predictor, "answer_mixed", broken)
        monkeypatch.setattr(predictor, "step_decoder", broken)
        assert post(address, "/v1/classify", {"model": "sort", "input": "w1"})[0] == 500
        while ask(address, "GET", "/health")[0] == 200:
            time.sleep(0.01)
        assert ask(address, "GET", "/health")[0] == 503
        assert post(address, "/v1/classify", {"model": "sort", "input": "w1"})[0] == 503


def test_an_error_of_our_own_is_counted_and_answered_as_500(predictor, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(predictor, "encode", lambda *args: 1 / 0)
    with serving(predictor) as address:
        status, _, headers = ask(address, "POST", "/v1/classify", {"model": "sort", "input": "w1"})
        assert status == 500
        assert headers["cache-control"] == "no-store"
        assert b'status="500"' in ask(address, "GET", "/metrics")[1]
    assert any(record.getMessage().startswith("POST /v1/classify 500 ") for record in caplog.records)


def test_nothing_that_a_client_wrote_is_logged_and_every_request_is(predictor, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(predictor) as address:
        post(address, "/v1/completions", {"model": "echo", "prompt": "w77 w78"})
        post(address, "/v1/secret-w79", {"model": "w80"})
        ask(address, "GET", "/v1/models/w81?key=w82")
    ours = [record for record in caplog.records if record.name.startswith(("alter", "uvicorn"))]
    assert not any(
        word in record.getMessage() for record in ours for word in ("w77", "w78", "w79", "w80", "w81", "w82")
    )
    assert any(record.getMessage().startswith("POST /v1/completions 200 ") for record in ours)


def test_metrics_count_requests_tokens_and_batches(predictor, alone):
    with serving(predictor) as address:
        used = client(address).completions.create(model="echo", prompt=TEXTS).usage
        post(address, "/v1/classify", {"model": "none", "input": "w1"})
        ask(address, "GET", "/v1/models/echo")
        _, text, _ = ask(address, "GET", "/metrics")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert found["alter_requests_total", "/v1/completions", "200"] == 1
    assert found["alter_requests_total", "/v1/classify", "404"] == 1
    assert found["alter_requests_total", "/v1/models/{name}", "200"] == 1
    assert found["alter_prompt_tokens_total", "echo"] == used.prompt_tokens
    assert found["alter_answer_tokens_total", "echo"] == used.completion_tokens
    assert found["process_resident_memory_bytes",] > 1e7


def test_limits_that_make_no_sense_are_told():
    with pytest.raises(AlterError, match="--queue: 0 is not a number above 0") as refused:
        Limits(max_waiting=0, timeout=float("inf"))
    assert len(refused.value.messages) == 2


def test_a_task_that_joined_later_is_served_beside_the_others(run):
    add_newcomer(run)
    again = alter.load(run)
    with serving(alter.load(run)) as address, ThreadPoolExecutor(8) as pool:
        server = client(address)
        wanted = [(("new", "echo")[n % 2], TEXTS[n % 5]) for n in range(16)]
        answers = pool.map(
            lambda given: server.completions.create(model=given[0], prompt=given[1]).choices[0].text, wanted
        )
        for (task, text), answer in zip(wanted, answers, strict=True):
            assert answer == again.generate([text], task=task)[0]
