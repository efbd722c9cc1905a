"""A small MCP server. `python mcp_server.py`: over stdio; `… http PORT`: streamable HTTP."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("small")


@server.tool()
def add(a: int, b: int) -> str:
    """The sum of two numbers."""
    return str(a + b)


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "(not set)")


@server.tool()
def picture() -> Image:
    """A picture."""
    return Image(data=b"\x89PNG not really", format="png")


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("it went wrong")


@server.tool()
def die() -> str:
    """Ends the server in the middle of a call."""
    print("goodbye, cruel world", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def sleep(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "awake"


if __name__ == "__main__":
    if sys.argv[1:2] == ["http"]:
        server.run("streamable-http", port=int(sys.argv[2]))
    else:
        server.run("stdio")
