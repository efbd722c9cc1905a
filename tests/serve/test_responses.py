"""OpenAI's Responses API, held to OpenAI's own client."""

import json

import httpx2 as httpx
import openai
import pydantic
import pytest

from dgemma.diffusion.events import TokenLogprob
from dgemma.engine.service import Overloaded
from dgemma.serve.settings import Settings
from support.scripted_service import eventually

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
WEATHER = {"type": "function", "name": "weather", "description": "The weather somewhere", "strict": True,
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                          "additionalProperties": False}}
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nfirst this\n<channel|>"


class City(pydantic.BaseModel):
    name: str
    people: int


def client_of(url):
    return openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


@pytest.fixture
def serve(scripted):
    """A function: answers of a scripted service -> (client of a server with that service, the service)."""
    def start(*answers, **options):
        http, service = scripted(*answers, settings=Settings(("sudoku", "alias"), ping=0.05), **options)
        return client_of(str(http.base_url).rstrip("/")), service
    return start


def create(client, **fields):
    return client.responses.create(**{"model": "sudoku", "input": "Hello", **fields})


def prompts(service):
    return [service.model.tokenizer.decode(request.prompt_ids) for request in service.requests]


def test_an_answer_is_a_message_with_honest_counts(serve):
    client, service = serve(["Hel", "lo there"], cached_tokens=3)
    answer = create(client)
    assert (answer.status, answer.output_text, answer.model) == ("completed", "Hello there", "sudoku")
    assert [item.type for item in answer.output] == ["message"]
    usage = answer.usage
    assert usage.input_tokens == len(service.requests[0].prompt_ids)
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.output_tokens == len("Hello there")  # the bundled tokenizer's tokens are bytes
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_stream_has_the_events_that_the_api_documents(serve):
    client, _ = serve([f"{THOUGHT}Then", " that.", CALL])
    events = list(create(client, stream=True, tools=[WEATHER]))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert [name for name in names if not name.endswith(".delta")] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.done", "output_item.done",
        "completed"]
    said = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in said) == "Then that."
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [item.id for item in events[-1].response.output]
    assert {event.item_id for event in said} == {added[1].id}


