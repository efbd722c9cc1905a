"""The web as tools: search results and pages' text, numbered so that an answer can cite them.

Works on: `ddgs` for searches, `fetch` and `trafilatura` for pages. Each page has one number in a conversation, however
often it is found. Only addresses of the public internet are asked (`dgemma.fetch`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from dgemma.fetch import Fetched, FetchError, FetchRules, fetch
from dgemma.tools.sandbox import clipped
from dgemma.tools.tool import Say, Source, Tool, ToolError, ToolResult, schema

_RESULTS = 6
_MOST_RESULTS = 20
_SNIPPET = 400  # characters of a result's text
_SECONDS = 30.0  # for a search, over all engines that are asked
_PAGE = 12_000  # characters of a page in one call
_RULES = FetchRules(("*",), max_bytes=5 << 20, seconds=15.0)
_PLAIN = ("text/plain", "text/markdown", "text/csv", "application/json")
_AGENT = {"User-Agent": "Mozilla/5.0 (compatible; dgemma)", "Accept": "text/html, text/plain;q=0.9, */*;q=0.1",
          "Accept-Language": "en;q=0.8, *;q=0.5"}
_CITE = "Cite what you use by its number, as in [1]."

# Results for a query, at most so many: `title`, `href`, `body` of each, as ddgs gives them.
Search = Callable[[str, int], Sequence[Mapping[str, Any]]]


def ddgs_search(query: str, most: int) -> Sequence[Mapping[str, Any]]:
    """What the search engines that ddgs knows find. Raises `ToolError`."""
    from ddgs import DDGS
    from ddgs.exceptions import DDGSException

    try:
        return DDGS(timeout=10).text(query, max_results=most)
    except DDGSException as error:
        if "No results" in str(error):
            return []
        raise ToolError(f"the search failed: {error}") from error


def guarded_fetch(url: str) -> Fetched:
    """A page of the public internet. Raises `FetchError`."""
    return fetch(url, _RULES, headers=_AGENT)


def web_tools(search: Search = ddgs_search, get: Callable[[str], Fetched] = guarded_fetch) -> list[Tool]:
    """web_search and read_page, which share their numbers."""
    sources: dict[str, Source] = {}

    def source(url: str, title: str) -> Source:
        if url not in sources:
            sources[url] = Source(len(sources) + 1, title or url, url)
        return sources[url]

    async def find(arguments: dict[str, Any], say: Say) -> ToolResult:
        query, most = arguments["query"].strip(), arguments.get("count", _RESULTS)
        if not query or not 1 <= most <= _MOST_RESULTS:
            raise ToolError(f"a search takes a query, and a count of 1 to {_MOST_RESULTS}")
        try:
            results = await asyncio.wait_for(asyncio.to_thread(search, query, most), _SECONDS)
        except TimeoutError as error:
            raise ToolError(f"the search was not done after {_SECONDS:g} seconds") from error
        lines, found = [], []
        for result in list(results)[:most]:
            url, title = str(result.get("href") or ""), _line(result.get("title"))
            if urlsplit(url).scheme in ("http", "https"):
                found.append(source(url, title))
                lines.append(f"[{found[-1].number}] {title}\n{url}\n{clipped(_line(result.get('body')), _SNIPPET)}")
        if not found:
            return ToolResult(f"Nothing was found for {query!r}.")
        return ToolResult("\n\n".join([*lines, _CITE]), sources=tuple(found))

    async def read(arguments: dict[str, Any], say: Say) -> ToolResult:
        url, start = arguments["url"].strip(), arguments.get("start", 0)
        url = next((known.url for known in sources.values() if url.strip("[]") == str(known.number)), url)
        if start < 0:
            raise ToolError("start is a number of characters from the beginning")
        try:
            page = await asyncio.to_thread(get, url)
            title, text = await asyncio.wait_for(asyncio.to_thread(_text, page), _SECONDS)
        except FetchError as error:
            raise ToolError(f"{url}: {error}") from error
        except TimeoutError as error:
            raise ToolError(f"{url}: this page is too tangled to be read") from error
        cited = source(url, title)
        shown = text[start : start + _PAGE]
        if len(text) > start + _PAGE:
            shown += f"\n[… {len(text) - start - _PAGE:,} characters more: read on with start={start + _PAGE}]"
        return ToolResult(f"[{cited.number}] {cited.title}\n{page.url}\n\n{shown}\n\n{_CITE}", sources=(cited,))

    return [
        Tool("web_search", "Search the web: titles, addresses and snippets of what is found, numbered.",
             schema(["query"], query={"type": "string", "description": "What to search for."},
                    count={"type": "integer", "description": f"How many results (default {_RESULTS})."}), find,
             room="web"),
        Tool("read_page", "Read a web page's text.",
             schema(["url"], url={"type": "string", "description": "Its address, or the number of a search result."},
                    start={"type": "integer", "description": "Where to read on in a long page, in characters."}), read,
             room="web"),
    ]


def _text(page: Fetched) -> tuple[str, str]:
    """A page's title and its text as Markdown, without menus and advertisements. Raises `ToolError`."""
    kind = page.type.partition(";")[0].strip().lower()
    if kind in _PLAIN:
        return "", page.data.decode(_charset(page.type), "replace")
    if kind not in ("text/html", "application/xhtml+xml", ""):
        raise ToolError(f"{page.url}: this is {kind[:60]}, not a page of text")
    from trafilatura import bare_extraction, extract

    text = extract(page.data, url=page.url, output_format="markdown", include_comments=False, include_links=True)
    if not text:
        raise ToolError(f"{page.url}: there is no text on this page (it may be made by a program in the browser)")
    found = bare_extraction(page.data, url=page.url, with_metadata=True)
    return _line(getattr(found, "title", "")), text


def _charset(type: str) -> str:
    import codecs

    _, _, named = type.lower().partition("charset=")
    try:
        return codecs.lookup(named.strip("\"' ;") or "utf-8").name
    except LookupError:
        return "utf-8"


def _line(text: Any) -> str:
    return " ".join(str(text or "").split())
