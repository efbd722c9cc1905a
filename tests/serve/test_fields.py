"""What a field asks for is honoured, refused by name, or told to have no effect, on every route and in any spelling."""

import base64
import json
import re

import anthropic
import httpx2 as httpx
import openai
import pytest
from anthropic import beta_tool
from fastapi.testclient import TestClient

import dgemma
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from support.scripted_service import ScriptedService

HELLO = [{"role": "user", "content": "Hello"}]
BODIES = {
    "/v1/chat/completions": {"messages": HELLO}, "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"model": "sudoku", "input": "Hello"},
    "/v1/messages": {"model": "sudoku", "max_tokens": 99, "messages": HELLO}}
ROUTES = tuple(BODIES)
SCHEMA = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
          "additionalProperties": False}
OTHER = {"type": "object", "properties": {"no": {"type": "boolean"}}, "required": ["no"], "additionalProperties": False}
OPENAI = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}
FLAT = {"type": "json_schema", "name": "reply", "schema": SCHEMA}
HEADER = "x-dgemma-ignored"


@pytest.fixture(scope="module")
def server():
    """A client, without a socket in between, and the service that it reaches."""
    service = ScriptedService(dgemma.load("sudoku"), "Hello")
    with TestClient(create_app(service.model, service, Settings(("sudoku",))), base_url="http://localhost") as client:
        yield client, service


@pytest.fixture(scope="module")
def strict():
    service = ScriptedService(dgemma.load("sudoku"), "Hello")
    settings = Settings(("sudoku",), strict_fields=True)
    with TestClient(create_app(service.model, service, settings), base_url="http://localhost") as client:
        yield client


def ask(server, path, **fields):
    return server[0].post(path, json={**BODIES[path], **fields})


def asked(server, path, **fields):
    """The request that the engine got."""
    answer = ask(server, path, **fields)
    assert answer.status_code == 200, answer.text
    return server[1].requests[-1]


def refusal(answer, status=400):
    """The error's message and the field it names; Anthropic's names it in the message only."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["message"], error.get("param")


# ---- the form of the answer ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("fields", [
    {"response_format": OPENAI}, {"response_format": FLAT}, {"response_format": {"type": "json_object",
                                                                                 "schema": SCHEMA}},
    {"response_format": {"type": "json", "value": SCHEMA}}, {"text": {"format": FLAT}}, {"text": {"format": OPENAI}},
    {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
    {"guided_decoding": {"json": SCHEMA}}, {"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)},
    {"json_schema": {"name": "reply", "schema": SCHEMA}}, {"format": SCHEMA}, {"format": FLAT},
    {"output_format": FLAT}, {"output_config": {"format": FLAT, "effort": "low"}},
    {"response_format": OPENAI, "output_format": FLAT}, {"response_format": {"type": "json_object"}, "format": SCHEMA},
    {"response_format": {"type": "text"}, "guided_json": SCHEMA},
], ids=repr)
def test_a_schema_is_kept_on_every_route_under_any_name(server, path, fields):
    assert_keeps(asked(server, path, **fields), server[1].model, '{"yes": true}', '{"no": true}', "Hello")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "right", "wrong"), [
    ({"guided_regex": "a+"}, "aa", "b"), ({"regex": "a+"}, "aa", "b"), ({"structured_outputs": {"regex": "a+"}}, "aa",
                                                                        "b"),
    ({"response_format": {"type": "regex", "regex": "a+"}}, "aa", "b"),
    ({"text": {"format": {"type": "regex", "pattern": "a+"}}}, "aa", "b"),
    ({"guided_choice": ["yes", "no"]}, "no", "yesno"), ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "x"),
    ({"response_format": {"type": "choice", "choice": ["yes", "no"]}}, "no", "x"),
    ({"format": "json"}, '{"a": 1}', "[1]"), ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[1]"),
    ({"guided_json_object": True}, '{"a": 1}', "[1]"),
    ({"structured_outputs": {"json_object": True}}, '{"a": 1}', "[1]"),
], ids=repr)
def test_expressions_choices_and_any_json_too(server, path, fields, right, wrong):
    assert_keeps(asked(server, path, **fields), server[1].model, right, wrong)


def assert_keeps(request, model, right, *wrong):
    """The request's form lets one text through and not the others."""
    assert request.constraint is not None
    found = [fits(request, model, text) for text in (right, *wrong)]
    assert found == [True, *(False for _ in wrong)]


