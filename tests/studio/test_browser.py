"""The studio in a real Chromium: the first start, a chat whose canvas is seen, a reload while it runs."""

import re
import shutil

import pytest

from dgemma.studio.store import Store
from support.studio import PUZZLE, demo, launch_link, studio

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
                None)
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (apt-get install chromium)")]
WORDS = ".compose-box textarea"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser():
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
        if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", request.url):
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

    def sign_in(page, path="/"):
        page.context.add_cookies(cookies)
        page.goto(f"{url}{path}")
        page.wait_for_selector(WORDS)

    return sign_in


def ask(page, words):
    page.fill(WORDS, words)
    page.press(WORDS, "Enter")


def finished(page, answers=1):
    """Wait until so many answers are over."""
    playwright.expect(page.locator(".cv-replay:visible")).to_have_count(answers, timeout=30_000)


def test_the_first_start_ends_in_a_chat_that_solves_a_sudoku(tab, link_to):
    page = tab()
    link_to(page)
    page.get_by_text("An easy Sudoku").click()
    finished(page)
    assert "534678912" in page.locator(".answer .prose").last.inner_text()
    assert re.search(r"\d+ steps · 89 tokens · .* tokens/s · finished", page.locator(".cv-status").inner_text())
    assert re.search(r"/c/[\w-]+$", page.url)


def test_the_link_works_once_and_strangers_are_turned_away(tab, sudoku, link_to):
    page = tab(foreseen="403")
    page.goto(launch_link(sudoku))
    assert "used before" in page.locator("main").inner_text()
    page.goto(re.match(r"http://[^/]+", page.url)[0] + "/c/abc")
    assert page.url.endswith("/signin")


def test_an_answer_can_be_walked_through_step_by_step(tab, link_to):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    slider = page.get_by_role("slider", name="Step")
    last = page.locator(".cv-body").inner_text()
    slider.fill("0")
    assert "step 1/" in page.locator(".cv-where").inner_text()
    assert page.locator(".cv-body").inner_text() != last
    page.locator(".cv-body .t").nth(3).click()
    assert page.locator(".cv-life").get_by_text("Position 4").is_visible()
    page.get_by_role("button", name="Play").click()
    playwright.expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert page.locator(".cv-body").inner_text() == last


def test_a_pinned_row_is_kept_when_the_rest_is_denoised_again(tab, link_to):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    page.get_by_role("slider", name="Step").press("ArrowLeft")
    page.locator(".cv-body").press("ArrowLeft")
    page.locator(".cv-body").press("End")
    page.get_by_role("button", name="Edit and denoise again").click()
    tokens = page.locator(".ce-body .t")
    tokens.nth(0).click()
    tokens.nth(8).click(modifiers=["Shift"])
    page.get_by_role("button", name="Pin", exact=True).click()
    assert page.locator(".ce-body .t.pinned").count() == 9
    page.locator(".ce-body").press("ArrowRight")
    page.locator(".ce-body").press("Shift+ArrowRight")
    page.keyboard.press("t")
    page.get_by_role("textbox", name="Text in place").fill("6")
    page.get_by_role("button", name="Put in").click()
    playwright.expect(page.locator(".ce-note")).to_contain_text("2 tokens became 1 token: what follows moved back by 1")
    page.get_by_role("button", name="Undo").click()
    page.get_by_label("The rest").select_option("anew")
    page.get_by_role("button", name="Denoise again").click()
    playwright.expect(page.locator(".answer .branches")).to_contain_text("2 / 2")
    finished(page)
    page.get_by_role("button", name="Replay").click()
    assert page.locator(".cv-body .t.pinned").count() == 9
    assert page.locator(".answer .prose").last.inner_text().startswith("534678912")


def test_what_cannot_be_denoised_is_told_in_the_editor(tab, link_to):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    page.get_by_role("button", name="Edit and denoise again").click()
    page.get_by_role("button", name="Denoise again").click()
    playwright.expect(page.get_by_role("alert").filter(has_text="clear the tokens")).to_be_visible()


def test_a_denoising_is_saved_as_a_page_that_works_alone_and_as_a_trace_that_is_opened_again(tab, link_to, tmp_path):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    files = {}
    for kind, ending in (("SVG", "svg"), ("GIF", "gif"), ("HTML", "html"), ("Trace", "jsonl")):
        with page.expect_download() as loading:
            page.get_by_role("button", name=f"Save as {kind}").click()
        files[kind] = tmp_path / f"film.{ending}"
        loading.value.save_as(files[kind])
    assert files["SVG"].read_bytes()[:4] == b"<svg" and files["GIF"].read_bytes()[:3] == b"GIF"
    page.goto(re.match(r"http://[^/]+", page.url)[0] + "/traces")
    page.locator("input[type=file]").set_input_files(files["Trace"])
    page.get_by_role("slider", name="Step").fill("0")
    assert "step 1/" in page.locator(".cv-where").inner_text()
    alone = page.context.browser.new_context(offline=True, service_workers="block").new_page()
    wrong = []
    alone.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    alone.on("pageerror", lambda error: wrong.append(str(error)))
    alone.goto(files["HTML"].as_uri())
    alone.keyboard.press("End")
    assert "534678912" in alone.locator(".cv-body").inner_text()
    alone.keyboard.press("Home")
    assert "step 1/" in alone.locator(".cv-where").inner_text()
    alone.context.close()
    assert wrong == []