@pytest.mark.parametrize("script", ["plain", ["in ", "two"], f"I look.{CALL}", f"{CALL}{CALL}", f"{THOUGHT}So.", ""])
def test_a_streamed_answer_is_the_answer_that_is_not_streamed(serve, script):
    client, _ = serve(script)
    asked = {"model": "sudoku", "input": "Hello", "tools": [WEATHER], "extra_body": {"seed": 1}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    changing = {"id", "created_at", "completed_at", "call_id", "parsed", "parsed_arguments"}
    assert streamed.output_text == whole.output_text
    assert without(changing, streamed.model_dump()) == without(changing, whole.model_dump())


def without(keys, value):
    if isinstance(value, dict):
        return {key: without(keys, item) for key, item in value.items() if key not in keys}
    return [without(keys, item) for item in value] if isinstance(value, list) else value


def test_thoughts_are_an_item_before_the_message(serve):
    client, service = serve(f"{THOUGHT}Then that.")
    answer = create(client, reasoning={"effort": "medium"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text.strip() == "first this"
    assert answer.output_text == "Then that."
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.reasoning.effort == "medium"
    assert "<|think|>" in prompts(service)[0]


@pytest.mark.parametrize("reasoning", [None, {}, {"effort": "none"}])
def test_the_model_does_not_think_unless_it_is_asked_to(serve, reasoning):
    client, service = serve("x")
    create(client, reasoning=reasoning)
    assert "<|think|>" not in prompts(service)[0]


def test_a_function_is_called_and_its_output_read(serve):
    client, service = serve(f"{THOUGHT}I look.{CALL}", "Sunny.")
    asked = [{"role": "user", "content": "Hello"}]
    first = create(client, input=asked, tools=[WEATHER], reasoning={"effort": "low"})
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Paris"})
    second = create(client, tools=[WEATHER], input=[
        *asked, *first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}])
    assert (second.output_text, second.status) == ("Sunny.", "completed")
    assert prompts(service)[1].endswith(
        f'I look.{CALL}<|tool_response>response:weather{{value:<|"|>sun<|"|>}}<tool_response|>')


def test_calls_in_parallel_are_one_turn(serve):
    client, service = serve(f"{CALL}{CALL}", "Sunny.")
    first = create(client, tools=[WEATHER])
    assert [item.type for item in first.output] == ["function_call"] * 2
    outputs = [{"type": "function_call_output", "call_id": item.call_id,
                "output": [{"type": "input_text", "text": "sun"}]} for item in first.output]
    create(client, tools=[WEATHER], input=[{"role": "user", "content": "Hello"}, *first.output, *outputs])
    assert f"<|turn>model\n{CALL}{CALL}<|tool_response>" in prompts(service)[1]


def test_one_call_at_a_time_if_asked_for(serve):
    client, _ = serve(f"{CALL}{CALL}")
    answer = create(client, tools=[WEATHER], parallel_tool_calls=False)
    assert [item.type for item in answer.output] == ["function_call"]
    assert answer.parallel_tool_calls is False


def test_what_reads_like_a_call_of_a_tool_that_is_not_allowed_is_text(serve):
    client, _ = serve('{"name": "weather", "arguments": {"city": "Paris"}}')
    assert [item.type for item in create(client, tools=[WEATHER]).output] == ["function_call"]
    assert [item.type for item in create(client, tools=[WEATHER], tool_choice="none").output] == ["message"]


def test_only_allowed_tools_are_told_of(serve):
    client, service = serve("x")
    create(client, tools=[WEATHER], tool_choice="none")
    create(client, tools=[WEATHER, {**WEATHER, "name": "clock"}], tool_choice={
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]})
    assert "weather" not in prompts(service)[0]
    assert "declaration:clock" in prompts(service)[1] and "declaration:weather" not in prompts(service)[1]


def test_input_may_be_items_and_instructions_are_a_system_turn(serve):
    client, service = serve("x")
    create(client, input="Hello", instructions="Be brief.")
    create(client, instructions="Be brief.", input=[
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}])
    create(client, input=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert len(set(prompts(service))) == 1
    assert "<|turn>system\nBe brief.<turn|>" in prompts(service)[0]


def test_an_earlier_answer_can_be_sent_back_as_it_came(serve):
    client, service = serve("First.", "Second.")
    asked = [{"role": "user", "content": "Hello"}]
    first = create(client, input=asked)
    create(client, input=[*asked, *first.output, {"role": "user", "content": "More"}])
    assert "<|turn>model\nFirst.<turn|>\n<|turn>user\nMore<turn|>" in prompts(service)[1]


def test_a_schema_is_asked_of_the_engine_and_its_answer_parsed(serve, monkeypatch):
    asked = []
    client, service = serve('{"name":"Rome","people":3}')
    request = service.model.request

    def noting(prompt, response_format=None, **options):  # the schema's effect is the engine's matter, not this test's
        asked.append(response_format)
        return request(prompt, **options)
    monkeypatch.setattr(service.model, "request", noting)
    answer = client.responses.parse(model="sudoku", input="A city", text_format=City)
    assert answer.output_parsed == City(name="Rome", people=3)
    assert asked[0]["type"] == "json_schema"
    assert set(asked[0]["json_schema"]["schema"]["properties"]) == {"name", "people"}


def test_log_probabilities_stand_beside_the_text(serve):
    client, service = serve("ab")
    service.logprobs = [TokenLogprob(token, -0.5, [(token, -0.5)]) for token in service.model.tokenizer.encode("ab")]
    answer = create(client, include=["message.output_text.logprobs"], top_logprobs=1)
    entries = answer.output[0].content[0].logprobs
    assert [(entry.token, entry.logprob, entry.top_logprobs[0].token) for entry in entries] == [
        ("a", -0.5, "a"), ("b", -0.5, "b")]
    assert service.requests[0].logprobs == 1


def test_an_answer_that_was_cut_is_incomplete(serve):
    client, _ = serve("abc", finish="length")
    answer = create(client, max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output_text, answer.output[0].status) == ("abc", "incomplete")
    assert list(create(client, stream=True))[-1].type == "response.incomplete"


def test_settings_reach_the_engine(serve):
    client, service = serve("x")
    create(client, temperature=0.5, top_p=0.9, max_output_tokens=12, user="ann",
           extra_body={"seed": 5, "top_k": 7, "entropy_bound": 0.3})
    create(client, user="bob")
    request, other = service.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.5, 7, 0.9)
    assert (request.settings.max_tokens, request.settings.entropy_bound, request.seed) == (12, 0.3, 5)
    assert (request.user, other.user) == ("ann", "bob")


