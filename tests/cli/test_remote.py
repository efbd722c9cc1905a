"""`--url`: a model on a server, ours or another's, answers as one on this machine does."""

import dataclasses
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from dgemma.cli.remote.client import OpenAIServer, base_url
from dgemma.cli.remote.model import StreamReader, Vocabulary, connect
from dgemma.cli.session import follow
from dgemma.cli.terminal.canvas import PlainText
from dgemma.cli.terminal.view import CanvasView
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Finished, Generation
from dgemma.errors import DgemmaError
from support.openai_server import BREAK, WAIT, OpenAIStandIn, draft_chunk, text_chunks

OURS = [{"id": "sudoku", "owned_by": "dgemma"}]


@pytest.fixture(autouse=True)
def no_keys(environment):
    environment(DGEMMA_API_KEY=None, OPENAI_API_KEY=None)


@pytest.fixture
def server():
    with OpenAIStandIn() as server:
        yield server


@pytest.fixture
def run(dgemma_command, server):
    return lambda *arguments, **options: dgemma_command("run", "--url", server.url, *arguments, **options)


def failed(outcome, *words):
    assert outcome.code == 1
    assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def answer_of(server, drafts=True, **options):
    """An answer's events, and what the last of them says."""
    model = connect(server.url, None, None, drafts=drafts)
    events = list(model.stream("hi", **options))
    assert isinstance(events[-1], Finished)
    return model, events, events[-1].generation


# addresses


@pytest.mark.parametrize(("given", "meant"), [
    ("http://localhost:8000", "http://localhost:8000/v1"),
    ("http://localhost:8000/", "http://localhost:8000/v1"),
    ("http://localhost:8000/v1", "http://localhost:8000/v1"),
    (" https://example.org/api/v1/ ", "https://example.org/api/v1"),
    ("https://example.org/v1beta/openai/", "https://example.org/v1beta/openai"),
    ("http://[::1]:8000", "http://[::1]:8000/v1"),
])
def test_v1_is_added_where_it_is_missing(given, meant):
    assert base_url(given) == meant


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host/?a=b",
                                 "http://[::1", ""])
def test_what_is_no_address_is_refused(dgemma_command, url):
    failed(dgemma_command("run", "--url", url, "hi"), "http://localhost:8000")


# run


def test_the_servers_first_model_answers(run, server):
    outcome = run("hi")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello there\n", "")
    assert server.bodies == [{"model": "first", "messages": [{"role": "user", "content": "hi"}], "stream": True,
                              "stream_options": {"include_usage": True}}]


def test_options_are_sent_by_their_names(run, server):
    run("hi", "-m", "second", "--seed", 0, "--max-tokens", 9, "--system", "be brief", "--thinking",
        "--max-denoising-steps", 5, "--entropy-bound", 0.2, "--t-max", 0.3)
    (body,) = server.bodies
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert {name: body[name] for name in body.keys() - {"messages", "stream", "stream_options"}} == {
        "model": "second", "seed": 0, "max_tokens": 9, "max_denoising_steps": 5, "entropy_bound": 0.2, "t_max": 0.3,
        "chat_template_kwargs": {"enable_thinking": True}}


def test_json_has_the_shape_of_a_local_answer_and_null_for_what_is_not_known(run, server):
    data = json.loads(run("hi", "--json").out)
    assert list(data) == [field.name for field in dataclasses.fields(Generation)]
    assert (data["text"], data["finish_reason"], data["prompt_tokens"]) == ("Hello there", "stop", 5)
    assert data["seed"] is data["steps"] is data["token_ids"] is None
    assert json.loads(run("hi", "--json", "--seed", 3).out)["seed"] == 3


def test_the_key_is_sent(run, server, environment):
    server.key = "s3cret"
    failed(run("hi"), "API key", "--api-key", "Incorrect API key provided")
    assert run("hi", "--api-key", "s3cret").code == 0
    environment(OPENAI_API_KEY="not this one", DGEMMA_API_KEY="s3cret\n")  # as `$(cat file)` or an editor leaves it
    assert run("hi").code == 0
    environment(DGEMMA_API_KEY=None)
    failed(run("hi"), "characters that no key can have")
    assert "Bearer s3cret" in server.keys


@pytest.mark.parametrize("option", ["--device", "--dtype", "--cache-type", "--trace"])
def test_options_for_a_model_on_this_machine_are_refused(run, server, option):
    failed(run("hi", option, "f32"), option, "--url")
    assert not server.keys


def test_text_that_no_terminal_should_get_reaches_a_pipe_as_it_is(run, server):
    server.chunks = text_chunks("\x1b[2Ja\u2028b\x85c\r\nd ", "é\U0001f600")
    assert run("hi").out == "\x1b[2Ja\u2028b\x85c\r\nd é\U0001f600\n"