def fits(request, model, text):
    graph = request.constraint._graph
    state = graph.start
    for token in model.tokenizer.encode(text):
        state = graph.step(state, token)
        if state is None:
            return False
    return graph.accepts(state)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "param"), [
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": OPENAI, "json_schema": OTHER}, "json_schema"),
    ({"format": "json", "regex": "a"}, "regex"), ({"text": {"format": FLAT}, "output_format": {**FLAT,
                                                                                              "schema": OTHER}},
                                                  "output_format"),
    ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
])
def test_two_forms_that_contradict_each_other_are_refused(server, path, fields, param):
    message, named = refusal(ask(server, path, **fields))
    assert "one form only" in message and named in (param, None)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "named"), [
    ({"guided_grammar": "root ::= x"}, "guided_grammar"), ({"grammar": "root ::= x"}, "grammar"),
    ({"ebnf": "x"}, "ebnf"),
    ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"), ({"format": "xml"}, "format"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"), ({"guided_json": "{"}, "guided_json"),
    ({"json_schema": "[]"}, "json_schema"), ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": "json"}, "response_format"), ({"output_format": {}}, "output_format"),
    ({"guided_regex": "("}, "guided_regex"), ({"guided_choice": []}, "guided_choice"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "thing"}}}}, "output_config.format"),
])
def test_a_form_that_cannot_be_kept_is_refused_by_name(server, path, fields, named):
    message, param = refusal(ask(server, path, **fields))
    assert param == named or (param is None and path == "/v1/messages")
    assert "pydantic" not in message and "Input should" not in message
    assert path != "/v1/messages" or named.split(".")[0] in message  # Anthropic's errors have no other place for it


def test_a_form_reaches_the_engine_through_the_clients_own_helpers(scripted):
    http, service = scripted('{"yes":true}')

    class Reply(anthropic.BaseModel):
        yes: bool

    client = anthropic.Anthropic(base_url=str(http.base_url), api_key="none", max_retries=0)
    said = client.beta.messages.parse(model="sudoku", max_tokens=99, messages=HELLO, output_format=Reply)
    assert said.parsed_output == Reply(yes=True)
    assert service.requests[-1].constraint is not None
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    assert client.chat.completions.parse(model="sudoku", messages=HELLO, response_format=Reply).choices[
        0].message.parsed == Reply(yes=True)
    assert client.responses.parse(model="sudoku", input="Hello", text_format=Reply).output_parsed == Reply(yes=True)
    assert all(request.constraint is not None for request in service.requests)


# ---- length, seeds, stops, what is drawn -----------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens",
                                  "n_predict", "num_predict"])
def test_a_limit_is_honoured_under_any_name(server, path, name):
    if path == "/v1/messages" and name != "max_tokens":
        return  # there max_tokens must be given, and counts
    assert asked(server, path, **{name: 7}).settings.max_tokens == 7


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("limit", [-1, -1.0, 100_000, 10**30, None, 8191.0])
def test_without_a_limit_or_above_what_fits_the_context_is_the_limit(server, path, limit):
    if path == "/v1/messages" and limit is None:
        limit = -1
    request = asked(server, path, max_tokens=limit)
    assert len(request.prompt_ids) + request.settings.max_tokens == server[1].model.config.max_position_embeddings


def test_the_servers_own_limit_bounds_answers_too():
    service = ScriptedService(dgemma.load("sudoku"), "Hello")
    settings = Settings(("sudoku",), max_model_len=50)
    with TestClient(create_app(service.model, service, settings), base_url="http://localhost") as client:
        for fields in ({}, {"max_tokens": 1000}):
            assert ask((client, service), ROUTES[0], **fields).status_code == 200
            request = service.requests[-1]
            assert len(request.prompt_ids) + request.settings.max_tokens == 50


