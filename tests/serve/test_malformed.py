"""Whatever is sent, the server answers with an error that a client understands, and goes on."""

import json
import os
import random
import socket

import httpx2 as httpx
import pytest

# The issue asks for 10,000: DGEMMA_MALFORMED=10000 pytest tests/serve/test_malformed.py
COUNT = int(os.environ.get("DGEMMA_MALFORMED", "400"))
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
         "/tokenize", "/detokenize")
GOOD = {"model": "sudoku", "messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello", "input": "Hello",
        "max_tokens": 5, "tokens": [1], "max_denoising_steps": 1, "max_output_tokens": 5}
FIELDS = (*GOOD, "tools", "tool_choice", "stop", "seed", "n", "temperature", "top_p", "top_k", "logprobs", "system",
          "top_logprobs", "logit_bias", "response_format", "stream", "stream_options", "thinking", "reasoning", "text",
          "guided_json", "guided_regex", "structured_outputs", "chat_template_kwargs", "user", "metadata", "echo")
ODD = (
    None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "\ud800", "\0", "<|turn>", "[" * 200, "(a*)*b",
    "(", [], {}, [[]], [None], [1, "a"], {"type": "function"}, {"": ""}, {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {}}, {"type": "object", "$ref": "#"}, [{"role": "user"}],
    [{"role": "tool", "content": "x", "tool_call_id": []}],
    [{"role": "assistant", "tool_calls": [{"id": {}, "function": {"name": "f", "arguments": "["}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": {}}]}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "\ud800"}}}])


def odd(chance):
    """A value of any kind, at times nested."""
    value = chance.choice(ODD)
    while chance.random() < 0.2:
        value = chance.choice(([value], {"type": value}, {"x": value}, [value, value],
                               {"role": "user", "content": value}))
    return value


def malformed(chance):
    """A body: a good one with odd fields, or no JSON at all."""
    kind = chance.random()
    if kind < 0.1:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
    body = json.dumps({**GOOD, **{chance.choice(FIELDS): odd(chance) for _ in range(chance.randint(1, 3))}}).encode()
    if kind < 0.2:
        return body[:chance.randrange(len(body))]
    if kind < 0.25:
        return body.replace(b"5", chance.choice((b"NaN", b"1e999", b"-Infinity", b"5" * 5000, b"\xff")))
    if kind < 0.3:
        return b"[" * 100_000 if chance.random() < 0.1 else b'{"messages":' + b"[" * 400 + b"]" * 400 + b"}"
    return body


def test_malformed_requests_leave_the_server_healthy(scripted):
    http, _ = scripted("ok")
    chance = random.Random(5)
    refused = 0
    for number in range(COUNT):
        path, body = chance.choice(PATHS), malformed(chance)
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (number, path, body, answer.text)
        if answer.status_code != 200:
            refused += 1
            error = answer.json()["error"]
            assert isinstance(error["message"], str) and error["type"], (number, path, body)
    assert refused > COUNT / 4
    assert http.get("/health").status_code == 200
    assert http.post(PATHS[0], json=GOOD).status_code == 200


def test_what_is_no_http_is_no_harm(scripted):
    http, _ = scripted("ok")
    for garbage in (b"\0" * 100, b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\xff" * 5000,
                    b"POST /v1/models HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):
        with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
            connection.sendall(garbage)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1", 404), ("POST", "/", 405),
    ("PUT", "/health", 405)])
def test_other_methods_and_paths_are_errors_of_the_same_form(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_broken_requests_do_not_reach_the_engine_of_others(url):
    """One client's mistakes between another's answers."""
    with httpx.Client(base_url=url, timeout=60) as http:
        said = {"messages": [{"role": "user", "content": "Hello"}], "seed": 4}
        first = http.post(PATHS[0], json=said).json()["choices"]
        assert http.post(PATHS[0], json={**said, "logit_bias": {"5000": 1}}).status_code == 400
        assert http.post(PATHS[0], content=b"{").status_code == 400
        assert http.post(PATHS[0], json=said).json()["choices"] == first
