"""Anthropic's Messages API, held to Anthropic's own client."""

import json

import anthropic
import httpx2 as httpx
import pytest

from dgemma.engine.service import Overloaded
from dgemma.serve.settings import Settings
from support.scripted_service import eventually

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"name": "weather", "description": "The weather somewhere", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'


def client_of(url):
    return anthropic.Anthropic(api_key="none", base_url=url, max_retries=0)


@pytest.fixture
def serve(scripted):
    """A function: answers of a scripted service -> (client of a server with that service, the service)."""
    def start(*answers, **options):
        http, service = scripted(*answers, settings=Settings(("sudoku", "alias"), ping=0.05), **options)
        return client_of(str(http.base_url).rstrip("/")), service
    return start


def create(client, **fields):
    return client.messages.create(**{"model": "sudoku", "max_tokens": 100, "messages": HELLO, **fields})


def test_an_answer_is_a_text_block_with_honest_counts(serve):
    client, service = serve(["Hel", "lo there"], cached_tokens=3)
    answer = create(client)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Hello there"
    assert (answer.model, answer.role, answer.stop_reason, answer.stop_sequence) == (
        "sudoku", "assistant", "end_turn", None)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(service.requests[0].prompt_ids)
    assert usage.cache_read_input_tokens == 3
    assert usage.output_tokens == len("Hello there")  # the bundled tokenizer's tokens are bytes


def test_a_stream_has_the_events_that_the_api_documents(serve):
    client, _ = serve(["Hel", "lo"])
    events = list(create(client, stream=True))
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == "Hello"
    assert events[0].message.content == [] and events[0].message.stop_reason is None


@pytest.mark.parametrize("script", [
    "plain", ["in ", "two"], f"I look.{CALL}", f"{CALL}{CALL}", "<|channel>thought\nhm<channel|>So.", ""])
def test_a_streamed_answer_is_the_answer_that_is_not_streamed(serve, script):
    client, _ = serve(script)
    whole = create(client, tools=[WEATHER])
    with client.messages.stream(model="sudoku", max_tokens=100, messages=HELLO, tools=[WEATHER]) as stream:
        streamed = stream.get_final_message()
    left_out = {"id": True, "content": {"__all__": {"id"}}}
    assert streamed.model_dump(exclude=left_out) == whole.model_dump(exclude=left_out)


def test_thoughts_are_a_block_before_the_text(serve):
    client, service = serve("<|channel>thought\nfirst this\n<channel|>Then that.")
    answer = create(client, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking.strip() == "first this"
    assert answer.content[1].text == "Then that."
    assert answer.usage.output_tokens_details.thinking_tokens > 0
    assert "<|think|>" in service.model.tokenizer.decode(service.requests[0].prompt_ids)


def test_thoughts_can_be_left_out(serve):
    client, _ = serve("<|channel>thought\nsecret<channel|>Then that.")
    answer = create(client, thinking={"type": "adaptive", "display": "omitted"})
    assert "secret" not in answer.model_dump_json()
    assert answer.content[-1].text == "Then that."


def test_the_model_does_not_think_unless_it_is_asked_to(serve):
    client, service = serve("x")
    create(client)
    create(client, thinking={"type": "disabled"})
    assert all("<|think|>" not in service.model.tokenizer.decode(request.prompt_ids) for request in service.requests)


def test_a_tool_is_called_and_its_result_read(serve):
    client, service = serve(f"I look.{CALL}", "Sunny.")
    first = create(client, tools=[WEATHER], tool_choice={"type": "auto"})
    assert first.stop_reason == "tool_use"
    said, call = first.content
    assert (said.text, call.name, call.input) == ("I look.", "weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sun, 30 degrees"}]}
    second = create(client, tools=[WEATHER], messages=[
        *HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}])
    assert (second.content[0].text, second.stop_reason) == ("Sunny.", "end_turn")
    prompt = service.model.tokenizer.decode(service.requests[1].prompt_ids)
    assert f"I look.{CALL}" in prompt
    assert prompt.endswith('<|tool_response>response:weather{value:<|"|>sun, 30 degrees<|"|>}<tool_response|>')


