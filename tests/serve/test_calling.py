"""Calls that must be made, through the clients that ask for them: the bundled model writes nonsense, but valid."""

import json

import anthropic
import httpx2 as httpx
import jsonschema
import openai
import pytest

LOOK = {"type": "object", "required": ["city", "days"], "additionalProperties": False, "properties": {
    "city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}
NOW = {"type": "object", "properties": {}}
SCHEMAS = {"look": LOOK, "now": NOW}
FORM = {"type": "object", "required": ["ok"], "additionalProperties": False, "properties": {"ok": {"type": "boolean"}}}
CHAT = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
FLAT = [{"type": "function", "name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
BLOCKS = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
HELLO = [{"role": "user", "content": "Hello"}]
FAST = {"max_denoising_steps": 3}


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def check(calls):
    """Calls as (name, arguments) pairs: valid ones, and at least one."""
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments) if isinstance(arguments, str) else arguments, SCHEMAS[name])
    return [name for name, _ in calls]


def chat(client, **fields):
    return client.chat.completions.create(model="sudoku", messages=HELLO, max_tokens=180, seed=1, tools=CHAT,
                                          extra_body={**FAST, **fields.pop("extra_body", {})}, **fields)


@pytest.mark.parametrize(("choice", "names"), [
    ("required", {"look", "now"}), ({"type": "function", "function": {"name": "look"}}, {"look"}),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "look"}}]}}, {"look"})])
def test_chat_makes_the_call(client, choice, names):
    answer = chat(client, tool_choice=choice).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert set(check([(call.function.name, call.function.arguments) for call in answer.message.tool_calls])) <= names