@pytest.mark.parametrize("path", ROUTES)
def test_whole_numbers_may_be_written_as_floats(server, path):
    request = asked(server, path, max_tokens=12.0, seed=5.0, top_k=3.0, max_denoising_steps=4.0, n=1.0,
                    stability_threshold=2.0)
    assert (request.settings.max_tokens, request.seed, request.sampling.top_k) == (12, 5, 3)
    assert (request.settings.max_denoising_steps, request.settings.stability_threshold) == (4, 2)
    assert refusal(ask(server, path, max_tokens=12.5))[0] == 'max_tokens: must be a whole number or -1, not 12.5'


def test_token_ids_and_log_probabilities_may_be_floats_too(server):
    assert asked(server, "/v1/completions", prompt=[5.0, 6], logprobs=2.0).prompt_ids == [5, 6]
    assert asked(server, "/v1/chat/completions", logprobs=True, top_logprobs=2.0).logprobs == 2


@pytest.mark.parametrize("path", ROUTES)
def test_a_seed_of_minus_one_is_any_seed(server, path):
    seeds = {asked(server, path, seed=-1).seed for _ in range(3)}
    assert len(seeds) == 3 and all(seed >= 0 for seed in seeds)
    assert asked(server, path, seed=-5).seed == asked(server, path, seed=-5).seed


@pytest.mark.parametrize("path", ROUTES)
def test_the_narrowest_top_p_is_greedy(server, path):
    choices = asked(server, path, top_p=0, temperature=0.7).sampling
    assert (choices.temperature, choices.top_p) == (0, 1)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "stops"), [
    ({"stop": [""]}, ()), ({"stop": ""}, ()), ({"stop": [None, "a", ""]}, ("a",)), ({"stop": None}, ()),
    ({"stop": []}, ()), ({"stop_sequences": ["b", "b"]}, ("b",)), ({"stop": "a", "stop_sequences": ["b"]}, ("a", "b"))])
def test_empty_stop_strings_stop_nothing_and_both_names_count(server, path, fields, stops):
    assert asked(server, path, **fields).stop == stops


@pytest.mark.parametrize("path", ROUTES)
def test_a_bias_is_honoured_everywhere(server, path):
    assert asked(server, path, logit_bias={"7": -5}).sampling.logit_bias == ((7, -5.0),)


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/v1/completions"])
@pytest.mark.parametrize(("fields", "thinking"), [
    ({"enable_thinking": True}, True), ({"enable_thinking": False}, False), ({"think": True}, True),
    ({"think": "high"}, True), ({"reasoning": {"effort": "high"}}, True), ({"reasoning": {"effort": "none"}}, False),
    ({"reasoning": {"enabled": True}}, True), ({"reasoning_effort": "low"}, True),
    ({"reasoning_effort": "none"}, False),
    ({"thinking": {"type": "enabled"}}, True), ({"thinking": {"type": "disabled"}}, False), ({"thinking": True}, True),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True), ({"thinking": {"type": "adaptive"}}, True),
    ({"chat_template_kwargs": {"reasoning_effort": "high"}}, True),
    ({"chat_template_kwargs": {"enable_thinking": False, "other": None}}, False), ({}, False)], ids=repr)
def test_thinking_is_switched_under_any_name_on_every_route(server, path, fields, thinking):
    model = server[1].model
    assert asked(server, path, **fields).prompt_ids == model.prompt_ids(HELLO, thinking=thinking)


# ---- what has no effect, what is refused -----------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
def test_what_has_no_effect_is_told_once_in_a_header(server, path):
    answer = ask(server, path, presence_penalty=0.5, frequency_penalty=0, min_p=0.05, repetition_penalty=1.1,
                 skip_special_tokens=False, unheard_of=1, mirostat=0, metadata={}, user="me", store=True)
    assert answer.status_code == 200
    assert answer.headers[HEADER].split(", ") == ["presence_penalty", "min_p", "repetition_penalty",
                                                  "skip_special_tokens", "unheard_of"]
    assert HEADER not in ask(server, path, presence_penalty=0, repeat_penalty=1, top_k=-1).headers


