"""openai: chat, completions and responses, streams, forms, calls."""

import json

import openai
from checks import ACTED, MODEL, MOST, REAL, check, refused, run
from pydantic import BaseModel

client, actor = (openai.OpenAI(base_url=f"{url}/v1", api_key="none") for url in (REAL, ACTED))
HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
              "required": ["city", "days"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}}
FLAT = {"type": "function", "name": "get_weather", "description": "The weather", "parameters": PARAMETERS}


class Person(BaseModel):
    name: str
    age: int


def valid(arguments):
    made = json.loads(arguments)
    assert set(made) == {"city", "days"} and isinstance(made["city"], str) and isinstance(made["days"], int), made


@check("chat, whole and streamed")
def chat():
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, seed=1)
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage.completion_tokens
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, seed=1, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content and chunks[-1].usage


@check("text completions")
def completions():
    assert client.completions.create(model=MODEL, prompt="1 2 3", max_tokens=5).choices[0].finish_reason


@check("a tool that must be called")
def required():
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}},
                   {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
                       {"type": "function", "function": {"name": "get_weather"}}]}}):
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL], tool_choice=choice, seed=1,
                                                max_tokens=MOST)
        assert answer.choices[0].finish_reason == "tool_calls", answer
        for call in answer.choices[0].message.tool_calls:
            assert call.function.name == "get_weather"
            valid(call.function.arguments)


@check("chat.completions.parse")
def parse():
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    answer = parse(model=MODEL, messages=HELLO, response_format=Person, seed=1, max_tokens=MOST)
    assert isinstance(answer.choices[0].message.parsed, Person)


@check("the loop of a tool")
def loop():
    answer = actor.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    message = answer.choices[0].message
    valid(message.tool_calls[0].function.arguments)
    answer = actor.chat.completions.create(model=MODEL, tools=[TOOL], messages=[
        *HELLO, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}])
    assert "rains" in answer.choices[0].message.content


@check("responses, whole, streamed and parsed")
def responses():
    made = client.responses.create(model=MODEL, input="Hello", max_output_tokens=20)
    assert made.status in ("completed", "incomplete")
    kinds = [event.type for event in client.responses.create(model=MODEL, input="Hello", max_output_tokens=20,
                                                              stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    made = client.responses.parse(model=MODEL, input="Hello", text_format=Person, max_output_tokens=MOST)
    assert isinstance(made.output_parsed, Person)


@check("responses: a tool that must be called")
def responses_required():
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        made = client.responses.create(model=MODEL, input="Hello", tools=[FLAT], tool_choice=choice,
                                       max_output_tokens=MOST)
        calls = [item for item in made.output if item.type == "function_call"]
        assert calls
        valid(calls[0].arguments)


@check("responses: the loop of a tool")
def responses_loop():
    said = [{"role": "user", "content": "What is the weather?"}]
    made = actor.responses.create(model=MODEL, input=said, tools=[FLAT])
    call = next(item for item in made.output if item.type == "function_call")
    said += [*made.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    assert "rains" in actor.responses.create(model=MODEL, input=said, tools=[FLAT]).output_text


@check("the list of models")
def models():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check("errors are the client's own")
def errors():
    error = refused(openai.BadRequestError, lambda: client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x" * 200_000}]))
    assert error.code == "context_length_exceeded" and "maximum context length is" in str(error), error


run()
