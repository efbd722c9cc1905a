"""Ollama's API, held to Ollama's own client."""

import json

import ollama
import pytest

from dgemma.engine.service import Overloaded

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HELLO = [{"role": "user", "content": "Hello"}]
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
THOUGHT = "<|channel>thought\nhm<channel|>"


def weather(city: str, days: int) -> str:
    """The weather.

    Args:
        city: where
        days: how many
    """
    return f"{city}: {days}"


@pytest.fixture
def client(url):
    return ollama.Client(url)


@pytest.fixture
def scripted_client(scripted):
    def start(*answers, **options):
        http, service = scripted(*answers, **options)
        return ollama.Client(str(http.base_url)), service
    return start


def digits(text):
    return "".join(char for char in text if char.isdigit())


# With the bundled model


def test_the_bundled_model_solves_a_puzzle_for_ollamas_client(client, model):
    answer = client.chat("sudoku", [{"role": "user", "content": PUZZLE}], options={"seed": 1})
    direct = model.generate(PUZZLE, seed=1)
    assert answer.message.content == direct.text and digits(direct.text) == SOLUTION
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (direct.prompt_tokens, len(direct.token_ids))
    assert answer.total_duration >= answer.eval_duration > 0 and answer.prompt_eval_duration > 0


def test_generate_and_a_stream_say_the_same(client):
    whole = client.generate("sudoku:latest", PUZZLE, options={"seed": 1})
    lines = list(client.generate("sudoku", PUZZLE, options={"seed": 1}, stream=True))
    assert digits(whole.response) == SOLUTION
    assert "".join(line.response for line in lines) == whole.response
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == whole.eval_count


def test_a_raw_prompt_stays_as_it_is_and_a_system_prompt_goes_before(client, model):
    raw = client.generate("sudoku", "12", raw=True, options={"num_predict": 1, "seed": 2})
    assert raw.prompt_eval_count == 1 + len(model.tokenizer.encode("12"))  # behind <bos>
    said = client.generate("sudoku", "12", system="Be brief", options={"num_predict": 1, "seed": 2})
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "12"}]
    assert said.prompt_eval_count == len(model.prompt_ids(messages))


def test_options_reach_the_sampler(client):
    once = client.chat("sudoku", HELLO, options={"num_predict": 3, "seed": 5, "max_denoising_steps": 2})
    again = client.chat("sudoku", HELLO, options={"num_predict": 3, "seed": 5, "max_denoising_steps": 2,
                                                  "num_ctx": 4096, "repeat_penalty": 1.1, "num_gpu": 99})
    assert once.message.content == again.message.content
    assert (once.eval_count, once.done_reason) == (3, "length")
    assert client.chat("sudoku", HELLO, options={"num_predict": -1, "seed": -1, "temperature": 0}).done


def test_the_format_is_kept(client):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}
    answer = client.chat("sudoku", HELLO, format=schema, options={"seed": 1})
    assert isinstance(json.loads(answer.message.content)["yes"], bool)
    json.loads(client.generate("sudoku", "Hello", format="json", options={"seed": 1, "num_predict": 60}).response)


# What models there are


def test_the_model_is_listed_shown_and_running(client, model):
    listed = client.list().models
    assert [entry.model for entry in listed] == ["sudoku", "alias"]
    assert listed[0].size == sum(weight.nbytes for weight in model.network.parameters())
    assert listed[0].details.family == "diffusion-gemma" and listed[0].details.quantization_level == "F32"
    assert len(listed[0].digest) == 64
    running = client.ps().models[0]
    assert (running.model, running.context_length, running.size_vram) == ("sudoku", 8192, 0)
    shown = client.show("sudoku:latest")
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)
    assert shown.modelinfo["diffusion-gemma.context_length"] == 8192
    assert shown.modelinfo["general.parameter_count"] == sum(
        weight.numel() for weight in model.network.state_dict().values())
    assert "max_denoising_steps 48" in shown.parameters and "<|turn>" in shown.template


