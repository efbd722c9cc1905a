"""Which tools a conversation may use, and what is kept running for it."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio import toolboxes
from dgemma.studio.toolboxes import Toolboxes, approval, is_chosen, rooms_of, with_room

SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"
CONFIG = json.dumps({"mcpServers": {"helper": {"command": sys.executable, "args": [str(SERVER)]}}})


@pytest.mark.parametrize(("chosen", "tool", "room", "holds"), [
    ({}, "python", "python", "off"),
    ({"python": "ask"}, "python", "python", "ask"),
    ({"web": "ask", "web_search": "auto"}, "web_search", "web", "auto"),
    ({"web": "ask", "web_search": "auto"}, "read_page", "web", "ask"),
    ({"web_search": "auto"}, "web_search", "web", "off"),
    ({"mcp:files": "auto"}, "files__read", "mcp:files", "auto"),
    ({"python": "auto"}, "python__read", "mcp:python", "off"),
    ({"python": "sometimes"}, "python", "python", "off"),
])
def test_a_tool_is_what_its_name_says_else_its_room_unless_that_is_off(chosen, tool, room, holds):
    assert approval(tool, room, chosen) == holds


def test_a_room_that_is_chosen_anew_forgets_what_was_said_of_single_tools():
    chosen = {"web": "ask", "web_search": "auto", "mcp:files": "ask"}
    assert with_room(chosen, "web", "auto") == {"web": "auto", "mcp:files": "ask"}
    assert with_room(chosen, "web", "off") == {"mcp:files": "ask"}
    assert rooms_of(chosen) == {"web": "ask", "mcp:files": "ask"}
    assert is_chosen(chosen) and not is_chosen({"web": "off", "web_search": "auto"})


@pytest.mark.parametrize(("text", "why"), [
    ("{", "no JSON"), ("[]", "not an object"), ("{}", "mcpServers is missing"),
    ('{"mcpServers": {"a": {"command": "x", "url": "y"}}}', "a needs a command, or a url"),
])
def test_a_configuration_that_cannot_be_read_leaves_the_old_one(store, text, why):
    boxes = Toolboxes(store)
    boxes.configure(CONFIG)
    with pytest.raises(DgemmaError, match=why):
        boxes.configure(text)
    assert boxes.config() == CONFIG and boxes.rooms()[-1] == "mcp:helper"
    boxes.configure(" ")
    assert boxes.servers() == []


def test_a_server_runs_for_a_conversation_until_it_is_closed(store):
    async def run():
        boxes = Toolboxes(store)
        boxes.configure(CONFIG)
        async with boxes.use("chat", {"mcp:helper": "ask"}) as first:
            names = {name: first.approval(name) for name in first.tools}
        async with boxes.use("chat", {"mcp:helper": "auto"}) as second:
            same = all(first.tools[name] is tool for name, tool in second.tools.items())
            later = set(map(second.approval, second.tools))
        async with boxes.use("chat", {}) as third:
            none = third.tools
        await boxes.close_all()
        return names, same, later, none

    names, same, later, none = asyncio.run(run())
    assert names and set(names.values()) == {"ask"} and all(name.startswith("helper__") for name in names)
    assert same and later == {"auto"} and none == {}


def test_a_server_that_is_configured_anew_is_started_anew(store):
    async def run():
        boxes = Toolboxes(store)
        boxes.configure(CONFIG)
        async with boxes.use("chat", {"mcp:helper": "ask"}) as first:
            pass
        boxes.configure(CONFIG.replace("]", '], "env": {"NEW": "1"}'))
        async with boxes.use("chat", {"mcp:helper": "ask"}) as second:
            fresh = not any(tool in first.tools.values() for tool in second.tools.values())
        await boxes.close_all()
        return fresh

    assert asyncio.run(run())


def test_tools_of_the_conversation_used_longest_ago_are_closed(store):
    async def run():
        boxes = Toolboxes(store)
        for number in range(toolboxes.MOST_OPEN + 2):
            async with boxes.use(f"chat {number}", {"web": "ask"}):
                pass
        kept = list(boxes._open)
        await boxes.close_all()
        return kept

    pytest.importorskip("ddgs", reason="ddgs is not here")
    kept = asyncio.run(run())
    assert len(kept) == toolboxes.MOST_OPEN and kept[-1] == f"chat {toolboxes.MOST_OPEN + 1}" and "chat 0" not in kept
