"""anthropic: messages, streams, tools that must be called, parsed output, the tool runner, counting."""

import anthropic
from checks import ACTED, MODEL, REAL, check, refused, run
from pydantic import BaseModel

client, actor = anthropic.Anthropic(base_url=REAL, api_key="none"), anthropic.Anthropic(base_url=ACTED, api_key="none")
HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {"name": "get_weather", "description": "The weather", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"], "additionalProperties": False}}


class Person(BaseModel):
    name: str
    age: int


@check("messages, whole and streamed")
def messages():
    made = client.messages.create(model=MODEL, max_tokens=20, messages=HELLO, system="Be brief")
    assert made.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(model=MODEL, max_tokens=20, messages=HELLO) as stream:
        assert stream.get_final_message().usage.output_tokens


@check("a tool that must be called")
def required():
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"},
                   {"type": "any", "disable_parallel_tool_use": True}):
        made = client.messages.create(model=MODEL, max_tokens=300, messages=HELLO, tools=[TOOL], tool_choice=choice)
        calls = [block for block in made.content if block.type == "tool_use"]
        assert made.stop_reason == "tool_use" and calls, made
        assert set(calls[0].input) == {"city", "days"}


@check("the loop of a tool")
def loop():
    made = actor.messages.create(model=MODEL, max_tokens=300, messages=HELLO, tools=[TOOL])
    call = next(block for block in made.content if block.type == "tool_use")
    answer = actor.messages.create(model=MODEL, max_tokens=300, tools=[TOOL], messages=[
        *HELLO, {"role": "assistant", "content": made.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]}])
    assert "rains" in answer.content[0].text


@check("beta.messages.parse")
def parse():
    made = client.beta.messages.parse(model=MODEL, max_tokens=300, messages=HELLO, output_format=Person)
    parsed = getattr(made, "parsed_output", None) or made.parsed
    assert isinstance(parsed, Person)


@check("the tool runner")
def runner():
    @anthropic.beta_tool
    def get_weather(city: str, days: int) -> str:
        """The weather.

        Args:
            city: where
            days: how many
        """
        return f"rain in {city} for {days} days"

    runner = actor.beta.messages.tool_runner(model=MODEL, max_tokens=300, messages=HELLO, tools=[get_weather])
    last = None
    for message in runner:
        last = message
    assert "rains" in last.content[0].text


@check("counting tokens, also of a request that must call")
def count():
    assert client.messages.count_tokens(model=MODEL, messages=HELLO, tools=[TOOL]).input_tokens > 10
    assert client.messages.count_tokens(model=MODEL, messages=HELLO, tools=[TOOL],
                                        tool_choice={"type": "any"}).input_tokens > 10


@check("the list of models")
def models():
    assert MODEL in [model.id for model in client.models.list()]


@check("errors are the client's own")
def errors():
    error = refused(anthropic.BadRequestError, lambda: client.messages.create(
        model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "x" * 200_000}]))
    assert "prompt is too long" in str(error), error


run()