def test_what_asks_for_nothing_that_is_missing_is_accepted(serve):
    client, _ = serve("x")
    answer = create(client, store=True, metadata={"a": "b"}, service_tier="auto", truncation="disabled",
                    prompt_cache_key="k", safety_identifier="s", text={"verbosity": "low"},
                    include=["reasoning.encrypted_content"])
    assert answer.metadata == {"a": "b"}
    assert answer.model_extra["store"] is False  # nothing is stored, whatever was asked for


@pytest.mark.parametrize(("fields", "param"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
    ({"input": []}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"extra_body": {"entropy_bound": -1}}, "entropy_bound"),
])
def test_what_cannot_be_honoured_is_named(serve, fields, param):
    client, service = serve("x")
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **fields)
    assert refused.value.param == param
    assert not service.requests


def test_an_unknown_model_is_not_found(serve):
    client, _ = serve("x")
    with pytest.raises(openai.NotFoundError) as refused:
        create(client, model="gpt")
    assert refused.value.param == "model"
    assert create(client, model="alias").model == "alias"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_when_to_come_back(serve, stream):
    client, _ = serve(Overloaded("busy", 7.0))
    with pytest.raises(openai.RateLimitError) as refused:
        create(client, stream=stream)
    assert refused.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize(("answer", "options", "message"), [
    (RuntimeError("out of cheese"), {}, "log says why"), ("half", {"finish": "cancelled"}, "cut off")])
def test_a_request_that_breaks_is_an_error_whole_or_in_its_stream(serve, answer, options, message):
    client, _ = serve(answer, **options)
    with pytest.raises(openai.InternalServerError, match=message):
        create(client)
    last = list(create(client, stream=True))[-1]
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert message in last.response.error.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_request(serve, stream):
    client, service = serve(["a", "b"], seconds=1)
    body = {"model": "sudoku", "input": "Hello", "stream": stream}
    with pytest.raises(httpx.TimeoutException):
        post_and_leave(client.base_url.join("/v1/responses"), body)
    assert eventually(lambda: service.closed == 1)


def post_and_leave(url, body):
    with httpx.Client(timeout=0.3) as connection, connection.stream("POST", url, json=body):
        raise httpx.ReadTimeout("enough")


def test_the_bundled_model_answers_in_the_form_of_a_schema(url):
    answer = client_of(url).responses.parse(model="sudoku", input="A city", text_format=City, max_output_tokens=200)
    assert isinstance(answer.output_parsed, City)
    with pytest.raises(openai.BadRequestError) as refused:
        create(client_of(url), text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "colour"}}})
    assert refused.value.param == "text.format"


def test_the_bundled_model_answers(model, url):
    client = client_of(url)
    expected = model.generate(PUZZLE, seed=1)
    asked = {"model": "sudoku", "input": PUZZLE, "extra_body": {"seed": 1}}
    answer = client.responses.create(**asked)
    assert answer.output_text == expected.text
    assert answer.usage.output_tokens == len(expected.token_ids)
    with client.responses.stream(**asked) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == expected.text
