"""Who waits for whom, who finds what another has read, and what is said before a stream begins; over HTTP."""

import asyncio
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import pytest

from dgemma.cache.pages import PAGE
from dgemma.diffusion.request import Request
from dgemma.engine.service import Overloaded, Service
from dgemma.model import Model
from dgemma.serve.ask import system_tokens
from dgemma.serve.settings import Settings

LONG = "You are a careful assistant. " * 20  # more than two pages
KEYS = Settings(("sudoku",), api_keys=("one", "two"))


def chat_body(text="Hi", system=None, **more):
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
    return {"model": "sudoku", "messages": messages, "max_tokens": 4, "max_denoising_steps": 2, **more}


def bearer(key):
    return {"Authorization": f"Bearer {key}"} if key else {}


def ask_chat(http, key="", **body):
    answer = http.post("/v1/chat/completions", json=chat_body(**body), headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask_text(http, key="", text="Hi", **more):
    body = {"prompt": text, "max_tokens": 4, "max_denoising_steps": 2, **more}
    answer = http.post("/v1/completions", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask_responses(http, key="", text="Hi", **more):
    body = {"model": "sudoku", "input": text, "max_output_tokens": 16, "max_denoising_steps": 2, **more}
    answer = http.post("/v1/responses", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["input_tokens_details"]["cached_tokens"]


def ask_messages(http, key="", text="Hi", **more):
    body = {**chat_body(text), **more}
    answer = http.post("/v1/messages", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["cache_read_input_tokens"]


@contextmanager
def own_server(model, serve_model, settings=None):
    """A client of a server whose prefix cache is its own."""
    own = Model(model.network, model.tokenizer, model.generation_config, "sudoku")
    with serve_model(own, settings) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def keyed(model, serve_model):
    with own_server(model, serve_model, KEYS) as client:
        yield client


@pytest.fixture(scope="module")
def keyless(model, serve_model):
    with own_server(model, serve_model) as client:
        yield client


@pytest.mark.parametrize("ask", [ask_chat, ask_text, ask_responses, ask_messages])
def test_a_key_does_not_find_what_another_has_read_nor_a_salt(keyed, ask):
    text = ask.__name__ + LONG  # nobody has asked this before
    assert ask(keyed, "one", text=text) == 0
    assert ask(keyed, "two", text=text) == 0
    again = ask(keyed, "one", text=text)
    assert again >= PAGE
    assert again % PAGE == 0
    assert ask(keyed, "one", text=text, cache_salt="x") == 0
    assert ask(keyed, "one", text=text, cache_salt="y") == 0
    assert ask(keyed, "one", text=text, cache_salt="x") == again
    assert ask(keyed, "two", text=text, cache_salt="x") == 0


def test_without_keys_all_are_one_tenant_but_for_their_salts(keyless):
    http = keyless
    assert ask_chat(http, text=LONG) == 0
    assert ask_chat(http, text=LONG, user="another") >= PAGE
    assert ask_chat(http, text=LONG, cache_salt="mine") == 0
    assert ask_chat(http, text="Hi") == 0
    assert ask_chat(http, text="Hi") == 0  # less than a page: it is not told


@pytest.mark.parametrize("salt", ["", 7, "x" * 1001])
def test_a_salt_that_is_none_is_refused(keyless, salt):
    answer = keyless.post("/v1/chat/completions", json=chat_body(cache_salt=salt))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache_salt"


def test_system_prompts_are_shared_where_the_server_allows_it(model, serve_model):
    shares = Settings(("sudoku",), api_keys=("one", "two"), share_system_prompts=True)
    with own_server(model, serve_model, shares) as http:
        assert ask_chat(http, "one", system=LONG, text=LONG + "first") == 0
        shared = ask_chat(http, "two", system=LONG, text=LONG + "first")
        own = ask_chat(http, "one", system=LONG, text=LONG + "first")
        assert 0 < shared < own
        assert ask_chat(http, "two", system=LONG[1:], text=LONG) == 0
        assert ask_chat(http, "two", text=LONG + "something") == 0  # a user's turn is nobody else's
        assert ask_chat(http, "one", text=LONG + "something") == 0


def test_the_system_turn_is_the_beginning_up_to_its_end(model):
    def tokens(messages, **options):
        ids = model.prompt_ids(messages, **options)
        return model.tokenizer.decode(ids[: system_tokens(model.tokenizer, ids)])

    user = {"role": "user", "content": "Hi"}
    assert tokens([{"role": "system", "content": "Be kind."}, user]).endswith("Be kind.<turn|>")
    assert tokens([user]) == ""
    assert tokens([{"role": "user", "content": "system\nBe kind."}, user]) == ""
    assert system_tokens(model.tokenizer, []) == 0


def test_who_asks_is_the_key_then_the_user_and_an_address_without_keys(scripted):
    client, service = scripted(settings=KEYS)
    for key, user in (("one", "ann"), ("one", "bob"), ("two", "ann")):
        client.post("/v1/chat/completions", json=chat_body(user=user), headers={"Authorization": f"Bearer {key}"})
    clients, users = zip(*[(request.client, request.user) for request in service.requests], strict=True)
    assert clients[0] == clients[1] != clients[2]
    assert users == ("ann", "bob", "ann")
    client, service = scripted()
    for user in ("ann", "bob"):
        client.post("/v1/chat/completions", json=chat_body(user=user))
    assert {request.client for request in service.requests} == {"127.0.0.1"}


def test_invented_users_leave_places_and_turns_to_another_key(model):
    """In a queue that one key fills under as many names as it likes."""
    ask = model.request("Hi", max_tokens=40 * model.config.canvas_length, max_denoising_steps=40)

    async def main():
        service = Service(model.network, model.reader, model.prefixes, max_num_seqs=1, max_queue=31)
        order = []

        async def one(client, user):
            request = Request(**{**vars(ask), "client": client, "user": user})
            try:
                async for _ in await service.admit(request):
                    order.append((client, user))
                    return
            except Overloaded:
                order.append("refused")

        tasks = [asyncio.create_task(one("a", f"user {i}")) for i in range(50)]
        while len(service._mail) < 28 or order.count("refused") < 22:
            await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(one("b", "")) for _ in range(2)]
        while len(service._mail) < 30:
            await asyncio.sleep(0.01)
        service.start()
        await asyncio.gather(*tasks)
        await service.stop(0)
        return [who for who in order if who != "refused"]

    order = asyncio.run(main())
    assert [who[0] for who in order[:4]] == ["a", "b", "a", "b"]
    assert len(order) == 30


# What is decided before a stream begins


@pytest.fixture
def slow_checks(model, serve_model, monkeypatch):
    """A server of two places, where checking a request takes longer than anybody waits for a first word."""
    own = Model(model.network, model.tokenizer, model.generation_config, "sudoku")
    settings = Settings(("sudoku",), ping=0.05)  # so that whoever occupies a place hears at once that it is over
    with serve_model(own, settings, max_num_seqs=1, max_queue=1) as (url, service):
        check, slow = service.engine.check, threading.Event()

        def checked(request):
            if slow.is_set():
                time.sleep(0.15)
            check(request)

        monkeypatch.setattr(service.engine, "check", checked)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, service, slow


STREAMS = [("/v1/chat/completions", chat_body(stream=True)), ("/v1/completions", {"prompt": "Hi", "stream": True}),
           ("/v1/responses", {"model": "sudoku", "input": "Hi", "stream": True}),
           ("/v1/messages", {**chat_body(stream=True)})]


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_that_cannot_be_taken_is_a_429_however_long_that_takes_to_find_out(slow_checks, path, body):
    client, service, slow = slow_checks
    endless = chat_body(max_tokens=2000, max_denoising_steps=500, confidence_threshold=1e-9)

    def occupy():
        with client.stream("POST", "/v1/chat/completions", json={**endless, "stream": True}) as answer:
            for _ in answer.iter_bytes():
                if done.is_set():
                    return

    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            running = [pool.submit(occupy) for _ in range(2)]
            while len(service._mail) < 2:
                time.sleep(0.01)
            slow.set()
            answer = client.post(path, json=body)
        finally:
            done.set()
            slow.clear()
            service.engine.cancel_all()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert all(future.exception(60) is None for future in running)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_that_cannot_run_is_a_400_however_long_that_takes_to_find_out(slow_checks, path, body, monkeypatch):
    client, service, _ = slow_checks

    def check(request):
        time.sleep(0.15)
        raise ValueError("the prompt of 2 tokens and one canvas need more memory than there is")

    monkeypatch.setattr(service.engine, "check", check)
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert "one canvas" in answer.text


def test_a_stream_that_is_taken_begins_before_its_turn_comes(slow_checks):
    client, service, _ = slow_checks
    endless = chat_body(max_tokens=2000, max_denoising_steps=500, confidence_threshold=1e-9, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=endless) as first:
        assert first.status_code == 200
        with client.stream("POST", "/v1/chat/completions", json=endless) as second:
            assert second.status_code == 200
            service.engine.cancel_all()


def test_numbers_of_requests_can_be_asked_for_while_they_come_and_go(model):
    """From another thread than the one that changes them."""
    own = Model(model.network, model.tokenizer, model.generation_config, "sudoku")
    request = own.request("Hi", max_tokens=1, max_denoising_steps=1)
    failed = []

    async def main():
        service = Service(own.network, own.reader, own.prefixes, max_num_seqs=8)
        service.start()
        over = threading.Event()

        def look():
            while not over.is_set():
                try:
                    service.stats()
                    service._mail.refusal(request, None)
                except Exception as error:
                    failed.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()

        async def one():
            async for _ in await service.admit(request):
                pass

        await asyncio.gather(*(one() for _ in range(24)))
        over.set()
        for thread in threads:
            thread.join()
        await service.stop(0)

    asyncio.run(main())
    assert not failed


# Damaged weights


@pytest.fixture(scope="module")
def damaged(model, serve_model):
    network = copy.deepcopy(model.network)
    network.layers[1].mlp.up_proj.weight.data[5] = float("nan")
    with own_server(Model(network, model.tokenizer, model.generation_config, "sudoku"), serve_model) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_damaged_weights_are_a_500_that_says_so(damaged, path, body):
    answer = damaged.post(path, json={**body, "stream": False})
    assert answer.status_code == 500
    assert "its weights are probably damaged" in answer.json()["error"]["message"]
    streamed = damaged.post(path, json=body)
    assert "its weights are probably damaged" in streamed.text