def test_the_header_comes_with_a_stream_too_and_cannot_be_written_by_names(server):
    answer = ask(server, ROUTES[0], stream=True, min_p=0.1, **{"a\r\nx-evil: 1": 1, "ü": 2})
    assert answer.headers[HEADER] == "min_p" and "x-evil" not in answer.headers
    answer = ask(server, ROUTES[0], **{f"field_{index}": 1 for index in range(1000)})
    assert len(answer.headers[HEADER]) < 2000


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("fields", "code"), [
    ({"presence_penalty": 0.5}, "unsupported_parameter"), ({"min_p": 0.1}, "unsupported_parameter"),
    ({"unheard_of": 1}, "unknown_parameter"), ({"skip_special_tokens": False}, "unsupported_parameter")])
def test_a_strict_server_refuses_what_has_no_effect(strict, path, fields, code):
    answer = strict.post(path, json={**BODIES[path], **fields})
    message, _ = refusal(answer)
    assert next(iter(fields)) in message and "--strict-fields" in message
    assert answer.json()["error"].get("code") in (code, None)
    assert strict.post(path, json={**BODIES[path], "presence_penalty": 0, "store": True}).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("fields", [
    {"audio": {"voice": "x"}}, {"best_of": 3}, {"min_tokens": 5}, {"ignore_eos": True},
    {"stop_token_ids": [3]}, {"functions": [{"name": "f"}]}, {"bad_words": ["x"]}, {"prompt_logprobs": 1},
    {"chat_template": "x"}, {"modalities": ["text", "audio"]}, {"include_stop_str_in_output": True},
    {"web_search_options": {}}, {"continue_final_message": True}, {"truncate_prompt_tokens": 5},
    {"mcp_servers": [{"url": "x"}]}, {"structural_tag": "x"}, {"use_beam_search": True}], ids=repr)
def test_what_would_change_the_answer_is_refused_by_name(server, path, fields):
    name = next(iter(fields))
    message, param = refusal(ask(server, path, **fields))
    assert name in message and param in (name, None)


