"""litellm: this server as openai, anthropic and ollama."""

import json

import litellm
from checks import ACTED, MODEL, MOST, REAL, check, run
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"]}}}


class Person(BaseModel):
    name: str
    age: int


def ask(kind, url, **options):
    base = {"openai": f"{url}/v1", "anthropic": url, "ollama_chat": url}[kind]
    return litellm.completion(f"{kind}/{MODEL}", HELLO, api_base=base, api_key="none", **options)


for kind in ("openai", "anthropic", "ollama_chat"):
    @check(f"{kind}: whole and streamed")
    def whole(kind=kind):
        assert ask(kind, ACTED).choices[0].message.content
        assert list(ask(kind, ACTED, stream=True))

    @check(f"{kind}: a form")
    def form(kind=kind):
        made = ask(kind, REAL, response_format=Person, max_tokens=MOST).choices[0].message.content
        Person(**json.loads(made))

    @check(f"{kind}: a tool")
    def tool(kind=kind):
        made = ask(kind, ACTED, tools=[TOOL]).choices[0].message.tool_calls[0].function
        assert json.loads(made.arguments) == {"city": "Paris", "days": 3}

for kind in ("openai", "anthropic"):
    @check(f"{kind}: a tool that must be called")
    def required(kind=kind):
        made = ask(kind, REAL, tools=[TOOL], tool_choice="required", max_tokens=MOST).choices[0].message.tool_calls
        assert set(json.loads(made[0].function.arguments)) >= {"city", "days"}


@check("a prompt that is too long is told as such")
def too_long():
    try:
        litellm.completion(f"openai/{MODEL}", [{"role": "user", "content": "x" * 200_000}], api_base=f"{REAL}/v1",
                           api_key="none")
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was taken")


run()
