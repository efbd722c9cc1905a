"""The tools that somebody asks for by name, ready to be called.

Works on: the names of `KINDS`, MCP servers. What is missing is said before anything is loaded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from dgemma.errors import DgemmaError
from dgemma.tools.mcp import McpServer, McpServers
from dgemma.tools.sandbox import LANGUAGES, check_sandbox
from dgemma.tools.tool import Tool, Toolbox

KINDS = (*LANGUAGES, "web", "mcp")
_NEEDED = {"web": ("ddgs", "trafilatura"), "mcp": ("mcp",)}


def read_kinds(text: str | None, mcp_config: Path | None) -> list[str]:
    """The kinds that "python,web" or "all" names; a configuration alone means "mcp". Raises DgemmaError."""
    named = [name.strip() for name in (text or "").split(",") if name.strip()]
    if named == ["all"]:
        named = [kind for kind in KINDS if kind != "mcp"]
    if unknown := next((name for name in named if name not in KINDS), None):
        raise DgemmaError(f"there are no tools {unknown!r:.40}: choose of {', '.join(KINDS)} (python,web), or all")
    if "mcp" in named and mcp_config is None:
        raise DgemmaError("the tools of MCP servers need a configuration: --mcp-config FILE (docs/tools.md)")
    return [kind for kind in KINDS if kind in named or (kind == "mcp" and mcp_config is not None)]


@asynccontextmanager
async def open_toolbox(kinds: Collection[str], servers: Sequence[McpServer] = ()) -> AsyncIterator[Toolbox]:
    """The tools of these kinds, with MCP servers that run as long as they are used.

    Raises DgemmaError where a package, the sandbox or a server is missing or broken.
    """
    for kind in kinds:
        check_kind(kind)
    tools = list(_own_tools(kinds))
    if "mcp" not in kinds:
        yield Toolbox(tools)
        return
    async with McpServers(list(servers)) as of_servers:
        yield Toolbox([*tools, *of_servers])


def check_kind(kind: str) -> None:
    """Raises DgemmaError where the tools of a kind cannot be had: for want of a package, or of a sandbox."""
    if missing := [name for name in _NEEDED.get(kind, ()) if find_spec(name) is None]:
        raise DgemmaError(f'the {kind} tools need {", ".join(missing)}: pip install "dgemma[tools]"')
    if kind in LANGUAGES:
        check_sandbox()


def _own_tools(kinds: Collection[str]) -> Iterator[Tool]:
    if languages := [kind for kind in LANGUAGES if kind in kinds]:
        from dgemma.tools.code import code_tools

        yield from code_tools(languages)
    if "web" in kinds:
        from dgemma.tools.web import web_tools

        yield from web_tools()
