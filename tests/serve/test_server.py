"""`dgemma serve` as a process: starting, stopping, being killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import pytest
import websockets.sync.client
from typer.testing import CliRunner

from dgemma.cli.main import app
from dgemma.errors import DgemmaError
from dgemma.serve.app import create_app
from dgemma.serve.server import bind, impatient
from dgemma.serve.settings import Settings
from support.scripted_service import ScriptedService, served
from support.server_process import serving

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"
KEY = {"Authorization": "Bearer secret"}


@contextmanager
def under_load(process, count, **fields):
    """So many streams have begun: a list where their texts are when the block is left."""
    texts = [""] * count
    begun = threading.Semaphore(0)

    def stream(index):
        with http.stream("POST", process.url + PATH, json={**CHAT, "stream": True, **fields}) as answer:
            for text in answer.iter_text():
                if not texts[index]:
                    begun.release()
                texts[index] += text

    with httpx.Client(timeout=60, headers=KEY) as http:
        threads = [threading.Thread(target=stream, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        assert all(begun.acquire(timeout=30) for _ in threads)
        yield texts
        for thread in threads:
            thread.join(30)


def test_what_does_not_finish_in_time_is_cut_off_and_told_so():
    with (serving("--grace", "0", "--max-num-seqs", "1") as process,
          under_load(process, 8, confidence_threshold=1e-6, temperature=3) as texts):
        code = process.end(signal.SIGINT)
    assert code == 0
    cut = [text for text in texts if not text.endswith("data: [DONE]\n\n")]
    assert cut and all("cut off this answer" in text for text in cut)
    assert any(re.search(r"stopped: \d+ answers were cut off", line) for line in process.lines)


def test_a_killed_server_starts_again_as_the_command_says_and_loses_no_answer_when_it_is_ended():
    with serving() as first:
        url = first.url
        assert httpx.post(url + PATH, json=CHAT, timeout=60).status_code == 200
        first.end(signal.SIGKILL)
    with serving("--port", url.rpartition(":")[2], "--served-model-name", "one", "--served-model-name", "two",
                 "--no-access-log", "--max-model-len", "300", "--max-num-seqs", "2",
                 DGEMMA_API_KEY="secret") as second:
        assert second.url == url  # the port is free again
        assert "with a key" in second.lines[0]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        cards = httpx.get(f"{url}/v1/models", headers=KEY).json()["data"]
        assert [(card["id"], card["max_model_len"]) for card in cards] == [("one", 300), ("two", 300)]
        # The settings make every answer take all its steps: some run and some wait when the signal comes.
        with under_load(second, 5, confidence_threshold=1e-6, temperature=3) as texts:
            assert second.end(signal.SIGTERM) == 0
    assert all(text.endswith("data: [DONE]\n\n") and '"finish_reason":"' in text for text in texts)
    assert any("every answer was finished" in line for line in second.lines)
    assert not any("/v1/models" in line or "secret" in line for line in second.lines)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--host", "0.0.0.0"), "--api-key"), (("--host", "no.such.host.invalid", "--api-key", "k"), "no address"),
    (("--api-key", ""), "must not be empty"), (("--served-model-name", ""), "needs a name"),
])
def test_a_command_that_is_wrong_is_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(DgemmaError, match=message):
        CliRunner().invoke(app, ["serve", "-m", "no-such-model", "--port", "0", *arguments], catch_exceptions=False)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DgemmaError, match="choose another --port"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("said", [[], [b"GET /health HTTP/1.1\r\nX: "],
                                  [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nX: "]])
def test_who_does_not_say_what_he_wants_is_hung_up_on(model, said):
    application = create_app(model, ScriptedService(model, "x"), Settings(("sudoku",)))
    with (served(application, http=impatient(0.3), timeout_keep_alive=60) as url,
          socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow):
        slow.settimeout(5)
        for part in said:
            slow.sendall(part)
            if part.endswith(b"\r\n\r\n"):
                answer = b""
                while not answer.endswith(b"}"):
                    answer += slow.recv(1000)
                time.sleep(0.5)  # between two requests he may take his time
        began = time.monotonic()
        assert slow.recv(1000) == b"" and time.monotonic() - began < 3


def test_an_answer_may_take_longer_than_its_request(model):
    application = create_app(model, ScriptedService(model, ["a", "b"], seconds=0.5), Settings(("sudoku",)))
    with served(application, http=impatient(0.3)) as url, httpx.Client(timeout=30) as http:
        for _ in range(2):
            assert http.post(url + PATH, json=CHAT).json()["choices"][0]["message"]["content"] == "ab"


def test_a_websocket_may_be_silent_for_as_long_as_it_likes():
    async def echo(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})

    with (served(echo, http=impatient(0.2)) as url,
          websockets.sync.client.connect(url.replace("http", "ws"), proxy=None) as socket):
        time.sleep(0.5)
        socket.send("still here")
        assert socket.recv(timeout=5) == "still here"


@pytest.mark.parametrize("changes", [
    {"served_names": ()}, {"served_names": ("",)}, {"api_keys": ("",)}, {"max_model_len": 1}, {"timeout": -1},
    {"rate_limit": float("nan")}, {"max_body_bytes": 0}, {"ping": 0}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(DgemmaError):
        Settings(**{"served_names": ("x",), **changes})


def test_help_does_not_load_what_only_the_server_needs():
    code = ("import sys, typer.testing, dgemma.cli.main as main; "
            "result = typer.testing.CliRunner().invoke(main.app, ['serve', '--help']); "
            "assert '--served-model-name' in result.output; "
            "print([name for name in ('fastapi', 'uvicorn', 'torch') if name in sys.modules])")
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_without_the_extra_the_command_says_what_to_install(not_installed):
    not_installed("uvicorn")
    with pytest.raises(DgemmaError, match=r'uvicorn: pip install "dgemma\[serve\]"'):
        CliRunner().invoke(app, ["serve"], catch_exceptions=False)