def test_a_terminal_gets_the_text_once(run, server):
    server.chunks = [{"choices": [{"delta": {"reasoning_content": "hm\x1b["}}]}, *text_chunks("a\n\nb", "c")]
    assert run("hi", terminal=True).out == "\x1b[2;3mhm␛[\x1b[0m\n\na\n\nbc\n"


# what goes wrong


def test_nobody_listens(dgemma_command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        failed(dgemma_command("run", "--url", url, "hi"), f"no server can be reached at {url}/v1", "refused")


def test_a_server_that_never_says_anything_is_given_up(run, server, monkeypatch):
    monkeypatch.setattr("dgemma.cli.remote.client.SILENCE_SECONDS", 0.2)
    server.chunks = [*text_chunks("a")[:2], WAIT]
    failed(run("hi"), "has said nothing for 0.2 s")


@pytest.mark.parametrize(("status", "answer", "words"), [
    (400, {"error": {"message": "seed: must be\n at least 0", "code": 400}}, ["seed: must be at least 0"]),
    (404, {"error": {"message": "The model `x` does not exist."}}, ["The model `x` does not exist"]),
    (404, b"<html>nginx</html>", ["/chat/completions"]),
    (422, {"detail": [{"msg": "bad"}]}, ["422", '[{"msg": "bad"}]']),
    (429, {"error": "slow down"}, ["busy", "slow down", "in 7 s"]),
    (503, b"", ["busy", "503"]),
    (500, {"object": "error", "message": "\x1b[2Jboom"}, ["500", "boom"]),
    (502, b"<html>bad gateway</html>", ["502 Bad Gateway"]),
    (307, b"", ["https://elsewhere/v1/", "--url"]),
    (200, {"choices": [{"message": {"content": "a"}}]}, ["did not stream", "application/json"]),
])
def test_a_refusal_is_one_line(run, server, status, answer, words):
    server.status, server.answer = status, answer
    server.headers = {"Retry-After": "7", "Location": "https://elsewhere/v1/"}
    outcome = run("hi")
    failed(outcome, *words)
    assert "\x1b[2J" not in outcome.err and "html" not in outcome.err


@pytest.mark.parametrize("models", [b"<html>hello</html>", b"[1]", b'{"data": [{"name": "a"}]}', b'{"data": 3}'])
def test_something_else_than_such_a_server(run, server, models):
    server.models = models
    failed(run("hi"), "not an OpenAI-compatible server")


def test_a_server_without_a_list_of_models_serves_who_names_one(run, server):
    server.models_status = 404
    failed(run("hi"), "no /models", "-m")
    assert run("hi", "-m", "mine").out == "Hello there\n"
    assert server.bodies[-1]["model"] == "mine"


def test_a_server_with_no_models(run, server):
    server.models = []
    failed(run("hi"), "serves no model")


@pytest.mark.parametrize(("chunks", "words"), [
    ([BREAK], ["broke"]),
    ([*text_chunks("Hel")[:2], BREAK], ["broke"]),
    (text_chunks("Hel")[:2], ["ended in the middle"]),
    ([*text_chunks("Hel")[:2], {"error": {"message": "out of memory"}}], ["out of memory"]),
    (["no json"], ["no json"]),
    (["[1]"], ["[1]"]),
    ([{"choices": [{"delta": 3}]}], ["makes no sense"]),
    ([{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}], "usage": [1]}], ["makes no sense"]),
    ([{"choices": [{"delta": {"tool_calls": [{"index": None}, {"index": 0}]}, "finish_reason": "stop"}]}],
     ["makes no sense"]),
])
def test_a_stream_that_breaks_is_an_error_not_an_answer(run, server, chunks, words):
    server.chunks, server.done = chunks, False
    outcome = run("hi")
    failed(outcome, *words)
    assert outcome.out == ""


# stopping


def stopped(server, visual):
    """What came of an answer that a Ctrl-C ended in the middle."""
    model = connect(server.url, None, None, drafts=True)
    events = model.stream("hi")

    def press():
        server.waiting.wait(30)
        time.sleep(0.05)  # what was sent is received
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    generation = follow(model, events, visual=visual, insist=False)
    assert server.hung_up.wait(10), "the connection was not closed"
    return generation


@pytest.mark.parametrize("visual", [True, False])
def test_ctrl_c_closes_the_connection_and_keeps_what_came(server, visual):
    server.chunks = [*text_chunks("Hel", "lo")[:3], WAIT]
    generation = stopped(server, visual)
    assert (generation.finish_reason, generation.text) == ("cancelled", "Hello")


