"""Keys, origins, rates, sizes, times; and what the server tells of itself."""

import json
import logging
import re
import socket
import threading
import time

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dgemma.errors import DgemmaError
from dgemma.serve.auth import RateLimit
from dgemma.serve.server import check_exposure
from dgemma.serve.settings import Settings
from support.scripted_service import eventually

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"


def settings(**changes):
    return Settings(("sudoku",), **changes)


def metrics(http):
    """The samples of /metrics by name and labels."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for family in families
            for sample in family.samples}


# Who may come in


def test_without_the_key_nothing_but_health_and_documentation_answers(scripted):
    http, service = scripted(settings=settings(api_keys=("secret", "other")))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"x-api-key": "secret "[:-2]}):
        answer = http.post(PATH, json=CHAT, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/metrics", headers=headers).status_code == 401
    assert service.requests == []
    for path in ("/health", "/docs", "/openapi.json"):
        assert http.get(path).status_code == 200
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "other"}, {"Authorization": "bearer other"}):
        assert http.post(PATH, json=CHAT, headers=headers).status_code == 200


def test_errors_under_messages_have_anthropics_form(scripted):
    http, _ = scripted(settings=settings(api_keys=("secret",)))
    body = http.post("/v1/messages", json={}).json()
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")


def test_only_allowed_origins_may_call_from_a_browser(scripted):
    http, service = scripted(settings=settings(allowed_origins=("https://good.example",)))
    port = http.base_url.port
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"http://evil.example:{port}"):
        assert http.post(PATH, json=CHAT, headers={"Origin": origin}).status_code == 403
    rebound = {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"}
    assert http.post(PATH, json=CHAT, headers=rebound).status_code == 403
    assert service.requests == []

    allowed = http.post(PATH, json=CHAT, headers={"Origin": "https://good.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"
    own = http.post(PATH, json=CHAT, headers={"Origin": f"http://127.0.0.1:{port}"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    asked = http.options(PATH, headers={"Origin": "https://good.example", "Access-Control-Request-Method": "POST",
                                        "Access-Control-Request-Headers": "authorization"})
    assert asked.status_code == 200 and "authorization" in asked.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize(("name", "status"), [
    ("localhost", 200), ("LOCALHOST:1234", 200), ("127.0.0.1:99", 200), ("[::1]:8000", 200), ("192.168.1.5", 200),
    ("host.docker.internal:8000", 200), ("good.example", 200), ("Good.Example.:80", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
    ("xlocalhost", 403), ("[", 403), ("good.example@evil.example", 403)])
def test_without_a_key_only_names_that_no_stranger_can_point_here_are_answered(scripted, name, status):
    http, service = scripted(settings=settings(allowed_hosts=("good.example",)))
    for path in ("/v1/models", "/metrics", "/health"):
        assert http.get(path, headers={"Host": name}).status_code == status
    answer = http.post(PATH, json=CHAT, headers={"Host": name})
    assert answer.status_code == status and len(service.requests) == (status == 200)
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in answer.json()["error"]["message"]


def test_a_key_or_the_operators_word_lets_any_name_in(scripted):
    keyed, _ = scripted(settings=settings(api_keys=("k",)))
    assert keyed.get("/v1/models", headers={"Host": "proxy.example", "Authorization": "Bearer k"}).status_code == 200
    open_, _ = scripted(settings=settings(allowed_hosts=("*",)))
    assert open_.get("/v1/models", headers={"Host": "proxy.example"}).status_code == 200


def test_the_network_may_not_use_a_server_without_a_key_unless_that_is_wanted():
    check_exposure("127.0.0.1", settings(), insecure=False)
    check_exposure("localhost", settings(), insecure=False)
    check_exposure("::1", settings(), insecure=False)
    check_exposure("0.0.0.0", settings(api_keys=("k",)), insecure=False)
    check_exposure("0.0.0.0", settings(), insecure=True)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        with pytest.raises(DgemmaError, match="--api-key"):
            check_exposure(host, settings(), insecure=False)


# How much, how often, how long


def test_a_body_that_is_too_large_is_refused_before_it_is_read(scripted):
    http, _ = scripted(settings=settings(max_body_bytes=1000))
    assert http.post(PATH, json=CHAT).status_code == 200
    large = {"messages": [{"role": "user", "content": "x" * 1000}]}
    assert http.post(PATH, json=large).status_code == 413

    def chunks():
        for _ in range(20):
            yield b"x" * 100

    assert http.post(PATH, content=chunks()).status_code == 413  # without announcing its length


@pytest.mark.parametrize(("path", "start", "item", "end"), [
    ("/v1/completions", '{"prompt":[', "{}", "]}"), ("/v1/chat/completions", '{"messages":[', "0", "]}"),
    ("/v1/responses", '{"model":"sudoku","input":[', "0", "]}"), ("/detokenize", '{"tokens":[', '""', "]}"),
    ("/v1/messages", '{"model":"sudoku","max_tokens":9,"messages":[', "0", "]}"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":"x"}],"tools":[', "0", "]}"),
    ("/v1/chat/completions", '{"messages":[', '{"role":"user","content":""}', "]}"),
])
def test_a_body_full_of_mistakes_takes_no_longer_than_one(scripted, path, start, item, end):
    http, _ = scripted()
    began = time.monotonic()
    answer = http.post(path, content=start + ",".join([item] * 200_000) + end,
                       headers={"Content-Type": "application/json"})
    # It was up to 8 seconds and a gigabyte.
    assert answer.status_code == 400 and time.monotonic() - began < 4.0


def test_an_error_does_not_repeat_a_long_mistake(scripted):
    http, _ = scripted()
    for body in ({**CHAT, "model": "z" * 100_000}, {"messages": [{"role": "z" * 100_000, "content": "x"}]},
                 {**CHAT, "logit_bias": {"z" * 100_000: 1}}):
        assert len(http.post(PATH, json=body).content) < 3000
    assert len(http.post("/v1/messages", json={"model": "sudoku", "max_tokens": 9, "messages": [
        {"role": "z" * 100_000}]}).content) < 3000


def test_a_users_name_is_kept_no_longer_than_needed(scripted):
    http, service = scripted()
    http.post(PATH, json={**CHAT, "user": "z" * 100_000})
    assert len(service.requests[0].client) < 300


def test_a_body_that_does_not_come_ends_the_wait(scripted):
    http, _ = scripted(settings=settings(body_timeout=0.2))
    with socket.create_connection((http.base_url.host, http.base_url.port)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(5)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_rates_are_kept_by_client():
    rates = RateLimit(per_minute=2, clients=2)
    assert [rates.wait("a", now=0.0) for _ in range(3)] == [0, 0, 30]
    assert rates.wait("b", now=0.0) == 0
    assert rates.wait("a", now=29.0) == pytest.approx(1)
    assert rates.wait("a", now=30.0) == 0 and rates.wait("a", now=30.0) > 0
    rates.wait("c", now=30.0)
    assert len(rates._buckets) == 2


def test_too_many_requests_of_one_client_are_told_when_to_come_back(scripted):
    http, _ = scripted(settings=settings(rate_limit=2))
    answers = [http.post(PATH, json=CHAT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 0 < int(answers[2].headers["retry-after"]) <= 30
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(scripted, stream):
    http, service = scripted(["Hel", "lo"], settings=settings(timeout=1.0), seconds=0.7)
    answer = http.post(PATH, json={**CHAT, "stream": stream})
    if stream:
        assert answer.status_code == 200 and '"code":"timeout"' in answer.text and "Hel" in answer.text
    else:
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert eventually(lambda: service.closed == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request(scripted, stream):
    http, service = scripted(["Hel", "lo"], seconds=5)
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATH, json={**CHAT, "stream": stream}, timeout=0.3)
    assert eventually(lambda: service.closed == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_engine(live, stream):
    url, service = live
    before = service.stats()
    endless = {**CHAT, "stream": stream, "max_tokens": 8000, "confidence_threshold": 1e-6, "t_max": 100, "n": 3,
               "logit_bias": {"1": -100, "50": -100, "106": -100}}  # no token that would end it
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + PATH, json=endless, timeout=0.5)
    assert eventually(lambda: service.stats().running == service.stats().waiting == 0)
    assert service.stats().cancelled == before.cancelled + 3


def test_a_client_that_does_not_read_is_given_up(scripted):
    http, service = scripted(["x" * 4000] * 500, settings=settings(timeout=0.5))
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((http.base_url.host, http.base_url.port))
        body = b'{"messages":[{"role":"user","content":"x"}],"stream":true}'
        deaf.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert eventually(lambda: service.closed == 1)


def test_a_silent_stream_shows_that_it_is_alive(scripted):
    http, _ = scripted(["Hel", "lo"], settings=settings(ping=0.05), seconds=0.2)
    text = http.post(PATH, json={**CHAT, "stream": True}).text
    assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")


# What the server tells


def test_health_tells_whether_the_engine_lives(scripted):
    http, service = scripted()
    assert http.get("/health").json()["status"] == "ok"
    service.healthy = False
    assert http.get("/health").status_code == 503


def test_metrics_count_what_was_done(http):
    before = metrics(http)
    answer = http.post(PATH, json=CHAT).json()
    http_requests = ("dgemma_http_requests_total", PATH, "200", "POST")
    assert eventually(lambda: metrics(http).get(http_requests, 0) == before.get(http_requests, 0) + 1)
    after = metrics(http)

    def grown(*name):
        return after[name] - before.get(name, 0)

    assert grown("dgemma_requests_finished_total") == 1
    assert grown("dgemma_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("dgemma_answer_tokens_total") == answer["usage"]["completion_tokens"]
    assert grown("dgemma_steps_total") == answer["usage"]["denoising_steps"]
    for name in ("queue_seconds", "time_to_first_token_seconds", "canvas_seconds", "step_seconds", "request_seconds",
                 "tokens_per_forward"):
        assert grown(f"dgemma_{name}_count") == 1
    assert after[("dgemma_requests_running",)] == after[("dgemma_requests_waiting",)] == 0


def test_metrics_count_tool_calls_and_those_that_were_mended(scripted):
    http, _ = scripted('<|tool_call>call:f{a:1}<tool_call|><|tool_call>{"name": "f", "arguments": {}}<tool_call|>')
    http.post(PATH, json={**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert eventually(lambda: metrics(http).get(("dgemma_tool_calls_total", "true")) == 1)
    assert metrics(http)[("dgemma_tool_calls_total", "false")] == 1


def test_paths_that_do_not_exist_are_one_in_the_metrics(scripted):
    http, _ = scripted()
    for path in ("/a", "/b", "/v1/models/../x"):
        answer = http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert eventually(lambda: metrics(http).get(("dgemma_http_requests_total", "404", "GET", "other")) == 3)


def test_every_request_has_a_line_in_the_log(scripted, caplog):
    caplog.set_level(logging.INFO, "dgemma.serve")
    http, service = scripted("Hello")
    http.post(PATH + "?x=%0Ay", json=CHAT)
    http.get("/nothing")
    assert eventually(lambda: len(caplog.records) == 2)
    lines = [record.getMessage() for record in caplog.records]
    prompt = len(service.requests[0].prompt_ids)
    assert re.fullmatch(rf"POST {PATH} 200 \d+ ms {prompt}\+5 tokens, first canvas \d+ ms, 3 steps, \d+ tokens/s",
                        lines[0])
    assert re.fullmatch(r"GET /nothing 404 \d+ ms '.+'", lines[1])


def test_the_log_tells_the_share_that_was_cached_and_why_a_request_failed(scripted, caplog):
    caplog.set_level(logging.INFO, "dgemma.serve")
    http, service = scripted("Hello", RuntimeError("the flood"), cached_tokens=6)
    http.post(PATH, json=CHAT)
    http.post(PATH, json=CHAT)
    http.post(PATH, json={**CHAT, "model": "no\nbody\x1b[2J\u202e"})
    http.post("/v1/messages", json={**CHAT, "model": "sudoku", "max_tokens": 5, "stream": True})
    assert eventually(lambda: sum("POST" in record.getMessage() for record in caplog.records) == 4)
    lines = [record.getMessage() for record in caplog.records if "POST" in record.getMessage()]
    assert f"{round(600 / len(service.requests[0].prompt_ids))} % cached" in lines[0]
    assert "500" in lines[1] and "could not finish" in lines[1]
    assert "404" in lines[2] and "does not exist here" in lines[2]
    assert all(line.isprintable() for line in lines)
    assert "200" in lines[3] and "the flood" in lines[3]  # within the stream


def test_requests_are_written_down_with_their_prompts_where_that_is_wanted(scripted, tmp_path):
    diary = tmp_path / "requests.jsonl"
    http, service = scripted("Hello", settings=settings(debug_requests=diary))
    http.post(PATH, json={**CHAT, "seed": 3})
    http.post(PATH, json={**CHAT, "model": "nobody"})
    http.post(PATH, content=b"\xff{")
    http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5})
    http.get("/v1/models")
    assert eventually(lambda: diary.read_text().count("\n") == 4)
    first, refused, broken, both = map(json.loads, diary.read_text().splitlines())
    assert (first["path"], first["status"], first["body"]) == (PATH, 200, {**CHAT, "seed": 3})
    assert first["answers"][0]["prompt"] == service.model.tokenizer.decode(service.requests[0].prompt_ids)
    assert (first["answers"][0]["answer"], first["answers"][0]["seed"]) == ("Hello", 3)
    assert refused["status"] == 404 and "nobody" in refused["error"] and refused["answers"] == []
    assert broken["status"] == 400 and "{" in broken["body"]
    assert [answer["prompt"] for answer in both["answers"]] == ["<bos>a", "<bos>b"]
    assert diary.stat().st_mode & 0o077 == 0  # for nobody else's eyes
    with pytest.raises(DgemmaError, match="--debug-requests"):
        scripted(settings=settings(debug_requests=tmp_path))


def test_the_log_can_be_silent(scripted, caplog):
    caplog.set_level(logging.INFO, "dgemma.serve")
    http, _ = scripted("Hello", settings=settings(access_log=False))
    http.post(PATH, json=CHAT)
    assert not caplog.records


def test_a_mistake_of_ours_says_nothing_of_our_insides(scripted, caplog):
    http, service = scripted()
    del service.requests  # what the fake service stumbles over
    answer = http.post(PATH, json=CHAT)
    assert answer.status_code == 500 and "requests" not in answer.json()["error"]["message"].split("log")[1:]
    assert "AttributeError" not in answer.text and "AttributeError" in caplog.text


def test_many_clients_are_answered_at_the_same_time(scripted):
    http, _ = scripted("Hello", seconds=1.0)
    began = time.monotonic()
    threads = [threading.Thread(target=lambda: http.post(PATH, json=CHAT).raise_for_status()) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 6  # one after the other takes 8 seconds
