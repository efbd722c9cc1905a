"""`dgemma chat --tools`: what the model calls is shown, asked for, run in the sandbox, and told to the model."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dgemma.tools.sandbox import SandboxError, check_sandbox
from support.openai_server import OpenAIStandIn, call_chunks

MCP_SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"


@pytest.fixture
def server():
    with OpenAIStandIn() as stand_in:
        yield stand_in


@pytest.fixture
def _sandbox():
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def chat(dgemma_command, server):
    def run(stdin, *options, tools="bash", **how):
        return dgemma_command("chat", "--url", server.url, "--tools", tools, *options, "--no-visual", stdin=stdin,
                              **how)

    return run


@pytest.mark.usefixtures("_sandbox")
def test_a_call_is_shown_asked_for_run_and_told(chat, server):
    server.before = [call_chunks("bash", {"code": "echo $((6 * 7))"}, "Let me see.")]
    outcome = chat("what is 6 * 7?\ny\n", asked=True)
    assert "● bash\n  echo $((6 * 7))\n  Run it? [y]es, [n]o, [a]lways:" in outcome.err
    assert "│ 42\n" in outcome.err
    assert "Let me see." in outcome.out and "Hello there" in outcome.out and "42" not in outcome.out
    first, second = server.bodies
    assert [tool["function"]["name"] for tool in first["tools"]] == ["bash"]
    user, called, told = second["messages"]
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"code": "echo $((6 * 7))"}
    assert told["content"] == "42" and told["tool_call_id"] == called["tool_calls"][0]["id"]


@pytest.mark.parametrize("said", ["n", "", "what?\nno"])
def test_a_call_that_is_not_allowed_is_not_run(chat, server, said):
    server.before = [call_chunks("bash", {"code": "echo ran"})]
    outcome = chat(f"hi\n{said}\n", asked=True)
    assert "│ The user did not allow this call." in outcome.err
    assert server.bodies[1]["messages"][-1]["content"] == "The user did not allow this call."
    assert "Hello there" in outcome.out


@pytest.mark.usefixtures("_sandbox")
def test_always_asks_once(chat, server):
    server.before = [call_chunks("bash", {"code": "echo one"}), call_chunks("bash", {"code": "echo two"})]
    outcome = chat("hi\na\n", asked=True)
    assert outcome.err.count("Run it?") == 1
    assert "│ one" in outcome.err and "│ two" in outcome.err


def test_without_a_terminal_nothing_is_run(chat, server):
    server.before = [call_chunks("bash", {"code": "echo ran"})]
    outcome = chat("hi\n")
    assert "there is nobody to ask (/tools bash auto lets it run)" in outcome.err
    assert "│ ran" not in outcome.err


@pytest.mark.usefixtures("_sandbox")
def test_unless_it_was_allowed_before(chat, server):
    server.before = [call_chunks("bash", {"code": "echo ran"})]
    outcome = chat("/tools\n/tools bash auto\nhi\n")
    assert "bash (ask): Run a Bash script" in outcome.out and "bash (auto): " in outcome.out
    assert "│ ran" in outcome.err


@pytest.mark.usefixtures("_sandbox")
def test_files_go_to_a_folder_that_is_named(chat, server):
    server.before = [call_chunks("bash", {"code": "echo picture > plot.png"})]
    outcome = chat("/tools bash auto\nhi\n")
    path = Path(re.search(r"→ (\S+) \(8 B\)", outcome.err)[1])
    assert path.read_text() == "picture\n" and path.name == "plot.png"
    path.unlink()
    path.parent.rmdir()


def test_long_code_and_long_results_are_shown_in_part(chat, server):
    server.before = [call_chunks("bash", {"code": "\n".join(f"echo {n}" for n in range(40))})]
    outcome = chat("hi\nn\n", asked=True)
    assert "  echo 5\n  … 28 lines more …\n  echo 34\n" in outcome.err


def test_what_steers_a_terminal_is_made_harmless(chat, server):
    server.before = [call_chunks("bash", {"code": "echo \x1b[2Jx"})]
    assert "\x1b[2J" not in chat("hi\nn\n", asked=True).err


@pytest.mark.usefixtures("_sandbox")
def test_ctrl_c_ends_the_tool_and_the_conversation_goes_on(chat, server):
    mark = f"95{os.getpid()}"
    server.before = [call_chunks("bash", {"code": f"sleep {mark}"})]

    def running() -> bool:
        return any(f"sleep\0{mark}".encode() in read(entry) for entry in Path("/proc").glob("[0-9]*/cmdline"))

    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while not running() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    outcome = chat("/tools bash auto\nhi\nmore\n")
    stopper.join()
    assert "(stopped)" in outcome.err and "Hello there" in outcome.out
    assert not running()
    assert [message["content"] for message in server.bodies[1]["messages"]] == [
        "hi", "", "The user stopped this call.", "more"]


def test_the_end_of_stdin_at_a_question_stops_the_turn(chat, server):
    server.before = [call_chunks("bash", {"code": "echo ran"})]
    outcome = chat("hi\n", asked=True)
    assert "(stopped)" in outcome.err and "│" not in outcome.err
    assert len(server.bodies) == 1


def test_tools_of_an_mcp_server_can_be_called(chat, server, tmp_path):
    pytest.importorskip("mcp")
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"small": {"command": sys.executable, "args": [str(MCP_SERVER)]}}}))
    server.before = [call_chunks("small__add", {"a": 2, "b": 3})]
    outcome = chat("/tools small__add auto\nhi\n", "--mcp-config", config, tools="mcp")
    assert "● small__add\n  a: 2\n  b: 3\n" in outcome.err and "│ 5\n" in outcome.err
    assert server.bodies[1]["messages"][-1]["content"] == "5"


@pytest.mark.parametrize(("tools", "said"), [
    ("perl", "there are no tools 'perl': choose of python, bash, web, mcp"), ("mcp", "--mcp-config FILE")])
def test_tools_that_there_are_not_are_refused(chat, tools, said):
    outcome = chat("hi\n", tools=tools)
    assert outcome.code == 1 and said in outcome.err


def test_a_broken_configuration_is_refused_before_anything_is_loaded(chat, server, tmp_path):
    (tmp_path / "mcp.json").write_text("{}")
    outcome = chat("hi\n", "--mcp-config", tmp_path / "mcp.json")
    assert outcome.code == 1 and "mcpServers is missing" in outcome.err
    assert not server.keys


def test_without_tools_there_is_nothing_to_decide(dgemma_command, server):
    outcome = dgemma_command("chat", "--url", server.url, stdin="/tools\nhi\n")
    assert "there are no tools: dgemma chat --tools" in outcome.err
    assert "tools" not in server.bodies[0]
