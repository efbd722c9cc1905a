"""smolagents: an agent that calls tools, which always must call one."""

from checks import ACTED, MODEL, MOST, REAL, check, run
from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def get_weather(city: str, days: int) -> str:
    """The weather.

    Args:
        city: where
        days: how many
    """
    return "rain"


@check("a message")
def message():
    model = OpenAIServerModel(MODEL, api_base=f"{ACTED}/v1", api_key="none")
    assert model([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).content


@check("ToolCallingAgent: every step is a call of a tool that there is")
def agent():
    model = OpenAIServerModel(MODEL, api_base=f"{REAL}/v1", api_key="none", seed=1, max_tokens=MOST)
    made = ToolCallingAgent([get_weather], model, max_steps=2)
    made.run("What is the weather?")
    steps = [step for step in made.memory.steps if getattr(step, "tool_calls", None)]
    assert steps and all(call.name in ("get_weather", "final_answer") for step in steps for call in step.tool_calls)


run()
