"""The studio in a real Chromium: the first start, a chat whose canvas is seen, a reload while it runs."""

import base64
import re

import pytest

from dgemma.studio.store import Store
from dgemma.tools.sandbox import SandboxError, check_sandbox
from support.pictures import as_file, random_picture
from support.seeing import save_seeing_sudoku
from support.studio import PUZZLE, demo, launch_link
from support.studio_browser import CHROMIUM, WORDS, no_serious_fault

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (apt-get install chromium)")]
try:
    check_sandbox()
    SANDBOX = True
except SandboxError:
    SANDBOX = False
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


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
    where = page.locator(".cv-where")
    playwright.expect(where).to_contain_text("step")  # opened, at its last step
    page.get_by_role("slider", name="Step").fill("0")
    playwright.expect(where).to_contain_text("step 1/")
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
    page = tab()
    link_to(page)
    ask(page, PUZZLE)
    finished(page)
    page.get_by_role("button", name="Replay").click()
    assert no_serious_fault(page)
    page.get_by_role("button", name="Settings of the answers").click()
    playwright.expect(page.get_by_role("group", name="Preset")).to_be_visible()
    assert no_serious_fault(page)


DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)), moved = new DataTransfer();
  moved.items.add(new File([bytes], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"])
    document.querySelector(".messages").dispatchEvent(new DragEvent(kind, { dataTransfer: moved, bubbles: true }));
}"""


def drop(page, data, name):
    page.evaluate(DROP, [base64.b64encode(data).decode(), name])


def choose(page, what, value):
    """Set one of the panel's switches."""
    page.get_by_role("button", name="Settings of the answers").click()
    page.locator(f'[aria-label="{what}"]').get_by_text(value, exact=True).click()
    page.get_by_role("button", name="Close the settings").click()


@pytest.mark.skipif(not SANDBOX, reason="no sandbox can be had here")
def test_a_tool_waits_for_an_approval_over_a_reload_and_shows_what_it_drew(tab, tmp_path):
    with demo(tmp_path, seconds=0.02, steps=6) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")
        page.goto(link)
        page.wait_for_selector(WORDS)
        choose(page, "Python", "Ask")
        ask(page, "Draw some fog")
        page.get_by_role("button", name="Allow once").wait_for()
        assert page.get_by_role("button", name="Stop").is_visible()
        page.reload()
        page.get_by_role("button", name="Allow once").click()
        picture = page.get_by_role("img", name="fog.png")
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") == 256
        assert "1 2.56" in page.locator(".call-output").inner_text()
        playwright.expect(page.locator(".answer .prose").last).to_contain_text("committed as text")
        page.get_by_role("button", name="Show all of it").click()
        assert "30 0.004" in page.locator(".call-output").inner_text()
        assert no_serious_fault(page)


@pytest.mark.skipif(not SANDBOX, reason="no sandbox can be had here")
def test_a_refused_call_ends_as_one_and_the_model_goes_on(tab, tmp_path):
    with demo(tmp_path, seconds=0.02, steps=6) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")
        page.goto(link)
        page.wait_for_selector(WORDS)
        choose(page, "Python", "Ask")
        ask(page, "Draw some fog")
        page.get_by_role("button", name="Refuse").click()
        playwright.expect(page.locator(".call-output")).to_have_text("The user did not allow this call.")
        playwright.expect(page.locator(".answer .prose").last).to_contain_text("committed as text")


def test_a_picture_that_is_dropped_goes_with_the_message(tab, tmp_path):
    eyes = save_seeing_sudoku(tmp_path / "eyes")
    with demo(tmp_path / "data", seconds=0.02, steps=6, model=eyes) as link:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED|400")
        page.goto(link)
        page.wait_for_selector(WORDS)
        drop(page, b"<svg onload=alert(1)>", "drawing.svg")
        page.get_by_text("drawing.svg: this is an SVG drawing").wait_for()
        drop(page, as_file(random_picture(60, 50), "PNG"), "noise.png")
        page.locator(".attached").get_by_role("img", name="noise.png").wait_for()
        ask(page, "What is this?")
        finished(page)
        page.reload()
        picture = page.locator(".question").get_by_role("img", name="noise.png")
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") == 60
        playwright.expect(page.locator(".meter")).to_contain_text("tokens of context")


def test_a_model_without_eyes_says_so_at_once(tab, link_to):
    page = tab(foreseen="400")
    link_to(page)
    drop(page, as_file(random_picture(60, 50), "PNG"), "noise.png")
    page.get_by_text("noise.png: this model reads text only").wait_for()
    playwright.expect(page.locator(".attached-one")).to_have_count(0)


def test_what_goes_wrong_says_what_to_do_and_can_be_tried_again(tab, link_to):
    page = tab()
    link_to(page)
    choose(page, "Preset", "Fast")
    ask(page, "word " * 3000)
    page.get_by_role("button", name="Try again").wait_for()
    playwright.expect(page.locator(".failure-advice")).to_contain_text("Start a new chat")
    page.get_by_role("button", name="Try again").click()
    playwright.expect(page.locator(".answer .branches")).to_contain_text("2 / 2")
    page.get_by_role("button", name="Settings of the answers").click()
    playwright.expect(page.get_by_role("spinbutton", name="Steps", exact=True)).to_have_value("16")