@pytest.mark.parametrize("visual", [True, False])
def test_ctrl_c_stops_before_anything_came(server, visual):
    server.models, server.chunks = OURS, [WAIT]
    generation = stopped(server, visual)
    assert (generation.finish_reason, generation.text) == ("cancelled", "")


def test_whoever_stops_listening_closes_the_connection(server):
    server.chunks = [*text_chunks("Hel", "lo")[:3], WAIT]
    events = connect(server.url, None, None, drafts=False).stream("hi")
    assert isinstance(next(events), CanvasCommitted)
    events.close()
    assert server.hung_up.wait(10)


def test_a_stop_comes_never_too_early(server):
    model = connect(server.url, None, None, drafts=False)
    events = model.stream("hi")
    model.cancel()
    assert [event.generation.finish_reason for event in events] == ["cancelled"]


def test_a_server_on_this_machine_is_not_asked_for_through_a_proxy(run, environment):
    environment(HTTP_PROXY="http://127.0.0.1:1", NO_PROXY=None, no_proxy=None)
    assert run("hi").code == 0


# drafts


def test_drafts_are_asked_of_our_server_only_and_only_to_be_shown(server):
    for models, drafts, asked in ((OURS, True, True), (OURS, False, False), ([{"id": "sudoku"}], True, False)):
        server.models = models
        answer_of(server, drafts=drafts)
        assert ("include_drafts" in server.bodies[-1]["stream_options"]) is asked


def canvases(*texts, length=16):
    """What our server streams for an answer of these canvases, three drafts each."""
    chunks = []
    for canvas, text in enumerate(texts):
        chunks += [draft_chunk("x" * len(text), canvas=canvas, step=1, length=length),
                   draft_chunk(text, canvas=canvas, step=3, length=length, sure=4),
                   {"choices": [{"index": 0, "delta": {"content": text}}]}]
    count = sum(map(len, texts))
    usage = {"prompt_tokens": 5, "completion_tokens": count, "denoising_steps": 3 * len(texts) + 1,
             "prompt_tokens_details": {"cached_tokens": 4}}
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage, "seed": 11}]


def test_drafts_become_the_events_of_a_model_on_this_machine(server):
    server.models, server.chunks = OURS, canvases("a" * 16, "bcd")
    model, events, generation = answer_of(server)
    assert [type(event) for event in events] == [
        CanvasStarted, Denoised, Denoised, CanvasCommitted, CanvasStarted, Denoised, Denoised, CanvasCommitted,
        Finished]
    first, second = (event for event in events if isinstance(event, CanvasCommitted))
    assert (first.canvas, second.canvas) == (0, 1)
    assert (len(first.token_ids), len(second.token_ids)) == (16, 3)
    drafts = [event for event in events if isinstance(event, Denoised)]
    assert (drafts[1].step, drafts[1].changed[:2], drafts[1].accepted[3:5]) == (3, [True, True], [True, False])
    assert model.tokenizer.token_bytes(drafts[3].token_ids[0]) == b"b"
    assert model.tokenizer.is_special(drafts[3].token_ids[3])
    assert generation == Generation("a" * 16 + "bcd", None, [], [], "stop", [3, 4], 19 / 7, 5, generation.seconds,
                                    seed=11, cached_tokens=4)


def test_the_canvas_shows_the_servers_text_and_counts(server):
    server.models, server.chunks = OURS, canvases("Hello wörld,\n\nb😀", "cd")
    model, events, generation = answer_of(server)
    view = CanvasView(lambda token: (model.tokenizer.token_bytes(token), model.tokenizer.is_special(token)))
    rows, frames = [], []
    for event in events:
        view.apply(event)
        rows += view.take_rows(80)
        frames.append("\n".join("".join(segment.text for segment in line) for line in view.frame(80, 24)))
    rows += view.take_rows(80, everything=True)
    assert "\n".join("".join(cell.text for cell in row.cells) for row in rows) == "Hello wörld,\n\nb😀cd"
    assert "step 3/48" in frames[2] and "4/16 settled" in frames[2] and "Hell" in frames[2]
    summary = "".join(segment.text for segment in view.summary(120))
    assert summary.startswith("18 tokens · 2 canvases · 7 steps · 2.6 tokens/forward")


def test_html_tags_are_text_and_marks_are_special():
    vocabulary = Vocabulary()
    tokens = ["<table>", "</b>", "<|channel>", "<turn|>", '<|"|>', "<eos>", "<", ">", "|"]
    vocabulary.learn(list(range(9)), tokens)
    assert [vocabulary.is_special(i) for i in range(9)] == [False, False, True, True, True, True, False, False, False]


