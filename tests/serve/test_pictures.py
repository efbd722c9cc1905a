"""Pictures and films over HTTP, by the real clients of all three APIs; and what is said of bad ones."""

from __future__ import annotations

import base64

import anthropic
import httpx2 as httpx
import ollama
import openai
import pytest

import dgemma
from dgemma.serve.anthropic.body import MessagesBody
from support.films import film
from support.pictures import as_file, random_picture
from support.vision import save_seeing_model

PNG = as_file(random_picture(60, 50), "PNG")
BASE64 = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{BASE64}"
TOKENS = 9 * 7 + 2  # of the picture, with its begin and end
STEPS = {"max_denoising_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return dgemma.load(save_seeing_model(tmp_path_factory.mktemp("seeing")))


@pytest.fixture(scope="module")
def url(seeing, serve_model):
    with serve_model(seeing) as (url, _):
        yield url


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def plain_tokens(http, words="What?"):
    body = {"model": "sudoku", "messages": [{"role": "user", "content": words}]}
    return http.post("/tokenize", json=body).json()["count"]


def chat(content, **fields):
    return {"model": "sudoku", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **STEPS, **fields}


def image(url=URL, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


WORDS = {"type": "text", "text": "What?"}


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_sends_pictures_to_chat(url, http, stream):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
    answer = client.chat.completions.create(
        model="sudoku", messages=[{"role": "user", "content": [image(), WORDS]}], max_tokens=8, stream=stream,
        extra_body=STEPS, **({"stream_options": {"include_usage": True}} if stream else {}))
    usage = list(answer)[-1].usage if stream else answer.usage
    assert usage.prompt_tokens == plain_tokens(http) + TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_sends_pictures_to_responses(url, http, stream):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x")
    content = [{"type": "input_image", "image_url": URL, "detail": "auto"}, {"type": "input_text", "text": "What?"}]
    answer = client.responses.create(model="sudoku", input=[{"role": "user", "content": content}], stream=stream,
                                     max_output_tokens=8, extra_body=STEPS)
    usage = list(answer)[-1].response.usage if stream else answer.usage
    assert usage.input_tokens == plain_tokens(http) + TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_sends_pictures(url, http, stream):
    client = anthropic.Anthropic(base_url=url, api_key="x")
    source = {"type": "base64", "media_type": "image/png", "data": BASE64}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, WORDS]}]
    asked = {"model": "sudoku", "messages": messages, "max_tokens": 8, "extra_body": STEPS}
    if stream:
        with client.messages.stream(**asked) as events:
            usage = events.get_final_message().usage
    else:
        usage = client.messages.create(**asked).usage
    wanted = plain_tokens(http) + TOKENS
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == wanted
    assert client.messages.count_tokens(model="sudoku", messages=messages).input_tokens == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_client_sends_pictures(url, http, stream):
    client = ollama.Client(host=url)
    options = {"num_predict": 8, **STEPS}
    asked = client.chat(model="sudoku", messages=[{"role": "user", "content": "What?", "images": [PNG]}],
                        options=options, stream=stream)
    last = list(asked)[-1] if stream else asked
    generated = client.generate(model="sudoku", prompt="What?", images=[BASE64], options=options)
    assert last.prompt_eval_count == generated.prompt_eval_count == plain_tokens(http) + TOKENS
    assert "vision" in client.show("sudoku").capabilities


def test_the_answer_is_the_library_s(http, seeing):
    there = http.post("/v1/chat/completions", json=chat([image(), WORDS])).json()
    here = seeing.generate("What?", images=[PNG], max_tokens=8, **STEPS)
    assert there["choices"][0]["message"]["content"] == here.text


def test_detail_is_the_number_of_soft_tokens(http):
    large = f"data:image/png;base64,{base64.b64encode(as_file(random_picture(900, 900), 'PNG')).decode()}"

    def tokens(**detail):
        body = chat([image(large, **detail), WORDS])
        return http.post("/tokenize", json={key: body[key] for key in ("model", "messages")}).json()["count"]

    assert tokens(detail="low") < tokens() == tokens(detail="auto") < tokens(detail="high")


def test_a_film_is_its_frames(http):
    url = f"data:video/mp4;base64,{base64.b64encode(film(60, 30)).decode()}"
    answer = http.post("/v1/chat/completions", json=chat([{"type": "video_url", "video_url": {"url": url}}, WORDS]))
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] > plain_tokens(http) + 2 * 40


