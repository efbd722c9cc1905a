"""MCP servers: configured, started, asked; and what goes wrong with them is said."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from dgemma.tools.mcp import McpError, McpServer, McpServers, read_servers
from dgemma.tools.tool import Tool, ToolError, ToolResult

SCRIPT = str(Path(__file__).parents[1] / "support" / "mcp_server.py")
SMALL = McpServer("small", sys.executable, (SCRIPT,), {"GREETING": "hello"})


def ignore(text: str) -> None:
    pass


async def call(tools: list[Tool], name: str, /, **arguments) -> ToolResult:
    return await next(tool for tool in tools if tool.name == name).run(arguments, ignore)


def test_a_configuration_names_servers(tmp_path):
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {
        "files": {"command": "npx", "args": ["-y", "server"], "env": {"A": "b"}},
        "there": {"type": "http", "url": "https://example.com/mcp", "headers": {"Authorization": "Bearer x"}},
        "off": {"command": "x", "disabled": True}}}))
    assert read_servers(path) == [
        McpServer("files", "npx", ("-y", "server"), {"A": "b"}),
        McpServer("there", url="https://example.com/mcp", headers={"Authorization": "Bearer x"})]


def test_the_example_of_the_docs_is_a_configuration(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    path = tmp_path / "mcp.json"
    path.write_text(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert [server.name for server in read_servers(path)] == ["files", "company"]


@pytest.mark.parametrize(("text", "said"), [
    ("[]", "expected a JSON object"), ("{}", "mcpServers is missing"), ('{"mcpServers": 1}', "must be an object"),
    ('{"mcpServers": {"a": 1}}', "mcpServers.a must be an object"),
    ('{"mcpServers": {"a": {}}}', "mcpServers.a needs a command, or a url"),
    ('{"mcpServers": {"a": {"command": "x", "url": "y"}}}', "not both"),
    ('{"mcpServers": {"a": {"command": "x", "args": "y"}}}', "mcpServers.a.args must be a list"),
    ('{"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}', "mcpServers.a.env.A must be text"),
    ('{"mcpServers": {"a": {"url": "x", "type": "sse"}}}', "SSE"), ("{", "not valid JSON")])
def test_a_broken_configuration_is_an_error_that_names_the_place(tmp_path, text, said):
    path = tmp_path / "mcp.json"
    path.write_text(text)
    with pytest.raises(McpError, match=said) as caught:
        read_servers(path)
    assert str(path) in str(caught.value)


def test_a_servers_tools_are_listed_and_called():
    async def use() -> None:
        async with McpServers([SMALL]) as tools:
            add = next(tool for tool in tools if tool.name == "small__add")
            assert add.description == "The sum of two numbers."
            assert add.parameters["required"] == ["a", "b"]
            assert (await call(tools, "small__add", a=2, b=3)) == ToolResult("5")
            assert (await call(tools, "small__environment", name="GREETING")).text == "hello"
            shown = await call(tools, "small__picture")
            assert shown.files == {"image-1.png": b"\x89PNG not really"}
            failed = await call(tools, "small__fail")
            assert failed.failed and "it went wrong" in failed.text
            # An argument that its schema forbids is the server's to refuse.
            assert (await call(tools, "small__add", a="x", b=3)).failed

    asyncio.run(use())


def test_a_server_that_dies_is_told_and_started_again():
    async def use() -> None:
        async with McpServers([SMALL]) as tools:
            with pytest.raises(ToolError, match=r"small has ended .*goodbye, cruel world"):
                await call(tools, "small__die")
            assert (await call(tools, "small__add", a=1, b=1)).text == "2"

    asyncio.run(use())


def test_a_call_has_a_time_and_can_be_cancelled():
    async def use() -> None:
        async with McpServers([SMALL], call_seconds=0.5) as tools:
            with pytest.raises(ToolError, match=r"within 0\.5 seconds"):
                await call(tools, "small__sleep", seconds=30)
        async with McpServers([SMALL]) as tools:
            sleeping = asyncio.create_task(call(tools, "small__sleep", seconds=30))
            await asyncio.sleep(0.2)
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping
            assert (await call(tools, "small__add", a=1, b=1)).text == "2"

    asyncio.run(use())


@pytest.mark.parametrize(("command", "args", "said"), [
    ("no-such-command", (), "no-such-command"),
    (sys.executable, ("-c", "import sys; sys.exit('no licence')"), "no licence"),
    (sys.executable, ("-c", "import time; time.sleep(60)"), "does not answer after 1 seconds")])
def test_a_server_that_does_not_start_is_an_error(command, args, said):
    async def use() -> None:
        async with McpServers([McpServer("bad", command, args)], start_seconds=1.0):
            pass

    with pytest.raises(McpError, match=f"the MCP server bad .*{said}"):
        asyncio.run(use())


def test_a_server_is_reached_by_its_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, SCRIPT, "http", str(port)], stderr=subprocess.DEVNULL) as program:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)

            async def use() -> None:
                async with McpServers([McpServer("web", url=f"http://127.0.0.1:{port}/mcp")]) as tools:
                    assert (await call(tools, "web__add", a=2, b=3)).text == "5"
                    program.kill()
                    program.wait()
                    with pytest.raises(ToolError, match="the MCP server web has ended"):
                        await call(tools, "web__add", a=2, b=3)

            asyncio.run(use())
        finally:
            program.kill()


def test_an_address_where_nobody_is_is_an_error():
    async def use() -> None:
        async with McpServers([McpServer("web", url="http://127.0.0.1:9/mcp")], start_seconds=5):
            pass

    with pytest.raises(McpError, match="the MCP server web"):
        asyncio.run(use())
