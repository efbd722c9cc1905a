"""instructor: every usual mode, and from_provider."""

import os

import anthropic
import instructor
import openai
from checks import MODEL, MOST, REAL, check, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


HELLO = [{"role": "user", "content": "Who?"}]
client = openai.OpenAI(base_url=f"{REAL}/v1", api_key="none")

for mode in ("TOOLS", "JSON_SCHEMA", "TOOLS_STRICT", "RESPONSES_TOOLS"):
    if hasattr(instructor.Mode, mode):
        @check(f"openai: {mode}")
        def of_mode(mode=mode):
            made = instructor.from_openai(client, mode=instructor.Mode[mode])
            most = {"max_output_tokens" if mode.startswith("RESPONSES") else "max_tokens": MOST}
            assert isinstance(made.chat.completions.create(model=MODEL, messages=HELLO, response_model=Person,
                                                           max_retries=0, **most), Person)


@check("anthropic: tools")
def of_anthropic():
    made = instructor.from_anthropic(anthropic.Anthropic(base_url=REAL, api_key="none"))
    assert isinstance(made.messages.create(model=MODEL, max_tokens=MOST, messages=HELLO, response_model=Person,
                                           max_retries=0), Person)


@check("from_provider")
def of_provider():
    os.environ |= {"OPENAI_BASE_URL": f"{REAL}/v1", "OPENAI_API_KEY": "none"}
    made = instructor.from_provider(f"openai/{MODEL}")
    assert isinstance(made.chat.completions.create(messages=HELLO, response_model=Person, max_retries=0,
                                                   max_tokens=MOST), Person)


run()