def test_thoughts_are_shown_as_thoughts(server):
    server.models = OURS
    server.chunks = [draft_chunk("ab"), {"choices": [{"delta": {"reasoning_content": "thought\nhm"}}]},
                     *text_chunks("ok")]
    model, events, generation = answer_of(server)
    assert (generation.reasoning, generation.text) == ("thought\nhm", "ok")
    view = CanvasView(lambda token: (model.tokenizer.token_bytes(token), model.tokenizer.is_special(token)))
    for event in events:
        view.apply(event)
    rows = view.take_rows(80, everything=True)
    looks = {cell.text: cell.look for row in rows for cell in row.cells}
    assert (looks["m"], looks["k"]) == ("thought", "settled")


def test_pins_of_a_draft_are_those_of_its_canvas(server):
    draft = draft_chunk("ab", length=4)
    draft["dgemma"]["draft"]["pinned"] = [True, False, True, False]
    server.models, server.chunks = OURS, [draft, *text_chunks("ab")]
    _, events, _ = answer_of(server)
    assert events[0].pinned == [True, False, True, False]


def test_text_without_a_draft_is_not_lost(server):
    server.models, server.chunks = OURS, text_chunks("Hello")
    _, events, _ = answer_of(server)
    assert [type(event) for event in events] == [CanvasCommitted, Finished]
    assert len(events[0].token_ids) == 7  # as the server counts


@pytest.mark.parametrize("change", [{"tokens": []}, {"token_ids": 3}, {"entropies": None}, {"step": "a"}])
def test_a_draft_that_makes_no_sense_is_an_error(run, server, change):
    server.models = OURS
    draft = draft_chunk("ab")
    draft["dgemma"]["draft"] |= change
    server.chunks = [draft, *text_chunks("ab")]
    failed(run("hi", terminal=True), "makes no sense")


def test_tool_calls_are_put_together():
    reader = StreamReader(Vocabulary(), False, None)
    for index, function in ((0, {"name": "add", "arguments": '{"a": '}), (0, {"arguments": "1}"}),
                            (1, {"name": "odd", "arguments": "{"})):
        reader.feed({"choices": [{"delta": {"tool_calls": [{"index": index, "function": function}]}}]})
    reader.feed({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    generation = reader.finish(False)[-1].generation
    assert generation.tool_calls == [{"name": "add", "arguments": {"a": 1}}, {"name": "odd", "arguments": "{"}]
    assert generation.finish_reason == "stop"


def test_arguments_without_end_stay_text():
    reader = StreamReader(Vocabulary(), False, None)
    reader.feed({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}}]})
    assert reader.finish(False)[-1].generation.tool_calls == [{"name": "f", "arguments": "[" * 100_000}]


def test_plain_text_keeps_every_space_and_line():
    out = io.StringIO()
    vocabulary = Vocabulary()
    parts = ["  two\n", "\n", "three ", " \tfour\n\n"]
    with PlainText(Console(file=out, width=5), lambda i: (vocabulary.token_bytes(i), vocabulary.is_special(i))) as text:
        for part in parts:
            text.show(CanvasCommitted(0, 0, [vocabulary.add(part)], 0, 0.0))
    assert out.getvalue() == "".join(parts).replace("\t", "    ")


# chat


def test_a_conversation_on_a_server(dgemma_command, server):
    outcome = dgemma_command("chat", "--url", server.url, "--system", "be brief",
                             stdin="hi\n/set t-min 0.9\n/set\nmore\n/set t-min -1\n/clear\nnew\n")
    assert "Hello there" in outcome.out
    assert "t_min 0.9\n" in outcome.out and "t_max (the server's default)" in outcome.out
    assert "t_min must be" in outcome.err
    first, second, third = server.bodies
    assert second["messages"] == [*first["messages"], {"role": "assistant", "content": "Hello there"},
                                  {"role": "user", "content": "more"}]
    assert second["t_min"] == 0.9
    assert [message["role"] for message in third["messages"]] == ["system", "user"]


def test_a_conversation_survives_its_server(dgemma_command, server):
    server.status, server.answer = 500, {"error": {"message": "boom"}}
    outcome = dgemma_command("chat", "--url", server.url, stdin="hi\n/seed 3\n")
    assert outcome.code == 1
    assert "boom" in outcome.err and "seed 3" in outcome.out


def test_torch_is_not_needed_to_talk_to_a_server(server):
    code = (f"import sys; from dgemma.cli.main import app; app(['run', '--url', {server.url!r}, 'hi'], "
            "standalone_mode=False); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Hello there\nFalse\n"


def test_a_name_that_the_server_does_not_know_is_its_own_to_refuse(run, server):
    server.status, server.answer = 404, {"error": {"message": "there is no model x; this server has first"}}
    failed(run("hi", "-m", "x"), "there is no model x; this server has first")
    with pytest.raises(DgemmaError, match="http://localhost:8000"):
        OpenAIServer("nonsense")
