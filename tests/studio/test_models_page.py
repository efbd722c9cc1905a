"""The page of models in a real Chromium: a download from a stand-in hub, and switching to what has come."""

import re

import pytest

import dgemma
from dgemma.nn.adapters import AdapterConfig, attach
from dgemma.weights.adapters import save_adapter
from dgemma.weights.files import bundled_path
from dgemma.weights.quantize import convert
from support.hub_server import HubServer, environment_of
from support.studio import PUZZLE, launch_link, studio
from support.studio_browser import CHROMIUM, WORDS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (pip install playwright)")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (apt-get install chromium)")]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
MODEL = "org/sudoku-GGUF:Q8_0"


def test_a_model_is_downloaded_from_the_hub_and_answers_then(tab, tmp_path):
    convert(bundled_path("sudoku"), tmp_path / "sudoku-Q8_0.gguf", "Q8_0")
    data = (tmp_path / "sudoku-Q8_0.gguf").read_bytes()
    with HubServer({"org/sudoku-GGUF": {"sudoku-Q8_0.gguf": data}}) as hub:
        hub.switches.cut_after = len(data) // 2  # the connection breaks once
        environment = {name: value for name, value in environment_of(hub, tmp_path / "home").items()
                       if name.startswith(("HF_", "NO_PROXY"))}
        with studio(tmp_path / "data", **environment) as process:
            page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")  # when the server goes
            page.goto(launch_link(process))
            page.wait_for_selector(WORDS)
            page.get_by_role("link", name="Models").click()
            page.get_by_role("textbox", name="Search the hub").fill("sudoku")
            page.get_by_role("button", name="Search", exact=True).click()
            page.get_by_role("button", name="Show the models of org/sudoku-GGUF").click()
            page.get_by_role("button", name=f"Download {MODEL}").click()
            page.get_by_role("button", name=f"Load {MODEL}", exact=True).click()
            playwright.expect(page.locator(".current-name")).to_have_text(MODEL)
            playwright.expect(page.locator(".side-model")).to_have_text(MODEL)
            assert len(hub.downloads()) == 2  # what had come before the break was kept
            page.get_by_role("link", name="Chat").click()
            page.fill(WORDS, PUZZLE)
            page.press(WORDS, "Enter")
            playwright.expect(page.locator(".cv-replay:visible")).to_have_count(1, timeout=30_000)
            assert "534678912" in page.locator(".answer .prose").last.inner_text()
            served = page.request.get(re.sub(r"/c/.*", "/v1/models", page.url)).json()
            assert served["data"][0]["id"] == MODEL


def test_a_model_is_unloaded_and_loaded_again(tab, link_to):
    page = tab()
    link_to(page, "/models", ".model")
    page.get_by_role("button", name="Unload").click()
    playwright.expect(page.locator(".current-name")).to_have_text("No model is in memory")
    page.get_by_role("button", name="Load sudoku", exact=True).click()
    playwright.expect(page.locator(".current-name")).to_have_text("sudoku")


def test_adapters_come_and_go_and_a_model_is_converted(tab, tmp_path):
    model = dgemma.load("sudoku")
    config = AdapterConfig(r=2, targets=("attention",))
    attach(model.network, config)
    save_adapter(model.network, config, tmp_path / "training" / "runs" / "puzzles" / "best")
    with studio(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub")) as process:
        page = tab(foreseen="WebSocket|ERR_CONNECTION_REFUSED")  # when the server goes
        page.goto(launch_link(process))
        page.wait_for_selector(WORDS)
        page.get_by_role("link", name="Models").click()
        page.get_by_role("button", name="puzzles (best)").click()
        page.get_by_role("button", name="Load the adapter").click()
        page.get_by_role("button", name="Unload puzzles").click()
        playwright.expect(page.get_by_role("button", name="Unload puzzles")).to_have_count(0)
        page.get_by_role("button", name="More for sudoku").click()
        page.get_by_role("menuitem", name="Convert to GGUF").click()
        page.get_by_role("button", name="Convert", exact=True).click()
        page.get_by_role("button", name="Load sudoku-Q4_K_M", exact=True).click()
        playwright.expect(page.locator(".current-name")).to_have_text("sudoku-Q4_K_M")
        assert (tmp_path / "models" / "sudoku-Q4_K_M.gguf").is_file()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_fault(tab, link_to, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    page = tab(color_scheme=theme)
    link_to(page, "/models", ".model")
    found = axe.Axe().run(page).response["violations"]
    serious = [f"{fault['id']}: {node['html'][:150]}" for fault in found if fault["impact"] in ("serious", "critical")
               for node in fault["nodes"]]
    assert not serious, "\n".join(serious)


def test_the_page_fits_a_phone(tab, link_to):
    page = tab(**PHONE)
    link_to(page, "/models", ".model")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