def test_regenerating_and_editing_make_branches_that_can_be_switched(tab, link_to):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Make this answer again").click()
    playwright.expect(page.locator(".answer .branches")).to_contain_text("2 / 2")
    finished(page)
    page.locator(".answer").get_by_role("button", name="The version before").click()
    playwright.expect(page.locator(".answer .branches")).to_contain_text("1 / 2")
    page.locator(".question").hover()
    page.get_by_role("button", name="Edit, and ask again").click()
    page.get_by_role("textbox", name="Edit the message").fill("Hello?")
    page.get_by_role("button", name="Ask again").click()
    playwright.expect(page.locator(".question .bubble")).to_have_text("Hello?")
    playwright.expect(page.locator(".question .branches")).to_contain_text("2 / 2")


def test_a_reload_and_a_second_tab_attach_to_what_is_running(tab, tmp_path):
    with demo(tmp_path, seconds=0.25, steps=24) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")  # when the server goes
        page.goto(link)
        page.wait_for_selector(WORDS)
        ask(page, "How does a text come out of noise?")
        page.wait_for_selector(".cv.live .t")
        page.reload()
        page.wait_for_selector(".cv.live .t")
        second = tab(like=page, foreseen="WebSocket|ERR_CONNECTION_REFUSED")
        second.goto(page.url)
        second.wait_for_selector(".cv.live .t")
        assert page.get_by_role("button", name="Stop").is_visible()
        for one in (page, second):
            finished(one)
            assert "committed as text" in one.locator(".answer .prose").last.inner_text()


def test_stop_stops_and_the_conversation_goes_on(tab, tmp_path):
    with demo(tmp_path, seconds=0.3, steps=100) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")  # when the server goes
        page.goto(link)
        page.wait_for_selector(WORDS)
        ask(page, "Go on for ever")
        page.wait_for_selector(".cv.live .t")
        page.keyboard.press("Escape")
        finished(page)
        assert "stopped by you" in page.locator(".cv-status").inner_text()
        assert page.get_by_role("button", name="Send").is_visible()


def test_conversations_are_renamed_found_and_deleted(tab, link_to):
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)

    def menu(name):
        page.locator(".conversation.here").hover()
        page.locator(".conversation.here").get_by_role("button", name="More").click()
        page.get_by_role("menuitem", name=name).click()

    menu("Rename")
    page.get_by_role("textbox", name="Name").fill("A puzzle of mine")
    page.get_by_role("button", name="Rename").click()
    playwright.expect(page.locator(".bar-title")).to_have_text("A puzzle of mine")
    page.get_by_role("textbox", name="Search conversations").fill("puzzle mine")
    playwright.expect(page.locator(".conversation")).to_have_count(1)
    page.get_by_role("textbox", name="Search conversations").fill("")
    playwright.expect(page.locator(".conversations .group-name").first).to_be_visible()
    menu("Delete")
    page.get_by_role("button", name="Delete").click()
    playwright.expect(page.get_by_text("A puzzle of mine")).to_have_count(0)
    playwright.expect(page.get_by_text("Watch a text come into focus")).to_be_visible()


def test_a_server_that_is_stopped_keeps_what_there_was(tab, tmp_path):
    with demo(tmp_path, seconds=0.05, steps=10) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")
        page.goto(link)
        page.wait_for_selector(WORDS)
        ask(page, "Once")
        finished(page)
    with demo(tmp_path, seconds=0.3, steps=100) as link:
        page.goto(link)
        page.wait_for_selector(WORDS)
        page.locator(".conversation").click()
        ask(page, "Twice")
        page.wait_for_selector(".cv.live .t")
    store = Store(tmp_path)
    _, first, _, second = store.branch(store.conversations()[0].id)
    store.close()
    assert first.status == "done" and second.status == "stopped" and "server" in second.info["error"]


def test_the_page_fits_a_phone(tab, link_to):
    page = tab(**PHONE)
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Sidebar").click()
    playwright.expect(page.locator(".conversation.here")).to_be_visible()


def test_axe_finds_no_serious_fault(tab, link_to):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    found = axe.Axe().run(page).response["violations"]
    serious = [f"{fault['id']}: {node['html'][:150]}" for fault in found if fault["impact"] in ("serious", "critical")
               for node in fault["nodes"]]
    assert not serious, "\n".join(serious)
