"""One reader of replies: Python, a whole answer and a stream say the same; broken history ends nothing."""

import json
import re

import pytest

from dgemma.chat.reply import read_answer

Q = '<|"|>'
OPEN, CLOSE = "<|tool_call>", "<tool_call|>"
SCHEMAS = {"look": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
           "run_code": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
           "my tool": {"type": "object", "properties": {"a": {}}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
LOOK = {"name": "look", "arguments": {"q": "a"}}
THOUGHT = "<|channel>thought\nLet's go."
HELLO = [{"role": "user", "content": "Hello"}]


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.splitlines()
            if line.startswith("data: ") and line != "data: [DONE]"]


def chat(http, stream, **fields):
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "stream": stream, **fields})
    assert answer.status_code == 200, answer.text
    if not stream:
        message = answer.json()["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        return message["content"] or "", message.get("reasoning_content") or "", calls
    text = thought = ""
    calls = []
    for event in events(answer):
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            thought += choice["delta"].get("reasoning_content") or ""
            calls += [call["function"] for call in choice["delta"].get("tool_calls") or ()]
    return text, thought, calls


def responses(http, stream, **fields):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = http.post("/v1/responses", json={"model": "sudoku", "input": "Hello", "tools": tools, "stream": stream,
                                              **fields})
    assert answer.status_code == 200, answer.text
    whole = answer.json() if not stream else events(answer)[-1]["response"]
    text = "".join(part["text"] for item in whole["output"] if item["type"] == "message" for part in item["content"])
    thought = "".join(part["text"] for item in whole["output"] if item["type"] == "reasoning"
                      for part in item["content"])
    return text, thought, [{"name": item["name"], "arguments": item["arguments"]} for item in whole["output"]
                           if item["type"] == "function_call"]


def messages(http, stream, **fields):
    tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    answer = http.post("/v1/messages", json={"model": "sudoku", "max_tokens": 500, "messages": HELLO, "tools": tools,
                                             "stream": False, **fields})
    assert answer.status_code == 200, answer.text
    blocks = answer.json()["content"]
    return ("".join(block["text"] for block in blocks if block["type"] == "text"),
            "".join(block["thinking"] for block in blocks if block["type"] == "thinking"),
            [{"name": block["name"], "arguments": json.dumps(block["input"])} for block in blocks
             if block["type"] == "tool_use"])


ANSWERS = [
    f"{OPEN}call:look{{q:{Q}a{Q}}}{CLOSE}", f"{THOUGHT}{OPEN}call:look{{q:{Q}a{Q}}}{CLOSE}",
    f"{THOUGHT}<channel|>call:look{{q:{Q}a{Q}}}", f"{OPEN}look('a'){CLOSE}", f"{OPEN}call:look(q=\"a\"){CLOSE}",
    f"I see.{OPEN}call:run_code{{code:{Q}x({Q}hi{Q}){Q}}}{CLOSE}",
    f"{OPEN}call:run_code{{code:{Q}a{CLOSE}b{Q}}}{CLOSE}",
    f"{OPEN}call:my tool{{a:1}}{CLOSE}", f"{OPEN}call:nope{{q:{Q}a{Q}}}{CLOSE}", f"{OPEN}call:look{{q:{Q}a", "Hello",
    "look('a')", "```tool_code\nlook(q='a')\n``` ok", '{"name": "look", "arguments": {"q": "a"}}', "look up",
]


def engine_reads(model, request, ids):
    reader = model.reader(request)
    for token in ids:
        reader.feed([token])
    answer = reader.finish()
    return answer.text, answer.reasoning, answer.tool_calls


@pytest.mark.parametrize("answer", ANSWERS)
def test_python_and_every_api_read_an_answer_alike(scripted, answer):
    cut = [part for part in re.split(r"(<[^ <>]+>|[a-z']+)", answer) if part]  # canvases, and no mark in two of them
    http, service = scripted(answer, cut, answer, cut, answer)
    model = service.model
    prompt = model.prompt_ids("Hello", tools=TOOLS)
    ids = model.tokenizer.encode(answer)
    read = read_answer(model.tokenizer, prompt, ids, TOOLS)
    expected = read.text, read.reasoning, read.tool_calls
    for ask in (chat, responses, messages):
        for stream in (False, True):
            text, thought, calls = ask(http, stream)
            given = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
            assert (text, thought or None, given) == expected, (ask.__name__, stream)
    request = service.requests[0]
    assert engine_reads(model, request, ids) == expected


def test_with_a_form_only_marked_calls_are_calls(scripted, model):
    """What looks like a call may be the form itself: the same for the engine's reading as for a stream's."""
    form = {"type": "json_object"}
    as_json, marked = json.dumps(LOOK), f"{OPEN}call:look{{q:{Q}a{Q}}}{CLOSE}"
    http, service = scripted(as_json, as_json, marked, marked, "look('a')", "look('a')")
    for text, calls in ((as_json, []), ("", [LOOK]), ("look('a')", [])):
        for stream in (False, True):
            said, _, given = chat(http, stream, response_format=form)
            assert said == text and [call["name"] for call in given] == [call["name"] for call in calls]
            request = service.requests[-1]
            answer = service.answers[len(service.requests) - 1]
            assert engine_reads(model, request, model.tokenizer.encode(answer)) == (text, None, calls)
    assert model.request("Hello", response_format=form).reading == {
        "tools": (), "stop": (), "form": True, "held": False}
    assert model.request("Hello", tools=TOOLS).reading == {
        "tools": tuple(TOOLS), "stop": (), "form": False, "held": False}
    assert model.request("Hello").reading["tools"] == () and model.request([2, 3]).reading["tools"] is None


def test_a_form_that_looks_like_a_call_is_text_in_python_too(model):
    schema = {"type": "object", "properties": {"name": {"const": "look"}, "arguments": {"const": {"q": "a"}}},
              "required": ["name", "arguments"], "additionalProperties": False}
    made = model.generate("Hello", tools=TOOLS, seed=1, max_tokens=100, response_format={
        "type": "json_schema", "json_schema": {"schema": schema}})
    if not made.tool_calls:  # beside a form a tool may be called, too, but not by the form
        assert json.loads(made.text) == LOOK


@pytest.mark.parametrize("name", ["a{b", "a\nb", "<|tool_call>", " a", "}"])
def test_a_name_that_cannot_be_written_is_refused_by_its_place(scripted, name):
    http, _ = scripted("x")
    good, bad = {"name": "good"}, {"name": name}
    for path, body in (
            ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": tool}
                                                                   for tool in (good, bad)]}),
            ("/v1/responses", {"model": "sudoku", "input": "x", "tools": [{"type": "function", **tool}
                                                                          for tool in (good, bad)]}),
            ("/v1/messages", {"model": "sudoku", "max_tokens": 9, "messages": HELLO,
                              "tools": [{**tool, "input_schema": {}} for tool in (good, bad)]})):
        answer = http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert "tool 1" in answer.text and "cannot be written" in answer.text
        assert path == "/v1/messages" or answer.json()["error"]["param"] == "tools[1]"