def test_clients_that_look_for_ollama_find_it(http):
    assert http.get("/").text.startswith("Ollama is running")
    assert http.head("/").status_code == 200
    assert tuple(map(int, http.get("/api/version").json()["version"].split("."))) >= (0, 12, 6)


def test_a_prompt_of_nothing_loads_the_model(client, http):
    assert client.generate("sudoku").done_reason == "load"
    assert client.chat("sudoku").done_reason == "load"
    assert client.generate("sudoku", keep_alive=0).done_reason == "unload"
    assert http.post("/api/generate", json={"model": "sudoku", "stream": True}).json()["done"] is True


# Thoughts and tools


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_calls_and_text_come_apart(scripted_client, stream):
    client, service = scripted_client(THOUGHT + "Let me look." + CALL)
    answer = client.chat("sudoku", HELLO, tools=[weather], think=True, stream=stream)
    lines = list(answer) if stream else [answer]
    assert "".join(line.message.thinking or "" for line in lines) == "hm"
    assert "".join(line.message.content or "" for line in lines) == "Let me look."
    calls = [call for line in lines for call in line.message.tool_calls or ()]
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Paris", "days": 3})]
    assert lines[-1].done_reason == "stop"
    prompt = service.model.tokenizer.decode(service.requests[0].prompt_ids)
    assert "<|think|>" in prompt and "declaration:weather" in prompt


@pytest.mark.parametrize(("think", "thinks"), [(None, False), (False, False), ("none", False), ("high", True)])
def test_thinking_is_a_switch_or_a_level(scripted_client, think, thinks):
    client, service = scripted_client("Yes.")
    client.chat("sudoku", HELLO, think=think)
    assert ("<|think|>" in service.model.tokenizer.decode(service.requests[0].prompt_ids)) is thinks


@pytest.mark.parametrize("answers", [[{"tool_name": "weather"}], [{}], [{"tool_name": "gone"}]])
def test_a_tools_answer_finds_its_call(scripted_client, answers):
    client, service = scripted_client("Rain.")
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    client.chat("sudoku", [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]},
                           *({"role": "tool", "content": "rain", **answer} for answer in answers)], tools=[weather])
    prompt = service.model.tokenizer.decode(service.requests[0].prompt_ids)
    assert f"response:{answers[0].get('tool_name', 'weather')}" in prompt and "call:weather" in prompt


def test_json_need_not_be_called_json(http):
    body = json.dumps({"model": "sudoku", "prompt": "1", "stream": False, "options": {"num_predict": 2}})
    for kind in ("application/x-www-form-urlencoded", "text/plain", None):
        headers = {} if kind is None else {"Content-Type": kind}
        assert http.post("/api/generate", content=body, headers=headers).json()["done"] is True


# What cannot be


def test_errors_have_ollamas_form(scripted_client, scripted):
    client, _ = scripted_client("Hello")
    for call, status in ((lambda: client.chat("nobody", HELLO), 404),
                         (lambda: client.show("nobody"), 404),
                         (lambda: client.generate("sudoku", "x", suffix="y"), 400),
                         (lambda: client.generate("sudoku", "x", images=[b"\x89PNG"]), 400),
                         (lambda: client.chat("sudoku", [{"role": "user", "content": "x", "images": [b"\x89"]}]), 400),
                         (lambda: client.chat("sudoku", HELLO, options={"temperature": "hot"}), 400),
                         (lambda: client.pull("sudoku"), 404), (lambda: client.embed("sudoku", "x"), 404)):
        with pytest.raises(ollama.ResponseError) as error:
            call()
        assert error.value.status_code == status and error.value.error, error.value
    http, _ = scripted(Overloaded("too many", 2.0))
    refused = http.post("/api/chat", json={"model": "sudoku", "messages": HELLO})
    assert (refused.status_code, list(refused.json())) == (429, ["error"])


