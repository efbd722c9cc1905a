"""ollama: chat, generate, tools, forms, models."""

import json

import ollama
from checks import ACTED, MODEL, REAL, check, run

client, actor = ollama.Client(REAL), ollama.Client(ACTED)
HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]


def get_weather(city: str, days: int) -> str:
    """The weather.

    Args:
        city: where
        days: how many
    """
    return f"rain in {city} for {days} days"


@check("chat and generate, whole and streamed")
def chat():
    assert client.chat(MODEL, HELLO, options={"num_predict": 20}).done
    assert list(client.generate(MODEL, "Hello", stream=True, options={"num_predict": 20}))[-1].done


@check("the loop of a tool")
def loop():
    made = actor.chat(MODEL, HELLO, tools=[get_weather])
    call = made.message.tool_calls[0].function
    said = get_weather(**call.arguments)
    answer = actor.chat(MODEL, [*HELLO, made.message, {"role": "tool", "tool_name": call.name, "content": said}],
                        tools=[get_weather])
    assert "rains" in answer.message.content


@check("a form")
def form():
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    assert isinstance(json.loads(client.chat(MODEL, HELLO, format=schema).message.content)["age"], int)


@check("models")
def models():
    assert client.list().models and client.ps().models and client.show(MODEL).capabilities


run()
