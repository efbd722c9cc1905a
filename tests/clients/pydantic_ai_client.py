"""pydantic-ai: output by a tool that must be called, by a form, tools beside a form."""

import asyncio

from checks import ACTED, MODEL, MOST, REAL, check, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


def chat(url):
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def responses(url):
    return OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def messages(url):
    # Of a model whose name is not Claude's it does not know what it can do.
    return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="none"),
                          profile=ModelProfile(supports_json_schema_output=True))


def brief(kind, output_type):
    agent = Agent(kind(REAL), output_type=output_type)
    return agent.run_sync("Who?", model_settings={"max_tokens": MOST}).output


for kind in (chat, responses, messages):
    @check(f"{kind.__name__}: output by a tool that must be called")
    def tool(kind=kind):
        assert isinstance(brief(kind, Person), Person)

    @check(f"{kind.__name__}: output by a form")
    def native(kind=kind):
        assert isinstance(brief(kind, NativeOutput(Person)), Person)

    @check(f"{kind.__name__}: the loop of a tool")
    def loop(kind=kind):
        agent = Agent(kind(ACTED))
        seen = []

        @agent.tool_plain
        def get_weather(city: str, days: int) -> str:
            """The weather."""
            seen.append((city, days))
            return "rain"

        assert "rains" in agent.run_sync("What is the weather?").output and seen == [("Paris", 3)]


@check("chat: a stream")
def stream():
    async def told():
        async with Agent(chat(ACTED)).run_stream("Hello") as result:
            return [text async for text in result.stream_text()]
    assert asyncio.run(told())[-1]


run()
