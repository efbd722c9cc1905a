"""A real Chromium for the studio's tests: tabs in which nothing goes wrong unseen, and a studio to open in them."""

import re
import shutil

import pytest

from support.studio import launch_link, studio

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
                None)
WORDS = ".compose-box textarea"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def tab(browser):
    """A function: a new page, of a browser of its own unless ``like`` another page. In none of them anything goes
    wrong but what is ``foreseen``, and none asks another server for anything."""
    contexts, wrong, elsewhere = [], [], []

    def asked(request):
        if not re.match(r"((http|ws)://127\.0\.0\.1:\d+/|data:|blob:)", request.url):
            elsewhere.append(request.url)

    def make(like=None, foreseen=None, **options):
        def heard(message):
            if message.type == "error" and not (foreseen and re.search(foreseen, message.text)):
                wrong.append(message.text)

        context = like.context if like else browser.new_context(**{**DESKTOP, **options})
        if context not in contexts:
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.on("websocket", asked)
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == [] and elsewhere == []


@pytest.fixture(scope="module")
def sudoku(tmp_path_factory):
    """The real thing, with the bundled model: its process."""
    with studio(tmp_path_factory.mktemp("studio")) as process:
        yield process


@pytest.fixture(scope="module")
def link_to(sudoku, browser):
    """A function that signs a page in: the launch link works once, and its session is lent to the others."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(launch_link(sudoku))
    page.wait_for_selector(WORDS)
    cookies = context.cookies()
    url = re.match(r"http://[^/]+", page.url)[0]
    context.close()

    def sign_in(page, path="/", ready=WORDS):
        page.context.add_cookies(cookies)
        page.goto(f"{url}{path}")
        page.wait_for_selector(ready)

    return sign_in


def no_serious_fault(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    page.wait_for_timeout(400)  # drawers slide, and are faint while they do
    # Quasar's bar at the top, which is there while something is fetched, has no name.
    found = axe.Axe().run(page, {"exclude": [[".q-loading-bar"]]}).response["violations"]
    serious = [f"{fault['id']}: {node['html'][:150]}" for fault in found if fault["impact"] in ("serious", "critical")
               for node in fault["nodes"]]
    assert not serious, "\n".join(serious)
    return True
