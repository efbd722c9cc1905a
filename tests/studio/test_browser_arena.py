"""The arena in a real Chromium: two settings on one puzzle, a blind vote by the keyboard, the table."""

import csv
import re

import pytest

from support.studio import PUZZLE, demo
from support.studio_browser import CHROMIUM, WORDS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (apt-get install chromium)")]
expect = playwright.expect
GONE = "WebSocket|ERR_CONNECTION_REFUSED"  # when the server goes


def start(page, words):
    page.fill(WORDS, words)
    page.press(WORDS, "Enter")


def test_two_settings_answer_a_vote_reveals_them_and_the_table_counts_it(tab, link_to):
    page = tab()
    link_to(page, "/arena")
    page.get_by_role("button", name="Change contestant 2").click()
    page.get_by_role("textbox", name="Name").fill("Three steps")
    page.get_by_role("spinbutton", name="Steps").fill("3")
    page.wait_for_timeout(400)  # the field waits whether more is typed
    page.get_by_role("button", name="Take").click()
    expect(page.get_by_role("region", name="Contestant 2")).to_contain_text("max denoising steps 3")
    start(page, PUZZLE)
    expect(page.locator(".votes")).to_be_visible()
    assert re.search(r"/arena/[\w-]+$", page.url)
    answers = page.locator(".battle article")
    assert "Three steps" not in page.locator(".battle").inner_text()  # nor their figures
    assert answers.locator("dd").count() == 0
    page.keyboard.press("1")
    expect(page.locator(".revealed")).to_have_text(re.compile("A is better: (The model's own settings|Three steps)"))
    first_won = "own settings" in page.locator(".revealed").inner_text()
    three = answers.nth(1 if first_won else 0)
    expect(three).to_contain_text("Three steps")
    expect(three.locator("dd").first).to_have_text("3")
    row = page.get_by_role("region", name="Pairs").locator("tbody tr")
    expect(row).to_contain_text("Three steps")
    expect(row).to_contain_text("100 % (21 to 100)" if first_won else "0 % (0 to 79)")

    page.get_by_role("slider", name="Both canvases").fill("0")
    expect(answers.first.locator(".cv-where")).to_contain_text("step 1/")
    expect(answers.last.locator(".cv-where")).to_contain_text("step 1/")
    page.get_by_role("button", name="By time").click()
    page.get_by_role("slider", name="Both canvases").fill("120")
    expect(three.locator(".cv-where")).to_contain_text("step 3/3")

    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    with open(saved.value.path(), newline="") as file:
        (battle,) = csv.DictReader(file)
    assert battle["verdict"] == ("first" if first_won else "second")
    assert battle["second"] == "Three steps" and battle["second_steps"] == "3"
    page.get_by_role("button", name="Delete this battle").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("heading", name="Results")).to_have_count(0)


def test_a_set_of_prompts_is_voted_on_one_by_one(tab, link_to):
    page = tab()
    link_to(page, "/arena")
    page.get_by_role("button", name="Several prompts").click()
    page.locator("input[type=file]").set_input_files(
        {"name": "set.jsonl", "mimeType": "application/jsonl", "buffer": f'"{PUZZLE}"\n{{"prompt": "Hi"}}\n'.encode()})
    for number in (1, 2):
        expect(page.locator(".battle-state")).to_contain_text(f"prompt {number} of 2")
        expect(page.locator(".votes")).to_be_visible()
        page.keyboard.press("3")
        expect(page.locator(".revealed")).to_have_text("A tie")
        page.keyboard.press("n")
    expect(page.locator(".battle-state")).to_contain_text("2 voted on")


def test_a_reload_goes_on_with_both_and_escape_stops_both(tab, tmp_path):
    with demo(tmp_path, seconds=0.3, steps=100) as link:
        page = tab(foreseen=GONE, viewport={"width": 390, "height": 844})
        page.goto(link)
        page.wait_for_selector(WORDS)
        page.goto(re.match(r"http://[^/]+", page.url)[0] + "/arena")
        start(page, "Go on for ever")
        expect(page.locator(".cv.live")).to_have_count(2)
        page.reload()
        expect(page.locator(".cv.live .t").first).to_be_attached()
        expect(page.locator(".cv.live")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        first, second = (page.locator(".battle article").nth(place).bounding_box() for place in (0, 1))
        assert second["y"] >= first["y"] + first["height"]
        page.keyboard.press("Escape")
        expect(page.locator(".battle-state")).to_contain_text("was stopped")
        expect(page.locator(".cv.live")).to_have_count(0)
