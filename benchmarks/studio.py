"""The studio in a real Chromium: first paint, pictures of the live canvas a second, what they cost the server; an hour.

    python benchmarks/studio.py [--seconds 8] [--paints 3]
    python benchmarks/studio.py --minutes 60

first paint  from the request until something is seen, and until there is somewhere to write; an empty cache each time
bundled      the bundled model denoises one canvas for so many seconds, at a temperature at which it is never sure:
             pictures a second as the browser painted them, denoising steps a second, and the server's share of one
             core, the model's work included
256 tokens   a backend that computes nothing sends 30 steps of 256 tokens a second, beside a program that runs the
             bundled model all the time: the server's share is that of the pages alone

`--minutes` asks, replays and votes in turn for so long instead, and prints every so often what the server's process and
the page's scripts hold. Needs playwright and a Chromium, and Linux. Every server has one OpenMP thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
from machine import describe
from playwright.sync_api import Browser, Page, sync_playwright

from dgemma.formats import size_text
from dgemma.studio.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.studio import PUZZLE, demo_process, launch_link, studio
from support.studio_browser import CHROMIUM, DESKTOP, WORDS

STEPS = 100_000  # more than can be made in the time
_RUN_THE_MODEL = f"import dgemma; model = dgemma.load('sudoku')\nwhile True: model.generate({PUZZLE!r})"
_COUNT = """() => {
  window.pictures = 0; // with each of them the step is told
  new MutationObserver(() => window.pictures++).observe(document.querySelector(".cv.live .cv-status"),
    {subtree: true, childList: true, characterData: true});
}"""


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """The memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def signed_in(browser: Browser, link: str) -> Iterator[Page]:
    context = browser.new_context(**DESKTOP)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(link)
    page.wait_for_selector(WORDS)
    yield page
    context.close()


def first_paint(browser: Browser, page: Page, times: int) -> None:
    address, cookies = re.match(r"http://[^/]+", page.url)[0], page.context.cookies()  # type: ignore[index]
    painted, ready = [], []
    for _ in range(times):
        context = browser.new_context(**DESKTOP)
        context.add_cookies(cookies)  # type: ignore[arg-type]
        fresh = context.new_page()
        began = time.perf_counter()
        fresh.goto(address)
        fresh.wait_for_selector(WORDS)
        ready.append(time.perf_counter() - began)
        painted.append(fresh.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
        context.close()
    print(f"first paint: {statistics.median(painted):.2f} s, somewhere to write: {statistics.median(ready):.2f} s "
          f"(medians of {times})", flush=True)


def pictures(page: Page, pid: int, seconds: float, name: str) -> None:
    """Ask something, and look at the canvas for so long."""
    page.fill(WORDS, PUZZLE)
    page.press(WORDS, "Enter")
    page.wait_for_selector(".cv.live .t")
    page.wait_for_timeout(1000)
    page.evaluate(_COUNT)
    step = "() => Number(/step (\\d+)/.exec(document.querySelector('.cv-status').textContent)?.[1])"
    tokens, first = page.locator(".cv.live .t").count(), page.evaluate(step)
    spent, began = cpu_seconds(pid), time.perf_counter()
    page.wait_for_timeout(1000 * seconds)
    seen, last = page.evaluate("window.pictures"), page.evaluate(step)
    spent, took = cpu_seconds(pid) - spent, time.perf_counter() - began
    print(f"{name}: {tokens} tokens, {seen / took:.1f} pictures/s of {(last - first) / took:.1f} steps/s, "
          f"server {100 * spent / took:.0f} % of a core ({took:.1f} s)", flush=True)
    page.keyboard.press("Escape")
    page.wait_for_selector(".cv-replay:visible")


def measure(browser: Browser, seconds: float, paints: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.set_setting("last_used", {"options": {
            "stability_threshold": STEPS, "max_denoising_steps": STEPS, "t_min": 10, "t_max": 10, "seed": 0},
            "system": ""})
        store.close()
        with studio(folder) as process, signed_in(browser, launch_link(process)) as page:
            first_paint(browser, page, paints)
            pictures(page, process.process.pid, seconds, "bundled")
    with tempfile.TemporaryDirectory() as folder, demo_process(folder, seconds=1 / 30, steps=STEPS) as (link, pid):
        busy = subprocess.Popen([sys.executable, "-c", _RUN_THE_MODEL], env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            with signed_in(browser, link) as page:
                page.wait_for_timeout(2000)  # until it has loaded
                pictures(page, pid, seconds, "256 tokens")
        finally:
            busy.kill()
            busy.wait()


def endure(browser: Browser, minutes: float) -> None:
    """Use it for so long; the memory that is held by then, a dozen times."""
    with (tempfile.TemporaryDirectory() as folder, studio(folder) as process,
          signed_in(browser, launch_link(process)) as page):
        address = re.match(r"http://[^/]+", page.url)[0]  # type: ignore[index]
        tools = page.context.new_cdp_session(page)
        began, told, rounds = time.monotonic(), 0.0, 0
        while (now := time.monotonic() - began) < 60 * minutes or rounds == 0:
            page.goto(address)
            for count in (1, 2):
                page.fill(WORDS, PUZZLE)
                page.press(WORDS, "Enter")
                page.wait_for_function(f"document.querySelectorAll('.cv-replay').length === {count} "
                                       "&& !document.querySelector('.cv.live')")
            page.locator(".cv-replay").last.click()
            page.wait_for_selector(".cv-scrub")
            page.goto(f"{address}/arena")
            page.fill(WORDS, PUZZLE)
            page.press(WORDS, "Enter")
            page.wait_for_selector(".votes:visible")
            page.keyboard.press("3")
            page.wait_for_selector(".revealed:visible")
            rounds += 1
            if rounds == 1 or now - told >= 60 * minutes / 12:
                told = now
                tools.send("HeapProfiler.collectGarbage")
                heap, held = page.evaluate("performance.memory.usedJSHeapSize"), memory(process.process.pid)
                kept = sum(path.stat().st_size for path in Path(folder).glob("studio.db*"))
                print(f"{now / 60:6.1f} min, {4 * rounds:5d} answers: server {size_text(held)}, page's scripts "
                      f"{size_text(heap)}, file {size_text(kept)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of looking at each canvas")
    parser.add_argument("--paints", type=int, default=3, help="first paints")
    parser.add_argument("--minutes", type=float, help="use it for so long instead, and print the memory held")
    given = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        print(describe("dgemma"))
        print(f"nicegui {version('nicegui')}, Chromium {browser.version} without a window; load average "
              f"{json.dumps(os.getloadavg())}")
        if given.minutes is not None:
            endure(browser, given.minutes)
        else:
            measure(browser, given.seconds, given.paints)
        browser.close()


if __name__ == "__main__":
    main()