def test_chat_streams_the_call(client):
    made, reason = {}, None
    for chunk in chat(client, tool_choice="required", parallel_tool_calls=False, stream=True):
        choice = chunk.choices[0]
        assert not choice.delta.content
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            name, arguments = made.get(call.index, ("", ""))
            made[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
    assert (len(made), reason) == (1, "tool_calls")
    check(list(made.values()))


def test_chats_form_beside_tools_is_a_call_or_the_form(client, model):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": FORM}}
    mark = str(model.tokenizer.token_to_id("<|tool_call>"))
    for bias, choice in ((100, None), (-100, "auto"), (0, "none"), (0, "required")):
        answer = chat(client, response_format=form, logit_bias={mark: bias},
                      **({} if choice is None else {"tool_choice": choice})).choices[0]
        called = bool(answer.message.tool_calls)
        assert called == (bias == 100 or choice == "required")
        if called:
            check([(call.function.name, call.function.arguments) for call in answer.message.tool_calls])
        else:
            jsonschema.validate(json.loads(answer.message.content), FORM)
        assert answer.finish_reason == ("tool_calls" if called else "stop")


def test_responses_make_the_call(client):
    for choice, names in (("required", {"look", "now"}), ({"type": "function", "name": "look"}, {"look"}),
                          ({"type": "allowed_tools", "mode": "required", "tools": [
                              {"type": "function", "name": "now"}]}, {"now"})):
        answer = client.responses.create(model="sudoku", input="Hello", tools=FLAT, tool_choice=choice,
                                         max_output_tokens=180, extra_body={"seed": 1, **FAST})
        assert {item.type for item in answer.output} == {"function_call"}
        assert set(check([(item.name, item.arguments) for item in answer.output])) <= names
        assert answer.status == "completed"


def test_responses_form_beside_tools_is_a_call_or_the_form(client):
    for choice in ("auto", "none"):
        answer = client.responses.create(
            model="sudoku", input="Hello", tools=FLAT, tool_choice=choice, max_output_tokens=180,
            text={"format": {"type": "json_schema", "name": "a", "schema": FORM}}, extra_body={"seed": 1, **FAST})
        calls = [(item.name, item.arguments) for item in answer.output if item.type == "function_call"]
        if calls:
            check(calls)
            assert choice == "auto"
        else:
            jsonschema.validate(json.loads(answer.output_text), FORM)


@pytest.mark.parametrize(("choice", "names"), [({"type": "any"}, {"look", "now"}),
                                               ({"type": "tool", "name": "look"}, {"look"}),
                                               ({"type": "any", "disable_parallel_tool_use": True}, {"look", "now"})])
def test_messages_make_the_call(claude, choice, names):
    fields = {"model": "sudoku", "messages": HELLO, "max_tokens": 180, "tools": BLOCKS, "tool_choice": choice,
              "extra_body": {"seed": 1, **FAST}}
    answer = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    for made in (answer, streamed):
        assert made.stop_reason == "tool_use"
        assert {block.type for block in made.content} == {"tool_use"}
        assert set(check([(block.name, block.input) for block in made.content])) <= names
        assert len(made.content) == 1 or not choice.get("disable_parallel_tool_use")


def test_messages_form_beside_tools_is_a_call_or_the_form(claude):
    answer = claude.messages.create(
        model="sudoku", messages=HELLO, max_tokens=180, tools=BLOCKS,
        extra_body={"seed": 1, "output_config": {"format": {"type": "json_schema", "schema": FORM}}, **FAST})
    calls = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
    if calls:
        check(calls)
    else:
        jsonschema.validate(json.loads(answer.content[0].text), FORM)


def test_strict_tools_are_held_to_their_schema_when_the_model_calls_by_itself(client, model):
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in CHAT]
    mark = str(model.tokenizer.token_to_id("<|tool_call>"))
    generation = model.generate(HELLO, max_tokens=90, seed=1, tools=tools, logit_bias={
        int(mark): 100.0, 1: -1e6, 50: -1e6, 106: -1e6}, **FAST)
    check([(call["name"], call["arguments"]) for call in generation.tool_calls])
    plain = client.chat.completions.create(model="sudoku", messages=HELLO, max_tokens=90, seed=1, tools=tools,
                                           logit_bias={mark: -100}).choices[0]
    assert plain.message.content
    assert not plain.message.tool_calls


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "x": {"$ref": "#/nowhere"}}}}}], "tool_choice": "required"}, "tools", "'f'"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}}}]}, "tools", "'f'"),
    ({"tools": CHAT, "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice", "'clock'"),
    ({"tools": CHAT, "tool_choice": {"type": "function"}}, "tool_choice", "name a function"),
    ({"tools": CHAT, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
    ({"tool_choice": "required"}, "tool_choice", "no tools")])
def test_what_cannot_be_called_is_refused_by_name(http, fields, param, words):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_schema_that_cannot_be_kept_is_no_matter_where_nothing_is_held_to_it(http):
    odd = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}}}]
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "tools": odd, "max_tokens": 8, **FAST})
    assert answer.status_code == 200


def test_counting_tokens_refuses_no_tool_choice(claude, http):
    plain = claude.messages.count_tokens(model="sudoku", messages=HELLO, tools=BLOCKS).input_tokens
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}, {"type": "tool", "name": "clock"}):
        counted = claude.messages.count_tokens(model="sudoku", messages=HELLO, tools=BLOCKS, tool_choice=choice)
        assert counted.input_tokens == plain
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in CHAT]
    counts = {http.post("/tokenize", json={"messages": HELLO, "tools": tools}).json()["count"]
              for tools in (CHAT, strict)}
    assert counts == {plain}


# Budgets of thoughts


