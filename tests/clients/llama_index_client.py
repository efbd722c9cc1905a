"""llama-index: OpenAILike as a chat model, a structured one, and a caller of functions."""

from checks import ACTED, MODEL, MOST, REAL, check, run
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str, days: int) -> str:
    """The weather."""
    return "rain"


def model(url):
    return OpenAILike(model=MODEL, api_base=f"{url}/v1", api_key="none", is_chat_model=True,
                      is_function_calling_model=True, max_retries=0, max_tokens=MOST)


@check("chat, whole and streamed")
def chat():
    said = [ChatMessage(role="user", content="Hello")]
    assert model(ACTED).chat(said).message.content and list(model(ACTED).stream_chat(said))


@check("as_structured_llm")
def structured():
    made = model(REAL).as_structured_llm(Person).chat([ChatMessage(role="user", content="Who?")])
    assert isinstance(made.raw, Person)


@check("a tool")
def tool():
    made = model(ACTED).chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg="What is the weather?")
    assert model(ACTED).get_tool_calls_from_response(made)[0].tool_kwargs == {"city": "Paris", "days": 3}


@check("a tool that must be called")
def required():
    made = model(REAL).chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg="Hello", tool_required=True)
    assert set(model(REAL).get_tool_calls_from_response(made)[0].tool_kwargs) == {"city", "days"}


run()