BROKEN = ['{"q": ', '{"q": "a', "[]", "null", "3", '"x"', "no", "", "{" * 3000, "[" * 3000,
          '{"a":' * 70 + "1" + "}" * 70]


@pytest.mark.parametrize("arguments", [*BROKEN, None, [], 3, [1], True], ids=lambda value: str(value)[:12])
def test_broken_arguments_make_no_later_request_an_error(scripted, arguments):
    http, service = scripted("Go on.")
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    assert chat(http, False, messages=[*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
                                       {"role": "tool", "tool_call_id": "c", "content": "bad"}])[0] == "Go on."
    assert responses(http, False, input=[
        *HELLO, {"type": "function_call", "call_id": "c", "name": "look", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "bad"}])[0] == "Go on."
    assert messages(http, False, messages=[
        *HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": arguments}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "bad"}]}])[0] == "Go on."
    for request in service.requests:
        prompt = service.model.tokenizer.decode(request.prompt_ids)
        assert "call:look{" in prompt and f"response:look{{value:{Q}bad{Q}}}" in prompt


def test_an_empty_assistant_and_answers_without_their_calls(scripted):
    http, service = scripted("Go on.")
    for empty in ({"content": None}, {}, {"content": ""}):
        said = {"role": "assistant", **empty}
        chat(http, False, messages=[*HELLO, said, *HELLO])
        responses(http, False, input=[*HELLO, said, *HELLO])
        messages(http, False, messages=[*HELLO, said, *HELLO])
    chat(http, False, messages=[{"role": "tool", "tool_call_id": "gone", "content": None}, *HELLO])
    responses(http, False, input=[{"type": "function_call_output", "call_id": "gone", "output": None}, *HELLO])
    messages(http, False, messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "gone"},
                                                                 {"type": "text", "text": "Hello"}]}])
    prompts = [service.model.tokenizer.decode(request.prompt_ids) for request in service.requests]
    assert len({prompt.split("<turn|>", 1)[1] for prompt in prompts[:9]}) == 1  # all say the same
    assert all("user\nResult of a tool, which was called earlier:" in prompt for prompt in prompts[9:])
    assert not any("None" in prompt for prompt in prompts)