def thinking(url, path, **fields):
    bodies = {"/v1/chat/completions": {"messages": HELLO, "max_tokens": 100, "reasoning_effort": "high"},
              "/v1/responses": {"model": "sudoku", "input": "Hello", "max_output_tokens": 100,
                                "reasoning": {"effort": "high"}},
              "/v1/messages": {"model": "sudoku", "messages": HELLO, "max_tokens": 100}}
    body = {**bodies[path], "seed": 1, **FAST}
    for name, value in fields.items():
        body[name] = {**body[name], **value} if isinstance(value, dict) and name in body else value
    answer = httpx.post(url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    for name in ("completion_tokens_details", "output_tokens_details"):
        if name in usage:
            return next(value for key, value in usage[name].items() if key in ("reasoning_tokens", "thinking_tokens"))
    raise AssertionError(usage)


@pytest.fixture
def thinker(model):
    """A model that begins with a thought and never closes it by itself, on every route."""
    opened, closed = (model.tokenizer.token_to_id(mark) for mark in ("<|channel>", "<channel|>"))
    letter = model.tokenizer.encode("x")[0]
    return {opened: 100.0, letter: 60.0, closed: -100.0, 1: -100.0, 106: -100.0, 50: -100.0}


@pytest.mark.parametrize(("path", "field"), [
    ("/v1/chat/completions", {"reasoning_budget_tokens": 12}), ("/v1/chat/completions", {"reasoning_budget": 12}),
    ("/v1/chat/completions", {"thinking": {"type": "enabled", "budget_tokens": 12}}),
    ("/v1/responses", {"reasoning_budget_tokens": 12}), ("/v1/responses", {"reasoning": {"max_tokens": 12}}),
    ("/v1/responses", {"reasoning": {"reasoning_budget_tokens": 12}}),
    ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 12}}),
    ("/v1/messages", {"thinking": {"type": "enabled"}, "reasoning_budget_tokens": 12})])
def test_a_budget_reaches_the_engine_on_every_route(scripted, path, field):
    _, service = pair = scripted("Hello")
    thinking(str(pair[0].base_url).rstrip("/"), path, **field)
    assert service.requests[0].thoughts.budget == 12


def test_a_runaway_thought_ends_at_its_budget_and_the_answer_follows(url, thinker):
    bias = {str(token): value for token, value in thinker.items() if token != 100} | {"100": 100}
    for budget in (9, 40):
        answer = httpx.post(f"{url}/v1/chat/completions", timeout=60, json={
            "messages": HELLO, "max_tokens": 100, "seed": 1, "reasoning_effort": "high", "logit_bias": bias,
            "response_format": {"type": "choice", "choice": ["yes", "no"]}, "reasoning_budget_tokens": budget,
            **FAST}).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
        assert answer["choices"][0]["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize(("fields", "param"), [
    ({"reasoning_budget_tokens": -2}, "reasoning_budget_tokens"), ({"reasoning_budget_tokens": "9"},
                                                                  "reasoning_budget_tokens"),
    ({"reasoning_budget": 1.5}, "reasoning_budget"), ({"thinking": {"type": "enabled", "budget_tokens": "x"}},
                                                      "thinking.budget_tokens")])
def test_a_budget_that_is_no_number_is_refused(http, fields, param):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_no_limit_and_no_thinking(scripted):
    client, service = scripted("Hello")
    for budget in (-1, 0):
        client.post("/v1/chat/completions", json={"messages": HELLO, "reasoning_effort": "high",
                                                  "reasoning_budget_tokens": budget})
    assert [request.thoughts.budget for request in service.requests] == [None, 0]
    assert len(service.requests[0].prompt_ids) > len(service.requests[1].prompt_ids)  # there it is not told to think


def test_redrawing_is_a_setting_and_is_counted(scripted, http):
    from dgemma.serve.settings import Settings

    client, service = scripted("Hello")
    off, other = scripted("Hello", settings=Settings(("sudoku",), redraw_empty=False))
    for one in (client, off):
        one.post("/v1/chat/completions", json={"messages": HELLO})
        one.post("/v1/chat/completions", json={"messages": HELLO, "redraw_empty": False})
        one.post("/v1/messages", json={"model": "sudoku", "max_tokens": 9, "messages": HELLO, "redraw_empty": True})
    assert [request.redraw_empty for request in service.requests] == [True, False, True]
    assert [request.redraw_empty for request in other.requests] == [False, False, True]
    assert "dgemma_canvases_redrawn_total" in http.get("/metrics").text
