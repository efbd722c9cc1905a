"""Search results and pages' text, numbered; no network is needed: a stand-in searches, and gives the pages."""

from __future__ import annotations

import asyncio

import pytest

from dgemma.fetch import Fetched, FetchError
from dgemma.tools.tool import Source, ToolError, ToolResult
from dgemma.tools.web import guarded_fetch, web_tools

# As ddgs gives them.
RESULTS = [
    {"title": "Diffusion  models", "href": "https://a.example/diffusion", "body": "About\ndenoising. " + "x" * 600},
    {"title": "Gemma", "href": "https://b.example/gemma", "body": "A family of models."},
    {"title": "bad", "href": "javascript:alert(1)", "body": ""},
]
PAGE = """<html><head><title>How denoising works</title></head><body>
<nav><a href="/">Home</a> <a href="/all">All</a></nav>
<article><h1>Denoising</h1><p>{}</p><p>It ends with <a href="https://c.example/">text</a>.</p></article>
<footer>Cookies, imprint</footer></body></html>""".format("A canvas of noise becomes clearer in every step. " * 12)


def search(query, most):
    return RESULTS if query == "denoising" else []


def get(url):
    kinds = {"/page": ("text/html; charset=utf-8", PAGE.encode()),
             "/plain": ("text/plain; charset=latin-1", b"na\xefve"),
             "/pdf": ("application/pdf", b"%PDF"), "/empty": ("text/html", b"<html><body></body></html>"),
             "/long": ("text/plain", b"x" * 30_000), "/diffusion": ("text/plain", b"found")}
    path = "/" + url.rpartition("/")[2]
    if path not in kinds:
        raise FetchError("a.example answers 404")
    return Fetched(kinds[path][1], url, kinds[path][0])


def called(tools, name, /, **arguments) -> ToolResult:
    return asyncio.run(next(tool for tool in tools if tool.name == name).run(arguments, lambda _: None))


def test_results_are_numbered_with_their_addresses():
    result = called(web_tools(search, get), "web_search", query=" denoising ")
    assert result.text.startswith("[1] Diffusion models\nhttps://a.example/diffusion\nAbout denoising. xxx")
    assert "[2] Gemma\nhttps://b.example/gemma\nA family of models." in result.text
    assert "javascript" not in result.text and result.text.endswith("Cite what you use by its number, as in [1].")
    assert result.sources == (Source(1, "Diffusion models", "https://a.example/diffusion"),
                              Source(2, "Gemma", "https://b.example/gemma"))


def test_a_page_keeps_its_number_and_can_be_read_by_it():
    tools = web_tools(search, get)
    called(tools, "web_search", query="denoising")
    assert called(tools, "read_page", url="https://a.example/plain").sources[0].number == 3
    assert called(tools, "read_page", url="[1]").text.startswith("[1] Diffusion models\nhttps://a.example/diffusion")
    assert called(tools, "web_search", query="denoising").sources[1].number == 2


def test_nothing_found_is_said():
    assert called(web_tools(search, get), "web_search", query="xyz").text == "Nothing was found for 'xyz'."


@pytest.mark.parametrize("arguments", [{"query": " "}, {"query": "x", "count": 0}, {"query": "x", "count": 1000}])
def test_a_search_for_nothing_is_refused(arguments):
    with pytest.raises(ToolError, match="takes a query"):
        called(web_tools(search, get), "web_search", **arguments)


def test_a_pages_text_is_told_without_its_menus():
    pytest.importorskip("trafilatura", exc_type=ImportError)
    result = called(web_tools(search, get), "read_page", url="https://a.example/page")
    assert result.text.startswith("[1] Denoising\nhttps://a.example/page\n\n# Denoising")
    assert "[text](https://c.example/)" in result.text
    assert "Cookies" not in result.text and "Home" not in result.text


def test_a_page_of_nothing_is_an_error():
    pytest.importorskip("trafilatura", exc_type=ImportError)
    with pytest.raises(ToolError, match="no text on this page"):
        called(web_tools(search, get), "read_page", url="https://a.example/empty")


def test_plain_text_is_read_as_it_is():
    assert "naïve" in called(web_tools(search, get), "read_page", url="https://a.example/plain").text


def test_a_long_page_is_read_in_parts():
    tools = web_tools(search, get)
    first = called(tools, "read_page", url="https://a.example/long").text
    assert "[… 18,000 characters more: read on with start=12000]" in first
    assert "characters more" not in called(tools, "read_page", url="https://a.example/long", start=24_000).text


@pytest.mark.parametrize(("url", "said"), [
    ("https://a.example/pdf", "this is application/pdf, not a page of text"), ("https://a.example/no", "answers 404")])
def test_what_cannot_be_read_is_said(url, said):
    with pytest.raises(ToolError, match=said):
        called(web_tools(search, get), "read_page", url=url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://localhost/", "http://169.254.169.254/latest/",
                                 "http://[::1]/", "file:///etc/passwd", "http://10.0.0.1/", "ftp://a.example/", "x"])
def test_only_the_public_internet_is_asked(url):
    with pytest.raises(ToolError, match=r"not an address of the public internet|does not fetch from"):
        called(web_tools(search, guarded_fetch), "read_page", url=url)
