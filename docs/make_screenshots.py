"""The pictures of docs/studio.md: every page of the studio, in a real Chromium, with a model that writes a known text.

    python docs/make_screenshots.py [docs/images] [--dark]

Needs playwright, a Chromium, and Pillow.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.studio import demo
from support.studio_browser import CHROMIUM, WORDS

SIZE = {"width": 1180, "height": 760}
TALLER = {"chat": 900, "arena": 1400}  # pages whose end is worth to be seen
LARGEST = 150_000  # bytes of a picture
COLOURS = (256, 128, 64, 32)  # tried in turn
QUESTION = "How does a text come out of noise?"


def ask(page: Page) -> None:
    page.fill(WORDS, QUESTION)
    page.press(WORDS, "Enter")


def chat(page: Page) -> None:
    """Half of the way, while it is written."""
    ask(page)
    page.wait_for_function(r"/step [78]\b/.test(document.querySelector('.cv.live .cv-status')?.textContent)")


def arena(page: Page) -> None:
    """A few votes, and two canvases at the same moment."""
    for _ in range(3):
        ask(page)
        page.wait_for_selector(".votes:visible")
        page.keyboard.press("1")
        page.wait_for_selector(".revealed:visible")
    page.locator(".together input").fill("62")
    page.wait_for_selector(".cv-scrub")
    # What is read first is the text; here the canvases are to be seen, and what they came to.
    page.add_style_tag(content=".battle .card > .prose { display: none }")


PAGES: dict[str, Callable[[Page], None]] = {"chat": chat, "arena": arena}  # what is done on a page before its picture


def write(data: bytes, path: Path) -> None:
    """Write a picture in as many colours as it may have."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for colours in COLOURS:
        packed = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
        if packed.tell() <= LARGEST:
            break
    else:
        raise SystemExit(f"{path}: {packed.tell()} bytes with {colours} colours")
    path.write_bytes(packed.getvalue())
    print(f"{path}: {packed.tell():,} bytes, {colours} colours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "images")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, demo(data, seconds=0.12) as link, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="dark" if given.dark else "light")
        page.goto(link)
        page.wait_for_selector(WORDS)
        address = re.match(r"http://[^/]+", page.url)[0]  # type: ignore[index]
        titles = page.locator(".side-page").evaluate_all(
            "links => links.map((link) => [link.getAttribute('href'), link.querySelector('div').textContent.trim()])")
        for path, title in titles:
            page.set_viewport_size({**SIZE, "height": TALLER.get(title.lower(), SIZE["height"])})
            page.goto(address + path)
            page.wait_for_selector("main button")
            page.wait_for_timeout(300)
            PAGES.get(title.lower(), lambda page: None)(page)
            page.wait_for_timeout(400)  # what fades in
            write(page.screenshot(), given.folder / f"studio-{title.lower()}{'-dark' if given.dark else ''}.png")
        browser.close()


if __name__ == "__main__":
    main()