def test_an_answer_that_breaks_ends_its_stream_with_an_error(scripted_client):
    client, _ = scripted_client(RuntimeError("broken"))
    with pytest.raises(ollama.ResponseError, match="could not finish"):
        list(client.chat("sudoku", HELLO, stream=True))
    with pytest.raises(ollama.ResponseError, match="could not finish"):
        client.chat("sudoku", HELLO)


def test_log_probabilities_come_when_asked_for(client):
    answer = client.chat("sudoku", HELLO, logprobs=True, top_logprobs=2, options={"num_predict": 4, "seed": 1})
    assert len(answer.logprobs) == 4
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in answer.logprobs)
    assert client.chat("sudoku", HELLO, options={"num_predict": 4, "seed": 1}).logprobs is None


# What every other route takes, under whatever name


def ask(http, path, **fields):
    body = {"model": "sudoku", "stream": False} | (
        {"messages": HELLO} if path == "/api/chat" else {"prompt": "Hello"})
    return http.post(path, json=body | fields)


SCHEMA = {"type": "object", "properties": {"a": {"enum": [3, 4]}}, "required": ["a"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"],
    "additionalProperties": False}}}


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("fields", [
    {"format": SCHEMA}, {"guided_json": SCHEMA}, {"json_schema": SCHEMA}, {"structured_outputs": {"json": SCHEMA}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, {"response_schema": SCHEMA},
    {"format": {"type": "json_schema", "schema": SCHEMA}}])
def test_a_form_under_any_name_is_kept(http, path, fields):
    answer = ask(http, path, max_denoising_steps=8, **fields).json()
    assert json.loads(answer.get("response") or answer["message"]["content"])["a"] in (3, 4)


def test_settings_stand_in_options_or_beside_them(scripted):
    http, service = scripted("Hello")
    for fields in ({"options": {"seed": 5, "num_predict": 7, "stop": ["x"]}}, {"seed": 5, "max_tokens": 7, "stop": "x"},
                   {"seed": 1, "options": {"seed": 5, "num_predict": 7.0, "stop": ["x"]}}):
        assert ask(http, "/api/chat", **fields).status_code == 200
        request = service.requests[-1]
        assert (request.seed, request.settings.max_tokens, request.stop) == (5, 7, ("x",)), fields
    for limit in (-1, -2, 0, 10**30):
        assert ask(http, "/api/generate", options={"num_predict": limit}).status_code == 200
        assert service.requests[-1].settings.max_tokens > 8000
    ask(http, "/api/chat", cache_salt="mine", user="ann")
    assert (service.requests[-1].tenant, service.requests[-1].user) == ("/mine", "ann")


def test_a_tool_is_called_when_it_must_be_and_held_to_its_schema(http, scripted):
    answer = ask(http, "/api/chat", tools=[WEATHER], tool_choice="required", options={"num_predict": 60}).json()
    assert {call["function"]["name"] for call in answer["message"]["tool_calls"]} == {"weather"}
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    scripted_http, service = scripted(CALL, CALL)
    assert ask(scripted_http, "/api/chat", tools=[WEATHER]).status_code == 200
    assert service.requests[-1].held  # for it is strict
    said = ask(scripted_http, "/api/chat", tools=[WEATHER], tool_choice="none").json()["message"]
    assert "tool_calls" not in said and said["content"] == CALL


def test_what_cannot_be_meant_is_refused_as_elsewhere(http):
    for path, fields, named in (
            ("/api/chat", {"think": "banana"}, "think"), ("/api/chat", {"top_logprobs": 2}, "top_logprobs"),
            ("/api/generate", {"raw": True, "think": True}, "think"), ("/api/generate", {"tools": [WEATHER]}, "tools"),
            ("/api/generate", {"raw": True, "system": "x"}, "system"), ("/api/chat", {"n": "x"}, "n")):
        answer = ask(http, path, **fields)
        assert answer.status_code == 400 and named in answer.json()["error"], (fields, answer.text)
