"""The tools of conversations: which of them each has chosen, and what runs for it: scratch folders, MCP servers.

Works on: `dgemma.tools`, a store's settings. Knows nothing of: pages, models.

What a conversation chose is in its options under "tools": a room (`CODE`, "web", "mcp:SERVER") or a tool's name, and
"ask" or "auto". A tool is what its name says, else what its room says, else off. A room that is off is so with all its
tools.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from dgemma.errors import DgemmaError
from dgemma.studio.store import Store
from dgemma.tools.mcp import McpServer, servers_in
from dgemma.tools.opening import check_kind, open_toolbox
from dgemma.tools.sandbox import LANGUAGES
from dgemma.tools.tool import Approval, Tool, Toolbox

CODE = tuple(LANGUAGES)
MCP = "mcp:"
ABOUT = {
    "python": "Runs programs in a sandbox on this machine: no network, no files but its own.",
    "bash": "Runs scripts in the same sandbox.",
    "web": "Searches the web and reads pages. Search engines and pages see what is asked.",
}
MOST_OPEN = 8  # conversations whose tools are kept ready
_SETTING = "mcp_servers"
_SOURCE = "this configuration"

Choice = Mapping[str, str]


@dataclass
class _Open:
    """Tools of a part that run: ``server`` is None for those that are no server's."""

    stack: AsyncExitStack
    tools: list[Tool]
    server: McpServer | None


class Toolboxes:
    """Opens tools when a conversation first needs them, and keeps them: its files and page numbers stay."""

    def __init__(self, store: Store):
        self._store = store
        self._open: OrderedDict[str, dict[str, _Open]] = OrderedDict()  # by conversation, then by part
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._uses: Counter[str] = Counter()  # of conversations, by turns that go on

    # ---- what there is to choose ----

    def config(self) -> str:
        """The configuration of MCP servers, as it was given; "" for none."""
        return self._store.setting(_SETTING, "")

    def configure(self, text: str) -> list[McpServer]:
        """Keep a configuration ("" for none). Raises DgemmaError, and keeps the old one, when it cannot be read."""
        servers = _servers(text)
        self._store.set_setting(_SETTING, text.strip() or None)
        return servers

    def servers(self) -> list[McpServer]:
        return _servers(self.config())

    def rooms(self) -> list[str]:
        """All that a conversation may choose of."""
        return [*ABOUT, *(MCP + server.name for server in self.servers())]

    async def missing(self) -> dict[str, str]:
        """The rooms that cannot be had here, and why."""
        found = {}
        for room in self.rooms():
            try:
                await asyncio.to_thread(check_kind, _kind(room))
            except DgemmaError as error:
                found[room] = str(error)
        return found

    # ---- what is open ----

    @asynccontextmanager
    async def use(self, conversation: str, chosen: Choice) -> AsyncIterator[Toolbox]:
        """The tools that a conversation chose. Raises DgemmaError where some cannot be had."""
        self._uses[conversation] += 1
        try:
            yield await self._opened(conversation, chosen)
        finally:
            self._uses[conversation] -= 1
            unused = [other for other in self._open if not self._uses[other]]
            for other in unused[: max(len(self._open) - MOST_OPEN, 0)]:
                await self.close(other)

    async def _opened(self, conversation: str, chosen: Choice) -> Toolbox:
        rooms = [room for room in self.rooms() if chosen.get(room) in ("ask", "auto")]
        async with self._locks[conversation]:
            parts = self._open.setdefault(conversation, {})
            self._open.move_to_end(conversation)
            servers = {MCP + server.name: server for server in self.servers()}
            tools: list[Tool] = []
            approvals: dict[str, Approval] = {}
            for part in dict.fromkeys("code" if room in CODE else room for room in rooms):
                of_part = await self._part(parts, part, servers.get(part))
                tools += of_part
                approvals |= {tool.name: approval(tool.name, tool.name if part == "code" else part, chosen)
                              for tool in of_part}
        return Toolbox(tools, approvals)

    async def _part(self, parts: dict[str, _Open], part: str, server: McpServer | None) -> list[Tool]:
        known = parts.get(part)
        if known is None or known.server != server:
            if known is not None:
                del parts[part]
                await known.stack.aclose()
            kinds = CODE if part == "code" else (_kind(part),)
            for kind in kinds:
                await asyncio.to_thread(check_kind, kind)  # it starts a program; opened below, it is known to work
            stack = AsyncExitStack()
            toolbox = await stack.enter_async_context(open_toolbox(kinds, [server] if server else []))
            known = parts[part] = _Open(stack, list(toolbox.tools.values()), server)
        return known.tools

    async def close(self, conversation: str) -> None:
        """End what runs for a conversation."""
        async with self._locks[conversation]:
            for part in self._open.pop(conversation, {}).values():
                await part.stack.aclose()

    async def close_all(self) -> None:
        for conversation in list(self._open):
            await self.close(conversation)


def is_chosen(chosen: Choice) -> bool:
    """Whether a conversation has any tools."""
    return any(value in ("ask", "auto") for value in rooms_of(chosen).values())


def rooms_of(chosen: Choice) -> dict[str, str]:
    """What a choice says of rooms alone."""
    return {name: value for name, value in chosen.items() if name in ABOUT or name.startswith(MCP)}


def with_room(chosen: Choice, room: str, value: Approval) -> dict[str, str]:
    """A choice in which a room is another: what was said of single tools is said no more."""
    others = {name: old for name, old in rooms_of(chosen).items() if name != room}
    return others if value == "off" else {**others, room: value}


def approval(tool: str, room: str, chosen: Choice) -> Approval:
    """What holds of a tool of a room."""
    of_room = chosen.get(room, "off")
    value = of_room if of_room == "off" else chosen.get(tool, of_room)
    return value if value in ("ask", "auto") else "off"  # type: ignore[return-value]


def _kind(room: str) -> str:
    return "mcp" if room.startswith(MCP) else room


def _servers(text: str) -> list[McpServer]:
    if not text.strip():
        return []
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{_SOURCE} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise DgemmaError(f"{_SOURCE} is not an object: it begins {{\"mcpServers\": …}}")
    return servers_in(data, _SOURCE)
