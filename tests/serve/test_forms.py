"""Working out a form takes time: the request's own, and nobody else's."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from dgemma.engine.service import FORM_THREADS
from dgemma.serve.settings import Settings

CHAT = "/v1/chat/completions"
TEXT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


def formed(number, **more):
    schema = {"type": "object", "properties": {f"a{number}": {"type": "integer"}}}
    return {**TEXT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, **more}


@pytest.fixture
def slow_forms(monkeypatch):
    """Forms that are not made before the test says so."""
    from dgemma import constrain

    ready, real = threading.Event(), constrain.constraint_of

    def constraint_of(*args, **options):
        ready.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(constrain, "constraint_of", constraint_of)
    yield ready
    ready.set()


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, formed(1)), (CHAT, formed(2, stream=True)),
    (CHAT, {**TEXT, "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/v1/messages", {**TEXT, "model": "sudoku", "tools": [{"name": "f", "input_schema": {"type": "object"}}],
                      "tool_choice": {"type": "any"}}),
    ("/v1/responses", {"model": "sudoku", "input": "Hi", "text": {"format": {"type": "json_object"}}}),
    ("/api/chat", {"model": "sudoku", "messages": TEXT["messages"], "format": "json"}),
])
def test_a_form_that_takes_too_long_ends_with_the_timeouts_error(scripted, slow_forms, path, body):
    http, service = scripted(settings=Settings(("sudoku",), timeout=0.4))
    began = time.monotonic()
    answer = http.post(path, json=body)
    assert answer.status_code == 504 and "took longer" in answer.text
    assert time.monotonic() - began < 5 and not service.requests


def test_what_a_form_has_taken_is_missing_for_the_answer(scripted, slow_forms):
    http, service = scripted(["Hel", "lo"], settings=Settings(("sudoku",), timeout=1.5), seconds=0.5)
    threading.Timer(1.2, slow_forms.set).start()
    assert http.post(CHAT, json=formed(3)).status_code == 504
    assert http.post(CHAT, json=formed(3)).status_code == 200


def test_many_slow_forms_do_not_hold_up_those_who_ask_for_none(scripted, slow_forms):
    http, service = scripted("Hello")
    url = str(http.base_url)
    with ThreadPoolExecutor(50) as pool:
        waiting = [pool.submit(httpx.post, url + CHAT, json=formed(number), timeout=30) for number in range(50)]
        try:
            time.sleep(0.5)
            for path, body in ((CHAT, TEXT), ("/tokenize", {"prompt": "Hi"}), (CHAT, {
                    **TEXT, "tools": [{"type": "function", "function": {"name": "f"}}]})):
                began = time.monotonic()
                assert httpx.post(url + path, json=body, timeout=10).status_code == 200, path
                assert time.monotonic() - began < 3
            assert not any(one.done() for one in waiting)
            busy = [thread for thread in threading.enumerate() if thread.name.startswith("dgemma-forms")]
            assert len(busy) <= FORM_THREADS
        finally:
            slow_forms.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_a_stream_has_the_requests_time_once(scripted):
    """Not once till it begins and once more for what it says."""
    http, _ = scripted(["begun", "too late"], settings=Settings(("sudoku",), timeout=1.0), seconds=0.4, admission=0.4)
    said = http.post("/v1/messages", json={**TEXT, "model": "sudoku", "stream": True}).text
    assert "begun" in said and "too late" not in said and "event: error" in said