@pytest.mark.parametrize(("path", "fields"), [
    ("/v1/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("/v1/completions", {"tool_choice": "required"}), ("/v1/completions", {"enable_thinking": True}),
    ("/v1/completions", {"reasoning_effort": "high"}), ("/v1/completions", {"system": "Be brief."}),
    ("/v1/chat/completions", {"system": "Be brief."}), ("/v1/chat/completions", {"instructions": "Be brief."}),
    ("/v1/chat/completions", {"echo": True}), ("/v1/chat/completions", {"previous_response_id": "resp_1"}),
    ("/v1/responses", {"system": "Be brief."}), ("/v1/responses", {"n": 2}), ("/v1/responses", {"echo": True}),
    ("/v1/messages", {"instructions": "Be brief."}), ("/v1/messages", {"logprobs": True}), ("/v1/messages", {"n": 2}),
    ("/v1/chat/completions", {"suffix": "x"}), ("/v1/responses", {"suffix": "x"}), ("/v1/messages", {"suffix": "x"}),
    ("/v1/completions", {"canvas": ["x"]}), ("/v1/responses", {"canvas": ["x"]}), ("/v1/messages", {"prefix": "x"}),
    ("/v1/messages", {"top_logprobs": 2}), ("/v1/messages", {"conversation": "conv_1"})], ids=repr)
def test_what_only_another_route_can_do_is_refused_not_ignored(server, path, fields):
    name = next(iter(fields))
    message, param = refusal(ask(server, path, **fields))
    assert message.startswith(name) and param in (name, None)


@pytest.mark.parametrize(("fields", "alternatives"), [
    ({"logprobs": True}, 0), ({"logprobs": 2}, 2), ({"logprobs": True, "top_logprobs": 3}, 3),
    ({"logprobs": False}, None)])
def test_responses_take_chats_log_probabilities(server, fields, alternatives):
    assert asked(server, "/v1/responses", **fields).logprobs == alternatives


def test_parallel_calls_can_be_refused_in_anthropics_api_by_openais_name(scripted):
    http, _ = scripted("<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:f{a:2}<tool_call|>")
    body = {**BODIES["/v1/messages"], "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    for fields, calls in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        content = http.post("/v1/messages", json={**body, **fields}).json()["content"]
        assert sum(block["type"] == "tool_use" for block in content) == calls


def test_the_sdk_of_threads_goes_on_without_them(scripted):
    http, service = scripted("<|tool_call>call:look{q:<|\"|>a<|\"|>}<tool_call|>", "Found it.")
    refused = http.post("/v1/messages", json={**BODIES["/v1/messages"], "thread": {"type": "create"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}

    @beta_tool
    def look(q: str) -> str:
        """Look something up.

        Args:
            q: What to look up.
        """
        return f"seen {q}"

    client = anthropic.Anthropic(base_url=str(http.base_url), api_key="none", max_retries=0)
    runner = client.beta.messages.tool_runner(model="sudoku", max_tokens=99, messages=HELLO, tools=[look])
    assert runner.until_done().content[0].text == "Found it."
    assert "seen a" in service.model.tokenizer.decode(service.requests[-1].prompt_ids)
    assert http.post("/v1/messages", json={**BODIES["/v1/messages"], "thread": None}).status_code == 200


# ---- conversations ---------------------------------------------------------------------------------


def prompt(server, path, **fields):
    return server[1].model.tokenizer.decode(asked(server, path, **fields).prompt_ids)


def test_a_tools_result_may_be_empty_or_have_lost_its_call(server):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": None}]
    assert "response:look" in prompt(server, "/v1/chat/completions", messages=said)
    for stray in ({"role": "tool", "tool_call_id": "gone", "content": "42 degrees"},
                  {"role": "tool", "tool_call_id": "gone", "content": [{"type": "text", "text": "42 degrees"}]}):
        assert "42 degrees" in prompt(server, "/v1/chat/completions", messages=[stray, *HELLO])
    output = {"type": "function_call_output", "call_id": "gone", "output": "42 degrees"}
    assert "42 degrees" in prompt(server, "/v1/responses", input=[output, {"role": "user", "content": "Well?"}])
    prompt(server, "/v1/responses", input=[{"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                                           {"type": "function_call_output", "call_id": "c", "output": None}])
    block = {"type": "tool_result", "tool_use_id": "gone", "content": [{"type": "text", "text": "42 degrees"}]}
    assert "42 degrees" in prompt(server, "/v1/messages", messages=[{"role": "user", "content": [block]}])
    use = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
    for content in (None, [], ""):
        result = {"type": "tool_result", "tool_use_id": "c1", "content": content}
        assert "response:look" in prompt(server, "/v1/messages", messages=[
            *HELLO, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}])


def encoded(text):
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("source", [
    {"type": "text", "media_type": "text/plain", "data": "Grass is green."},
    {"type": "base64", "media_type": "text/plain", "data": encoded("Grass is green.")},
    {"type": "content", "content": "Grass is green."},
    {"type": "content", "content": [{"type": "text", "text": "Grass is green."}]}], ids=lambda source: source["type"])
def test_a_document_of_plain_text_is_read(server, source):
    block = {"type": "document", "source": source, "title": "On grass", "citations": {"enabled": False}}
    content = [block, {"type": "text", "text": "What colour?"}]
    text = prompt(server, "/v1/messages", messages=[{"role": "user", "content": content}])
    assert "On grass\n\nGrass is green." in text and "What colour?" in text


def test_other_texts_that_clients_attach_are_read(server):
    found = {"type": "search_result", "source": "https://grass.example", "title": "Grass",
             "content": [{"type": "text", "text": "It is green."}]}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [found]}
    use = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
    for content in ([found], [result]):
        text = prompt(server, "/v1/messages", messages=[*HELLO, {"role": "assistant", "content": [use]},
                                                        {"role": "user", "content": content}])
        assert "It is green." in text and "https://grass.example" in text
    url = f"data:text/plain;base64,{encoded('It is green.')}"
    part = {"type": "file", "file": {"filename": "grass.txt", "file_data": url}}
    assert "grass.txt\n\nIt is green." in prompt(server, "/v1/chat/completions",
                                                 messages=[{"role": "user", "content": [part]}])
    part = {"type": "input_file", "filename": "grass.txt", "file_data": url}
    assert "grass.txt\n\nIt is green." in prompt(server, "/v1/responses", input=[{"role": "user", "content": [part]}])


PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.mark.parametrize(("path", "fields", "where"), [
    ("/v1/messages", {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0]"),
    ("/v1/messages", {"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [PICTURE]}]}]}, "messages[0].content[0].content[0]"),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "document", "source": {
        "type": "base64", "media_type": "application/pdf", "data": "AAAA"}}]}]}, "messages[0].content[0].source"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input[0].content[0]"),
    ("/v1/responses", {"input": [{"role": "user", "content": [
        {"type": "input_file", "file_data": "data:application/pdf;base64,AAAA"}]}]}, "input[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[0].content[0]")])
def test_a_model_that_sees_nothing_says_so_of_pictures_and_the_like_everywhere(server, path, fields, where):
    message, param = refusal(ask(server, path, **fields))
    assert re.match(re.escape(where) + r"(\.source)?: (this (model|server) reads text only|\w+ is (not read|read in))",
                    message)
    assert param is None or param.startswith(where)


# ---- prompts that are too long ---------------------------------------------------------------------

OPENAI_WORDS = r"maximum context length is (\d+) tokens.*prompt has (?:at least )?(\d+) tokens"


@pytest.mark.parametrize("length", [8110, 8192, 9000, 200_000, 5_000_000], ids=str)
@pytest.mark.parametrize(("path", "field"), [
    ("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/v1/responses", "input"),
    ("/v1/messages", "messages")])
def test_a_prompt_that_is_too_long_is_always_told_in_the_words_clients_look_for(server, path, field, length):
    text = "x" * length
    answer = ask(server, path, **{field: [{"role": "user", "content": text}] if field == "messages" else text})
    message, param = refusal(answer)
    if path == "/v1/messages":
        said, most = map(int, re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", message).groups())
        assert said > most == 8192 - 90 and answer.json()["error"]["type"] == "invalid_request_error"
    else:
        limit, said = map(int, re.search(OPENAI_WORDS, message).groups())
        assert limit == 8192 and said > 8102
        assert (param, answer.json()["error"]["code"]) == (field, "context_length_exceeded")


def test_a_request_that_memory_has_no_room_for_is_too_long_as_well(serve_model, model):
    with serve_model(model) as (url, service):
        service.engine.memory.limit, service.engine.memory.lent = 1000, 0
        for path in ROUTES:
            answer = httpx.post(f"{url}{path}", json=BODIES[path], timeout=30)
            message, _ = refusal(answer)
            assert "memory" in message
            assert answer.json()["error"].get("code", "context_length_exceeded") == "context_length_exceeded"
            assert path != "/v1/messages" or "prompt is too long" in message


# ---- how mistakes are told -------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "fields", "message"), [
    ("/v1/chat/completions", {"stop": ["x"] * 17}, "stop: must be a list of at most 16 entries, not a list of 17"),
    ("/v1/chat/completions", {"stop": 5}, "stop: must be a string or a list, not 5"),
    ("/v1/chat/completions", {"stop": ["a", {}]}, "stop[1]: must be a string, not an object"),
    ("/v1/chat/completions", {"temperature": "hot"}, 'temperature: must be a number, not "hot"'),
    ("/v1/chat/completions", {"temperature": -1}, "temperature: must be at least 0, not -1"),
    ("/v1/chat/completions", {"stream": "yes"}, 'stream: must be true or false, not "yes"'),
    ("/v1/chat/completions", {"n": 0, "seed": "x"},
     'seed: must be a whole number, not "x"; n: must be at least 1, not 0'),
    ("/v1/chat/completions", {"reasoning_effort": "extreme"},
     "reasoning_effort: must be 'none', 'minimal', 'low', 'medium', 'high', 'xhigh' or 'max', not \"extreme\""),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    ("/v1/chat/completions", {"messages": "Hello"}, 'messages: must be a list, not "Hello"'),
    ("/v1/chat/completions", {"logit_bias": {"x": 1}}, "logit_bias.x: must be a token's number in digits, not \"x\""),
    ("/v1/completions", {"prompt": {}}, "prompt: must be a string or a list, not an object"),
    ("/v1/completions", {"prompt": [1, "x"]}, None),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]},
     "input[0].type: must be 'message', 'function_call', 'function_call_output' or 'reasoning', not "
     '"item_reference"'),
    ("/v1/responses", {"input": [5]}, "input[0].type is missing, or no string"),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools[0].type: must be 'function', not \"web_search\""),
    ("/v1/messages", {"messages": [{"role": "robot", "content": "x"}]},
     "messages[0].role: must be 'user', 'assistant' or 'system', not \"robot\""),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "poem"}]}]},
     "messages[0].content[0].type: must be 'text', 'image', 'document', 'search_result' or 'tool_result', "
     'not "poem"'),
    ("/v1/messages", {"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
    ("/v1/messages", {"max_tokens": "many"}, 'max_tokens: must be a whole number or -1, not "many"'),
], ids=repr)
def test_a_mistake_is_told_once_in_plain_words(server, path, fields, message):
    told, _ = refusal(ask(server, path, **fields))
    for jargon in ("Input should", "_kind", "pydantic", "union", "constrained", "NoneType"):
        assert jargon not in told
    assert message is None or told == message


