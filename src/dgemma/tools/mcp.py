"""Tools of MCP servers, which the usual JSON configuration names: started here, or reached by an address.

Works on: the `mcp` package's client. A server belongs to a task of its own, from its start to its end; calls come from
any task of the same event loop. A server that has ended is started again by the next call of a tool of its. Servers
run as the user does, outside of any sandbox: whoever configures one trusts it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import mimetypes
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dgemma.errors import DgemmaError
from dgemma.fields import Fields, read_json
from dgemma.tools.sandbox import clipped
from dgemma.tools.tool import Say, Tool, ToolError, ToolResult

if TYPE_CHECKING:
    from mcp import Client

_MOST_TOOLS = 200
_MOST_ABOUT = 4000  # characters of a tool's description
_MOST_FILE = 16 << 20  # bytes of a picture
_NAME = re.compile(r"[^A-Za-z0-9_-]+")


class McpError(DgemmaError):
    """A server that cannot be used, or a configuration that cannot be read."""


@dataclass(frozen=True)
class McpServer:
    """A server as the configuration has it: a ``command`` to start here, or a ``url`` (streamable HTTP)."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def read_servers(path: Path) -> list[McpServer]:
    """The servers of a configuration: {"mcpServers": {NAME: {"command", "args", "env"} or {"url", "headers"}}}.

    Those marked "disabled" are left out. Raises `McpError` naming the file and what is wrong.
    """
    return servers_in(read_json(path, McpError), str(path))


def servers_in(data: Any, source: str) -> list[McpServer]:
    """The servers of a configuration that has been read; ``source`` names it in errors. Raises `McpError`."""
    top = Fields(data, source, failure=McpError)
    servers = top.within("mcpServers")
    if servers is None:
        raise top.missing("mcpServers")
    found = []
    for name in servers.data:
        fields = servers.within(name)
        if fields is None:
            raise servers.wrong(name, "must be an object")
        if not fields.flag("disabled"):
            found.append(_server(name, fields))
    return found


def _server(name: str, fields: Fields) -> McpServer:
    command, url = fields.text("command"), fields.text("url")
    if (command is None) == (url is None):
        raise McpError(f"{fields.source}: {fields.prefix[:-1]} needs a command, or a url, and not both")
    kind = fields.text("type", "stdio" if command else "http")
    if kind not in (("stdio",) if command else ("http", "streamable-http", "streamable_http", "streamableHttp")):
        raise fields.wrong("type", 'must be "stdio" for a command, "http" for a url (SSE servers are not supported)')
    return McpServer(name, command, tuple(fields.texts("args") or ()), _texts(fields, "env"), fields.text("cwd"), url,
                     _texts(fields, "headers"))


def _texts(fields: Fields, name: str) -> dict[str, str]:
    inner = fields.within(name)
    return {} if inner is None else {key: inner.text(key, "") for key in inner.data}