def test_a_tool_that_failed_is_shown_as_an_error(serve):
    client, service = serve("x")
    create(client, messages=[
        *HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "no net", "is_error": True},
                                     {"type": "text", "text": "And now?"}]}])
    prompt = service.model.tokenizer.decode(service.requests[0].prompt_ids)
    assert 'response:weather{error:<|"|>no net<|"|>}<tool_response|>' in prompt
    assert "<|turn>user\nAnd now?<turn|>" in prompt


def test_a_streamed_call_comes_as_json(serve):
    client, _ = serve(CALL)
    with client.messages.stream(model="sudoku", max_tokens=100, messages=HELLO, tools=[WEATHER]) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        assert "".join(parts) == '{"city": "Paris"}'
        assert stream.get_final_message().content[0].input == {"city": "Paris"}


def test_without_a_choice_the_model_is_not_told_of_tools(serve):
    client, service = serve('{"name": "weather", "arguments": {"city": "Paris"}}')
    answer = create(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]  # what reads like a call is none then
    assert "weather" not in service.model.tokenizer.decode(service.requests[0].prompt_ids)


def test_one_call_at_a_time_if_asked_for(serve):
    client, _ = serve(f"{CALL}{CALL}")
    answer = create(client, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in answer.content] == ["tool_use"]