def test_two_questions_about_one_picture_ask_the_tower_once(http, seeing):
    seen = seeing.pictures.seen
    fresh = f"data:image/png;base64,{base64.b64encode(as_file(random_picture(70, 50, seed=5), 'PNG')).decode()}"
    for words in ("What?", "And why?"):
        http.post("/v1/chat/completions", json=chat([image(fresh), {"type": "text", "text": words}]))
    assert seeing.pictures.seen == seen + 1
    assert f"dgemma_pictures_seen_total {seen + 1:.1f}" in http.get("/metrics").text


@pytest.mark.parametrize(("part", "said", "param"), [
    (image("data:image/png;base64,AAAA"), "not a picture", "messages[0].content[0]"),
    (image("data:image/png;base64,§"), "not base64", "messages[0].content[0]"),
    (image("https://x.example/a.png"), "fetches nothing", "messages[0].content[0]"),
    (image("/etc/passwd"), "not as text", "messages[0].content[0]"),
    (image("file:///etc/passwd"), "not as file:", "messages[0].content[0]"),
    ({"type": "image_url"}, "needs the picture", "messages[0].content[0]"),
    (image(URL, detail="huge"), "detail must be one of auto, low, high, original, got", "messages[0].content[0]"),
    ({"type": "image", "path": "/etc/passwd"}, "needs the picture", "messages[0].content[0]"),
    ({"type": "input_audio"}, "is not read here", "messages[0].content[0]")])
def test_a_part_that_cannot_be_seen_is_an_error_that_names_it(http, part, said, param):
    answer = http.post("/v1/chat/completions", json=chat([part, WORDS]))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"] and param in error["message"]
    assert error["param"] in (param, "messages")


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": BASE64}


def in_tools_results(shown):
    """Of every API a path and a body whose last message is the result of a tool, with a picture in it or without."""
    result = [{"type": "text", "text": "seen"}]
    yield "/v1/chat/completions", {"messages": [
        {"role": "user", "content": "Look"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [*result, image()] if shown else result}]}
    yield "/v1/responses", {"input": [
        {"role": "user", "content": "Look"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "seen"}, *([{"type": "input_image", "image_url": URL}] if shown else [])]}]}
    yield "/v1/messages", {"messages": [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [
            *result, *([{"type": "image", "source": SOURCE}] if shown else [])]}]}]}
    yield "/api/chat", {"messages": [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "tool_name": "look", "content": "seen", **({"images": [BASE64]} if shown else {})}]}


@pytest.mark.parametrize("number", range(4), ids=["chat", "responses", "messages", "ollama"])
@pytest.mark.filterwarnings("error:a picture stands behind")
def test_a_picture_in_a_tools_result_is_seen_where_it_stands(http, number):
    def asked(shown):
        path, body = list(in_tools_results(shown))[number]
        answer = http.post(path, json={"model": "sudoku", "max_tokens": 8, "stream": False, **STEPS, **body})
        assert answer.status_code == 200, answer.text
        usage = answer.json().get("usage") or {"input_tokens": answer.json()["prompt_eval_count"]}
        return sum(usage.get(name) or 0 for name in ("input_tokens", "prompt_tokens", "cache_read_input_tokens"))

    # A list has line breaks in this model's template.
    assert TOKENS <= asked(True) - asked(False) <= TOKENS + 4


def test_a_failed_tools_picture_comes_with_the_word_error():
    result = {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": [
        {"type": "text", "text": "no"}, {"type": "image", "source": SOURCE}]}
    body = MessagesBody(model="m", max_tokens=1, messages=[{"role": "user", "content": [result]}])
    [message] = body.prompt_messages()
    assert [part.get("text", part["type"]) for part in message["content"]] == ["error", "no", "image"]


def test_a_template_that_leaves_out_what_a_tool_shows_is_an_error(tmp_path, serve_model):
    folder = save_seeing_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}<|turn>{{ message.role }}<turn|>"
                                                "{% endfor %}")
    with serve_model(dgemma.load(folder)) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        path, body = next(in_tools_results(True))
        answer = client.post(path, json={"model": "sudoku", **body})
    assert answer.status_code == 400
    assert "a chat template may leave out" in answer.json()["error"]["message"]


def test_pictures_in_what_the_assistant_said_are_refused(http):
    body = chat("x")
    body["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [image()]},
                        {"role": "user", "content": "b"}]
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "in messages of the user and in tools' results only" in answer.json()["error"]["message"]
