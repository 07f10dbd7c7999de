"""`alter serve` as it is started and stopped, and its page in a browser."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import alter
from alter.cli import main
from alter.errors import AlterError
from alter.serve.main import KEPT_SHAPES, WithoutMessages, bind, is_loopback, read_key
from tests.serve.conftest import serving
from tests.serve.test_app import ask, post, samples
from tests.test_cli import refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(run):
    """The command in a process of its own; its process and address."""
    server = subprocess.Popen(
        [sys.executable, "-m", "alter", "serve", "--run", str(run), "--port", "0", "--timeout", "20"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "ALTER_API_KEY": "key"},
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert "4 tasks" in line, server.stderr.read()
        yield server, re.search(r"http://\S+", line)[0]
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_at_sigterm_what_was_asked_is_answered_and_nothing_more_is_taken(started, run):
    server, address = started
    assert address.startswith("http://127.0.0.1:")  # unless told otherwise
    answers, key = [], {"authorization": "Bearer key"}
    body = {"model": "echo", "prompt": ["w1 w2 w3"] * 100}
    assert ask(address, "GET", "/v1/models")[0] == 401
    clients = [threading.Thread(target=lambda: answers.append(post(address, "/v1/completions", body, **key)))]
    for client in clients:
        client.start()
    while not samples(address, **key).get("alter_batch_inputs_count"):  # until they are being answered
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    assert not answers
    for client in clients:
        client.join(20)
    assert server.wait(20) == 0
    expected = alter.load(run).generate(["w1 w2 w3"], task="echo")[0]
    ((status, told),) = answers
    assert status == 200
    assert [choice["text"] for choice in told["choices"]] == [expected] * 100
    with pytest.raises(OSError, match="refused"):
        ask(address, "GET", "/health")
    log = server.stderr.read()
    assert "POST /v1/completions 200" in log
    assert "w1" not in log


@pytest.mark.parametrize("own", [None, "7"])
def test_onednn_is_told_to_keep_few_shapes_before_anything_is_multiplied(own, monkeypatch):
    variable, found = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", []
    monkeypatch.setenv(variable, own or "")  # and put back afterwards
    if not own:
        monkeypatch.delenv(variable)

    def load(*args):
        found.append(os.environ[variable])
        raise AlterError("far enough")

    monkeypatch.setattr("alter.loading.load", load)
    with pytest.raises(SystemExit):
        main(["serve", "--run", "run", "--port", "0"])
    assert found == [own or KEPT_SHAPES]


def test_what_is_wrong_with_its_options_is_one_sentence(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("two words\n")
    taken = bind("127.0.0.1", 0)
    port = str(taken.getsockname()[1])
    taken.listen()
    for flags, message in [
        (["--port", port], f"cannot listen at 127.0.0.1 port {port}"),
        (["--port", "99999"], "cannot listen"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--queue", "0"], "--queue: 0 is not a number above 0"),
        (["--api-key-file", str(tmp_path / "key")], "has blanks"),
        (["--api-key-file", str(tmp_path / "none")], "cannot be read"),
    ]:
        (sentence,) = refused(capsys, "serve", "--run", str(run), *flags)
        assert message in sentence
    taken.close()
    (sentence,) = refused(capsys, "serve", "--run", str(tmp_path / "no run"), "--port", "0")
    assert "no model here" in sentence or "no run here" in sentence
    monkeypatch.setenv("ALTER_API_KEY", "  ")
    with pytest.raises(AlterError, match="ALTER_API_KEY: the key is empty"):
        read_key(None)
    with pytest.raises(SystemExit):
        main(["serve"])


def test_the_log_tells_where_an_answer_failed_and_not_what_was_asked():
    asked = "of a" + " patient"  # a traceback quotes the line that raises
    try:
        raise RuntimeError(asked)
    except RuntimeError:
        record = logging.makeLogRecord({"msg": "A batch of %d failed", "args": (2,), "exc_info": sys.exc_info()})
    told = WithoutMessages("%(message)s").format(record)
    assert told.startswith("A batch of 2 failed")
    assert Path(__file__).name in told
    assert told.endswith("RuntimeError")
    assert asked not in told


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("x", False)]
)
def test_loopback_is_told_from_what_others_reach(host, local):
    assert is_loopback(host) == local


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_answers_shows_probabilities_and_who_answered(browser, predictor, alone, width):
    with serving(predictor, api_key="key") as address:
        page = browser.new_page(viewport={"width": width, "height": 900})
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda told: errors.append(told.text) if told.type == "error" and "401" not in told.text else None,
        )
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_label("API key").fill("key")  # asked for, since the server wants one
        page.get_by_role("button", name="Answer").click()
        page.locator("#task option").nth(3).wait_for(state="attached")
        assert page.locator("#task option").count() == 4

        page.select_option("#task", "sort")
        page.locator("#fields textarea").fill("w5 w9")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#who svg")
        answer = alone.classify("w5 w9", task="sort", return_probs=True)[0]
        assert page.inner_text("#answer") == answer.text
        label = page.get_attribute("#bars svg", "aria-label")
        for name, share in answer.probabilities.items():
            assert f"{name} {100 * share:.1f}%" in label
        routing = alone.routing("w5 w9", task="sort", answers=[answer.text])[0]
        cells = [
            (name, gate) for layers in routing.values() for gates in layers.values() for name, gate in gates.items()
        ]
        squares = page.locator("#who svg .cell").all()
        for square, (name, gate) in zip(squares, cells, strict=True):
            assert float(square.get_attribute("fill-opacity")) == pytest.approx(gate, abs=1e-4)
            assert f"{name}: " in square.text_content()

        page.select_option("#task", "pair")
        boxes = page.locator("#fields textarea")
        assert boxes.count() == 2
        by_name = {"text": "w4 w6", "label": "w2"}
        for name, text in by_name.items():
            page.locator(f"#fields textarea[name={name}]").fill(text)
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#who svg")
        assert page.inner_text("#answer") == alone.generate([by_name], task="pair")[0]
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        assert not errors
        assert all(url.startswith(address) for url in asked)  # it loads nothing from elsewhere
        page.close()


@pytest.mark.slow
def test_what_is_stopped_or_left_for_another_task_brings_no_answer(browser, predictor):
    from playwright.sync_api import Error

    with serving(predictor) as address:
        page = browser.new_page()
        held = []
        page.route("**/v1/classify", lambda route: held.append(route))
        page.goto(address)
        page.locator("#task option").nth(3).wait_for(state="attached")
        page.select_option("#task", "sort")
        page.locator("#fields textarea").fill("w5 w9")
        page.get_by_role("button", name="Answer").click()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_function("document.getElementById('took').textContent === 'Stopped.'")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_function("!document.getElementById('stop').disabled")
        page.select_option("#task", "pair")
        while len(held) < 2:  # the browser hands them over in its own time
            page.wait_for_timeout(20)
        assert len(held) == 2
        for late in held:
            with suppress(Error):  # the page has given it up
                late.fulfill(json={"data": [{"label": "yes", "probabilities": {"yes": 0.9, "no": 0.1}}]})
        page.wait_for_timeout(300)
        assert [page.inner_text(f"#{name}") for name in ("answer", "took")] == ["", ""]
        assert page.is_disabled("#stop")
        assert not page.is_visible("#likely")
        page.close()


@pytest.mark.slow
def test_a_list_of_tasks_that_comes_late_clears_no_answer(browser, predictor):
    from playwright.sync_api import Error

    with serving(predictor, api_key="key") as address:
        page = browser.new_page()
        held = []

        def hold_the_first(route):
            if "authorization" in route.request.headers and not held:
                held.append(route)
            else:
                route.continue_()

        page.route("**/v1/models", hold_the_first)
        page.goto(address)
        page.get_by_label("API key").fill("key")
        page.get_by_role("button", name="Answer").click()  # leaves the key's field too, which asks as well
        page.locator("#task option").nth(3).wait_for(state="attached")
        page.select_option("#task", "sort")
        page.locator("#fields textarea").fill("w5 w9")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#who svg")
        answer = page.inner_text("#answer")
        assert answer
        (late,) = held
        with suppress(Error):  # the page has given it up
            late.continue_()
        page.wait_for_timeout(300)
        assert page.inner_text("#answer") == answer
        assert page.input_value("#fields textarea") == "w5 w9"
        page.close()


def test_the_page_names_no_other_address():
    html = (ROOT / "alter" / "serve" / "page.html").read_text()
    assert re.findall(r"https?:[^\"']*", html) == ["http://www.w3.org/2000/svg"]  # SVG's namespace, which is no address


@pytest.mark.slow
def test_the_page_tells_what_goes_wrong_until_something_goes_right(browser, predictor):
    with serving(predictor, api_key="key") as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("API key").fill("another")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#error", state="visible")
        assert page.inner_text("#error") == json.loads(ask(address, "GET", "/v1/models")[1])["error"]["message"]
        page.get_by_label("API key").fill("key")
        page.get_by_role("button", name="Answer").click()
        page.locator("#task option").nth(3).wait_for(state="attached")
        page.wait_for_selector("#error", state="hidden")

        page.select_option("#task", "sort")
        page.locator("#fields textarea").fill("w5 w9")
        broken = {"error": {"message": "It is broken."}}
        page.route("**/v1/classify", lambda route: route.fulfill(status=500, json=broken))
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#error", state="visible")
        assert page.inner_text("#error") == "It is broken."
        page.unroute("**/v1/classify")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#who svg")
        assert not page.is_visible("#error")
        page.close()
