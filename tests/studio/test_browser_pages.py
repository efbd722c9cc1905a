"""All pages in a real Chromium: what they ask, and of whom; what axe finds in them."""

import re

import pytest

from support.studio import PUZZLE
from support.studio_browser import CHROMIUM, WORDS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (apt-get install chromium)")]


def tour(page, link_to):
    """Use the studio: every page once, its name before it; an answer on the pages that make some."""
    link_to(page)
    paths = page.locator(".side-page").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert {"/", "/arena", "/settings"} <= set(paths)
    for path in paths:
        link_to(page, path, ready="main .q-btn, main textarea, main button")
        if path in ("/", "/arena"):
            page.fill(WORDS, PUZZLE)
            page.press(WORDS, "Enter")
            playwright.expect(page.locator(".cv-replay:visible")).to_have_count(1 if path == "/" else 2, timeout=30_000)
            page.locator(".cv-replay").first.click()
            page.locator(".cv-body .t").first.wait_for()
        yield path


def test_no_request_leaves_the_studio_while_its_pages_are_used(tab, link_to):
    page, asked = tab(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    paths = list(tour(page, link_to))
    own = re.match(r"http://([^/]+)/", page.url)[1]
    assert len(paths) >= 3 and len(asked) > 20
    assert [url for url in asked if not re.match(rf"(http|ws)://{re.escape(own)}/|data:|blob:", url)] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_on_any_page(tab, link_to, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    page, serious = tab(color_scheme=scheme), []
    for path in tour(page, link_to):
        page.wait_for_timeout(400)  # colours come in softly
        found = axe.Axe().run(page).response["violations"]
        serious += [f"{path} {fault['id']}: {node['html'][:150]}" for fault in found
                    if fault["impact"] in ("serious", "critical") for node in fault["nodes"]]
    assert not serious, "\n".join(serious)
