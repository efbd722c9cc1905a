"""llm: the command, over its file of further OpenAI models."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ACTED, MODEL, MOST, REAL, check, run

FOLDER = Path(tempfile.mkdtemp())
FOLDER.joinpath("extra-openai-models.yaml").write_text("".join(
    f"- model_id: {name}\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: none\n"
    "  supports_schema: true\n  supports_tools: true\n" for name, url in (("real", REAL), ("acted", ACTED))))


def llm(*arguments):
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": "none"}
    done = subprocess.run([Path(sys.executable).with_name("llm"), *arguments], text=True, capture_output=True,
                          env=environment, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@check("a prompt")
def prompt():
    assert "Hello" in llm("-m", "acted", "Hello", "--key", "none")
    assert "Hello" in llm("-m", "acted", "Hello", "--no-stream", "--key", "none")


@check("a schema")
def schema():
    assert '"age"' in llm("-m", "real", "Who?", "--schema", "name, age int", "-o", "max_tokens", str(MOST),
                          "--key", "none")


@check("a tool")
def tool():
    code = "def get_weather(city: str, days: int) -> str:\n    'The weather'\n    return 'rain'\n"
    assert "rains" in llm("-m", "acted", "What is the weather?", "--functions", code, "--key", "none")


run()