class McpConnection:
    """A server and the task that it belongs to."""

    def __init__(self, server: McpServer, seconds: float):
        self.server = server
        self._seconds = seconds  # for its start
        self._client: Client | None = None
        self._owner: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._starting = asyncio.Lock()
        self._said: IO[bytes] | None = None  # what it wrote to stderr

    async def client(self) -> Client:
        """The client of a server that runs; it is started if it does not. Raises `McpError`."""
        async with self._starting:
            if self._client is None:
                await self._start()
            assert self._client is not None
            return self._client

    async def close(self) -> None:
        """End the server, if it runs, and forget it: `client` would start another."""
        self._closing.set()
        await _ended(self._owner)
        self._client, self._owner, self._closing = None, None, asyncio.Event()

    def last_words(self) -> str:
        """The end of what the server wrote to stderr, to go behind an error."""
        if self._said is None:
            return ""
        self._said.seek(0, 2)
        self._said.seek(max(self._said.tell() - 4000, 0))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return "; its last words: " + clipped(" / ".join(lines[-3:]), 400) if lines else ""

    async def _start(self) -> None:
        ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._owner = asyncio.create_task(self._own(ready))
        try:
            await asyncio.wait({self._owner, ready}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                cause = None if not self._owner.done() or self._owner.cancelled() else self._owner.exception()
                why = f"does not answer after {self._seconds:g} seconds" if cause is None else f"fails: {_why(cause)}"
                raise McpError(f"the MCP server {self.server.name} {why}{self.last_words()}") from cause
            self._client = ready.result()
        finally:
            if self._client is None:
                self._owner.cancel()
                await _ended(self._owner)

    async def _own(self, ready: asyncio.Future[Client]) -> None:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        server = self.server
        if server.command is not None:
            self._said = self._said or tempfile.TemporaryFile()  # noqa: SIM115  (it goes with this object)
            parameters = StdioServerParameters(command=server.command, args=list(server.args), env=dict(server.env),
                                               cwd=server.cwd)
            transport = stdio_client(parameters, errlog=self._said)  # type: ignore[arg-type]  (a file number is read)
            async with Client(transport) as client:
                ready.set_result(client)
                await self._closing.wait()
            return
        assert server.url is not None
        async with (create_mcp_http_client(headers=dict(server.headers)) as http,
                    Client(streamable_http_client(server.url, http_client=http)) as client):
            ready.set_result(client)
            await self._closing.wait()


class McpServers:
    """The servers of a configuration while they are used: ``async with McpServers(servers) as tools``.

    Raises `McpError` when one cannot be started.
    """

    def __init__(self, servers: list[McpServer], *, start_seconds: float = 30.0, call_seconds: float = 120.0):
        self._connections = [McpConnection(server, start_seconds) for server in servers]
        self._call_seconds = call_seconds

    async def __aenter__(self) -> list[Tool]:
        try:
            found = await asyncio.gather(*map(self._tools, self._connections))
        except BaseException:
            await self.__aexit__()
            raise
        return [tool for tools in found for tool in tools]

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections:
            await connection.close()

    async def _tools(self, connection: McpConnection) -> list[Tool]:
        client = await connection.client()
        listed, cursor = [], None
        try:
            async with asyncio.timeout(self._call_seconds):
                while True:
                    page = await client.list_tools(cursor=cursor)
                    listed += page.tools
                    cursor = page.next_cursor
                    if not cursor or len(listed) >= _MOST_TOOLS:
                        break
        except Exception as error:
            raise McpError(f"the MCP server {connection.server.name} does not list its tools: {_why(error)}"
                           f"{connection.last_words()}") from error
        return [self._tool(connection, tool) for tool in listed[:_MOST_TOOLS]]

    def _tool(self, connection: McpConnection, listed: Any) -> Tool:
        name, server = listed.name, connection.server.name

        async def call(arguments: dict[str, Any], say: Say) -> ToolResult:
            try:
                client = await connection.client()
            except McpError as error:
                raise ToolError(str(error)) from error
            try:
                async with asyncio.timeout(self._call_seconds):
                    result = await client.call_tool(name, arguments)
            except TimeoutError as error:
                raise ToolError(f"the MCP server {server} did not answer within {self._call_seconds:g} "
                                "seconds") from error
            except Exception as error:
                if not await _lives(client):
                    said = connection.last_words()
                    await connection.close()
                    raise ToolError(f"the MCP server {server} has ended ({_why(error)}){said}. The next call starts it "
                                    "again") from error
                raise ToolError(f"the MCP server {server} refuses: {_why(error)}") from error
            return _read(result)

        about = clipped(listed.description or listed.title or name, _MOST_ABOUT)
        return Tool(_NAME.sub("_", f"{server}__{name}")[:64], about, listed.input_schema, call, room=server)


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Wait for the end of a task, however it ends: who started it has been told, or is gone."""
    if task is not None:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()


async def _lives(client: Client) -> bool:
    try:
        async with asyncio.timeout(2.0):
            await client.list_tools(cache_mode="bypass")
    except Exception:  # whatever it is, it does not answer
        return False
    return True


def _read(result: Any) -> ToolResult:
    """A result's text, and its pictures and other files by a name."""
    texts, files = [], {}
    for part in result.content:
        if part.type == "text":
            texts.append(part.text)
        elif part.type in ("image", "audio"):
            ending = mimetypes.guess_extension(part.mime_type) or ""
            _keep(files, f"{part.type}-{len(files) + 1}{ending}", part.data, texts)
        elif part.type == "resource_link":
            texts.append(f"{part.name}: {part.uri}")
        elif getattr(part.resource, "text", None) is not None:
            texts.append(part.resource.text)
        else:
            ending = mimetypes.guess_extension(part.resource.mime_type or "") or ""
            _keep(files, f"file-{len(files) + 1}{ending}", part.resource.blob, texts)
    if files:
        texts.append(f"[files, shown to the user: {', '.join(files)}]")
    text = "\n".join(texts) or "[it answered nothing]"
    return ToolResult(f"Error: {text}" if result.is_error else text, files, failed=result.is_error)


def _keep(files: dict[str, bytes], name: str, data: str, texts: list[str]) -> None:
    try:
        if len(data) > _MOST_FILE * 4 // 3:
            raise ValueError(f"more than {_MOST_FILE >> 20} MB")
        files[name] = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        texts.append(f"[{name} cannot be shown: {error}]")


def _why(error: BaseException) -> str:
    """What an error says, the first of a group's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return clipped(str(error) or type(error).__name__, 400)
