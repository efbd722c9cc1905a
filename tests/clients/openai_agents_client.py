"""openai-agents: tools, output types, both together; chat and responses."""

from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import ACTED, MODEL, MOST, REAL, check, run
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
SEEN = []
BRIEF = ModelSettings(max_tokens=MOST)


class Person(BaseModel):
    name: str
    age: int


@function_tool
def get_weather(city: str, days: int) -> str:
    """The weather."""
    SEEN.append((city, days))
    return "rain"


def model(kind, url):
    return kind(MODEL, AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))


for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
    @check(f"{kind.__name__}: an output type")
    def output(kind=kind):
        agent = Agent("a", model=model(kind, REAL), output_type=Person, model_settings=BRIEF)
        assert isinstance(Runner.run_sync(agent, "Who?").final_output, Person)

    @check(f"{kind.__name__}: the loop of a tool")
    def loop(kind=kind):
        SEEN.clear()
        agent = Agent("a", model=model(kind, ACTED), tools=[get_weather])
        assert "rains" in Runner.run_sync(agent, "What is the weather?").final_output and SEEN == [("Paris", 3)]

    @check(f"{kind.__name__}: tools beside an output type")
    def both(kind=kind):
        agent = Agent("a", model=model(kind, REAL), tools=[get_weather], output_type=Person,
                      model_settings=BRIEF)
        try:
            made = Runner.run_sync(agent, "Who?", max_turns=3)
        except MaxTurnsExceeded:  # the bundled model prefers to call for ever: those are calls, and no inventions
            return
        assert isinstance(made.final_output, Person)


run()
