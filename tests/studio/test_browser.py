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


def test_a_model_is_trained_from_an_upload_to_its_curves_end(tab, link_to, tmp_path):
    data = tmp_path / "echo.csv"
    data.write_text("prompt,response\n" + "".join(f"say {n},{n}\n" for n in range(40)))
    page = tab()
    link_to(page)
    page.goto(re.match(r"http://[^/]+", page.url)[0] + "/training")
    page.locator("input[type=file]").set_input_files(data)
    recipe = page.get_by_role("textbox", name="Recipe")
    playwright.expect(recipe).to_have_value(re.compile(r"echo\.jsonl"))
    page.get_by_role("button", name="What is learnt").click()
    page.wait_for_selector(".train-shown .loss", timeout=60_000)
    page.get_by_role("button", name="Memory plan").click()
    playwright.expect(page.locator(".train-shown")).to_contain_text("it fits", timeout=60_000)
    recipe.fill(recipe.input_value().replace("epochs: 3", "max_steps: 20"))
    page.get_by_role("textbox", name="Film this prompt").fill("say 3")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url(re.compile("/training/my-run"))
    page.reload()
    playwright.expect(page.locator("main .train-state")).to_contain_text("finished", timeout=150_000)
    playwright.expect(page.locator(".train-plots canvas").first).to_be_visible()
    playwright.expect(page.get_by_text("What it made")).to_be_visible()
    playwright.expect(page.locator(".train-check .good")).not_to_have_count(0)
    page.get_by_role("button", name="Replay").first.click(timeout=60_000)
    playwright.expect(page.get_by_role("slider", name="Step")).to_be_visible()


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