def test_the_system_prompt_may_be_blocks(serve):
    client, service = serve("x")
    create(client, system="Be brief.")
    create(client, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    assert service.requests[0].prompt_ids == service.requests[1].prompt_ids
    assert "<|turn>system\nBe brief.<turn|>" in service.model.tokenizer.decode(service.requests[0].prompt_ids)


def test_a_stop_sequence_is_named(serve):
    client, service = serve("one STOP two")
    answer = create(client, stop_sequences=["STOP"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("one ", "stop_sequence", "STOP")
    assert service.requests[0].stop == ("STOP",)


def test_an_answer_that_was_cut_says_what_cut_it(serve):
    client, _ = serve("abc", finish="length")
    assert create(client, max_tokens=3).stop_reason == "max_tokens"
    assert create(client, max_tokens=50).stop_reason == "model_context_window_exceeded"


def test_settings_reach_the_engine(serve):
    client, service = serve("x")
    create(client, max_tokens=12, extra_body={  # today's client has no names for these
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 5, "entropy_bound": 0.3})
    request = service.requests[0]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.5, 7, 0.9)
    assert (request.settings.max_tokens, request.settings.entropy_bound, request.seed) == (12, 0.3, 5)


def test_a_limit_beyond_the_context_is_the_context(serve, model):
    client, service = serve("x")
    list(create(client, max_tokens=1_000_000, stream=True))  # the client wants a long answer streamed
    request = service.requests[0]
    assert len(request.prompt_ids) + request.settings.max_tokens == model.config.max_position_embeddings


def test_a_user_has_a_place_of_his_own_in_the_queue(serve):
    client, service = serve("x")
    create(client, metadata={"user_id": "ann"})
    create(client, metadata={"user_id": "bob"})
    assert [request.user for request in service.requests] == ["ann", "bob"]
    assert service.requests[0].client == service.requests[1].client  # whatever the names, one client's turns


@pytest.mark.parametrize(("fields", "named"), [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
     "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}]},
     "messages[0].content[1].text"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "Once"}]}, "messages[1]"),
    ({"messages": [{"role": "robot", "content": "Once"}]}, "messages[0]"),
    ({"messages": []}, "messages"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"extra_body": {"temperature": -1}}, "temperature"),
    ({"thinking": {"type": "between_tools"}}, "thinking"),
    ({"extra_body": {"entropy_bound": -1}}, "entropy_bound"),
    ({"extra_body": {"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}}, "mcp_servers"),
])
def test_what_cannot_be_honoured_is_named(serve, fields, named):
    client, service = serve("x")
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(client, **fields)
    assert refused.value.type == "invalid_request_error"
    assert named in refused.value.api_message
    assert not service.requests


def test_an_unknown_model_is_not_found(serve):
    client, _ = serve("x")
    with pytest.raises(anthropic.NotFoundError) as refused:
        create(client, model="claude")
    assert refused.value.type == "not_found_error"
    assert create(client, model="alias").model == "alias"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_when_to_come_back(serve, stream):
    client, _ = serve(Overloaded("busy", 7.0))
    with pytest.raises(anthropic.RateLimitError) as refused:
        create(client, stream=stream)
    assert refused.value.response.headers["retry-after"] == "7"
    assert refused.value.type == "rate_limit_error"


def test_a_request_that_breaks_is_an_error_whole_or_in_its_stream(serve):
    client, _ = serve(RuntimeError("out of cheese"))
    with pytest.raises(anthropic.InternalServerError, match="log says why"):
        create(client)
    with pytest.raises(anthropic.APIStatusError, match="log says why"):
        list(create(client, stream=True))


def test_an_answer_that_the_server_cut_off_is_an_error(serve):
    client, _ = serve("half", finish="cancelled")
    with pytest.raises(anthropic.APIStatusError) as refused:
        create(client)
    assert refused.value.type == "overloaded_error"
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        list(create(client, stream=True))


def test_a_slow_stream_is_kept_alive(serve):
    client, _ = serve("x", seconds=0.3)
    with httpx.stream("POST", client.base_url.join("/v1/messages"), json={
            "model": "sudoku", "max_tokens": 10, "messages": HELLO, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert "event: ping" in lines[1:-1]
    assert lines[0] == "event: message_start" and lines[-1] == "event: message_stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_the_request(serve, stream):
    client, service = serve(["a", "b"], seconds=1)
    body = {"model": "sudoku", "max_tokens": 10, "messages": HELLO, "stream": stream}
    with pytest.raises(httpx.TimeoutException):
        post_and_leave(client.base_url.join("/v1/messages"), body)
    assert eventually(lambda: service.closed == 1)


def post_and_leave(url, body):
    with httpx.Client(timeout=0.3) as connection, connection.stream("POST", url, json=body):
        raise httpx.ReadTimeout("enough")


def test_both_ways_to_send_a_key_are_known(scripted):
    http, _ = scripted(settings=Settings(("sudoku",), api_keys=("secret",)))
    body = {"model": "sudoku", "max_tokens": 10, "messages": HELLO}
    for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
        assert http.post("/v1/messages", json=body, headers=headers).status_code == 200
    refused = http.post("/v1/messages", json=body, headers={"x-api-key": "wrong"})
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error" and refused.json()["type"] == "error"


def test_counting_tokens_counts_the_prompt_that_would_be_run(serve):
    client, service = serve("x")
    fields = {"system": "Be brief.", "tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    create(client, **fields)
    count = client.messages.count_tokens(model="sudoku", messages=HELLO, **fields)
    assert count.input_tokens == len(service.requests[0].prompt_ids)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]"):
        client.messages.count_tokens(model="sudoku", messages=[{"role": "robot", "content": "x"}])


def test_the_bundled_model_answers_in_the_form_of_a_schema(url):
    schema = {"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"],
              "additionalProperties": False}
    answer = create(client_of(url), output_config={"format": {"type": "json_schema", "schema": schema}})
    assert isinstance(json.loads(answer.content[0].text)["people"], int)
    with pytest.raises(anthropic.BadRequestError, match="colour"):
        create(client_of(url), output_config={"format": {"type": "json_schema", "schema": {"type": "colour"}}})


def test_the_bundled_model_answers(model, url):
    client = client_of(url)
    asked = {"messages": [{"role": "user", "content": PUZZLE}], "extra_body": {"seed": 1}}
    expected = model.generate(PUZZLE, seed=1)
    answer = create(client, **asked)
    assert answer.content[0].text == expected.text
    assert answer.usage.output_tokens == len(expected.token_ids)
    with client.messages.stream(model="sudoku", max_tokens=100, **asked) as stream:
        assert "".join(stream.text_stream) == expected.text