def test_a_parameter_in_the_address_is_named(server):
    answer = server[0].get("/v1/models", params={"limit": "many"})
    assert refusal(answer) == ('limit: must be a whole number, not "many"', "limit")


def test_what_a_mistake_repeats_is_short(server):
    told, _ = refusal(ask(server, ROUTES[0], temperature="x" * 10_000))
    assert len(told) < 100
    told, param = refusal(ask(server, ROUTES[0], logit_bias={"y" * 10_000: 1}))
    assert len(told) < 1100 and len(param) < 1100


# ---- log-probabilities, models, paths --------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_no_text_are_an_empty_list(scripted, stream):
    http, service = scripted("", "<|tool_call>call:f{a:1}<tool_call|>", "")
    tools = [{"type": "function", "function": {"name": "f"}}]
    for path, fields in (("/v1/chat/completions", {"logprobs": True, "tools": tools}),
                         ("/v1/chat/completions", {"logprobs": True, "tools": tools}),
                         ("/v1/completions", {"logprobs": 1})):
        answer = http.post(path, json={**BODIES[path], **fields, "stream": stream})
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [
            f"data: {answer.text}"]
        choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
        told = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
        empty = {"content": [], "refusal": None} if path.endswith("chat/completions") else {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        assert told == [empty]
    assert http.post(ROUTES[0], json=BODIES[ROUTES[0]]).json()["choices"][0]["logprobs"] is None


def test_both_apis_clients_list_and_find_models(scripted):
    http, _ = scripted("x")
    client = anthropic.Anthropic(base_url=str(http.base_url), api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["sudoku", "alias"]
    assert [model.id for model in client.models.list(limit=1)] == ["sudoku", "alias"]  # page by page
    model = client.models.retrieve("alias")
    assert (model.type, model.display_name, model.lifecycle) == ("model", "alias", "active")
    assert model.created_at.year > 2000 and model.max_input_tokens == 8192 - 90
    page = http.get("/v1/models").json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", False, "sudoku", "alias")
    other = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in other.models.list()] == ["sudoku", "alias"]
    assert other.models.retrieve("sudoku").object == "model"


def test_head_is_get_without_a_body(scripted):
    http, _ = scripted("x")
    for path in ("/health", "/v1/models", "/v1/models/sudoku", "/metrics", "/docs", "/openapi.json"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert int(answer.headers["content-length"]) > 0, path
    assert http.head("/v1/models/none").status_code == 404 and http.head("/v1/messages").status_code == 405


@pytest.mark.parametrize(("method", "path", "hint"), [
    ("POST", "/chat/completions", "the path is /v1/chat/completions"),
    ("POST", "//v1/chat/completions", "the path is /v1/chat/completions"),
    ("GET", "/models", "the path is /v1/models"), ("POST", "/messages", "the path is /v1/messages"),
    ("POST", "/v1/v1/messages", "leave one /v1 out"), ("POST", "/v1/v1/chat/completions", "leave one /v1 out"),
    ("POST", "/v1/embeddings", "no embeddings"), ("POST", "/embeddings", "no embeddings"),
    ("POST", "/v1/audio/speech", "no audio"), ("POST", "/v1/images/generations", "no images"),
    ("POST", "/v1/rerank", "no rerank"), ("GET", "/v1/health", "the path is /health"),
    ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"), ("GET", "/nowhere", "/v1/chat/completions"),
    ("GET", "/v1", "/v1/chat/completions")])
def test_an_unknown_path_says_what_is_there_instead(server, method, path, hint):
    answer = server[0].request(method, path)
    message, _ = refusal(answer, 404)
    assert hint in message
    assert (answer.json().get("type") == "error") == path.endswith("messages")  # in Anthropic's form to its clients


def test_a_wrong_method_says_which_is_right(server):
    for method, path, right in (("GET", "/v1/chat/completions", "POST"), ("POST", "/v1/models", "GET")):
        answer = server[0].request(method, path)
        assert refusal(answer, 405)[0] == f"{path} takes {right}, not {method}"
        assert answer.headers["allow"] == right


# ---- counting makes nothing, so it refuses nothing ---------------------------------------------------


COUNT = "/v1/messages/count_tokens"


@pytest.mark.parametrize("fields", [
    {"thinking": True}, {"thinking": {"type": "auto"}}, {"thinking": {"type": "enabled", "budget_tokens": 10**12}},
    {"enable_thinking": True}, {"reasoning_effort": "high"}, {"reasoning": {"max_tokens": 5}}])
def test_a_prompt_to_think_is_counted_as_it_is_sent(server, fields):
    counted = server[0].post(COUNT, json={"model": "sudoku", "messages": HELLO, **fields}).json()["input_tokens"]
    assert counted == len(asked(server, "/v1/messages", **fields).prompt_ids)
    plain = server[0].post(COUNT, json={"model": "sudoku", "messages": HELLO}).json()["input_tokens"]
    assert counted > plain


@pytest.mark.parametrize("fields", [
    {"messages": [*HELLO, {"role": "assistant", "content": "Once"}]}, {"tool_choice": {"type": "any"}},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {"max_tokens": 5}, {"stream": True},
    {"thinking": {"type": "enabled", "budget_tokens": 0}}, {"messages": [{"role": "user", "content": "x" * 50_000}]}])
def test_what_could_not_be_answered_is_counted(server, fields):
    answer = server[0].post(COUNT, json={"model": "sudoku", "messages": HELLO, **fields})
    assert answer.status_code == 200 and answer.json()["input_tokens"] > 0, answer.text


def test_tokenising_reads_a_conversation_as_chat_does(server):
    fields = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "enable_thinking": True}
    counted = server[0].post("/tokenize", json=fields).json()["tokens"]
    assert counted == asked(server, "/v1/chat/completions", **fields).prompt_ids


# ---- mistakes in a union name what was meant --------------------------------------------------------


@pytest.mark.parametrize(("path", "fields", "message"), [
    ("/v1/responses", {"input": [{"role": "tool", "content": "x"}]}, "input[0].role: must be 'user'"),
    ("/v1/chat/completions", {"thinking": {"type": "x"}}, "thinking.type: must be 'enabled'"),
    ("/v1/chat/completions", {"tool_choice": {"type": "x"}}, "tool_choice.type: must be 'function'")])
def test_a_branch_that_was_meant_is_told(server, path, fields, message):
    assert refusal(ask(server, path, **fields))[0].startswith(message)
