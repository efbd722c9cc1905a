"""Looking for models on the hub, and fetching them.

Works on: `dgemma.weights.hub`, the studio's jobs. Knows nothing of: what is done with them.
"""

from __future__ import annotations

import asyncio

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.files import free_space
from dgemma.formats import count_text, short_count, size_text
from dgemma.memory import machine_memory, model_bytes
from dgemma.memory.local import USUAL_VOCABULARY, fits
from dgemma.studio.buttons import text_button
from dgemma.studio.jobs import Job, Jobs
from dgemma.weights.files import hub_name
from dgemma.weights.hub.cache import cache_folder
from dgemma.weights.hub.repository import Pull, fetch, plan_all, plan_pull
from dgemma.weights.hub.search import Found, search_hub

_SUGGESTED = "diffusiongemma"


class Hub:
    """The search, and what it finds."""

    def __init__(self, jobs: Jobs):
        self._jobs = jobs
        with ui.row().classes("fields wide"):
            self._words = ui.input(value=_SUGGESTED, placeholder="Words of its name, or org/name").classes("grow")
            self._words.props('outlined dense clearable aria-label="Search the hub"')
            self._words.on("keydown.enter", self.search)
            text_button("Search", self.search, icon="search")
        self._found = ui.element("div").classes("wide").props('aria-live="polite"')

    async def search(self) -> None:
        """Ask the hub, and show what it says."""
        words = (self._words.value or "").strip()
        self._found.clear()
        with self._found:
            waiting = ui.spinner(size="sm")
        try:
            found = await asyncio.to_thread(search_hub, words)
        except DgemmaError as error:
            waiting.delete()
            with self._found:
                ui.label(str(error)).classes("danger small pre").props("role=alert")
            return
        waiting.delete()
        with self._found:
            if not found:
                ui.label("The hub has nothing of that name.").classes("nothing")
            for one in found:
                self._row(one)

    def _row(self, found: Found) -> None:
        with ui.element("div").classes("model"), ui.row().classes("line"):
            with ui.element("div").classes("line-words grow"):
                with ui.row().classes("model-name"):
                    ui.label(found.repo).classes("line-name")
                    if found.gated:
                        ui.label("terms to accept").classes("tag warn")
                told = [f"{short_count(found.downloads)} downloads" if found.downloads else "",
                        f"{short_count(found.likes)} likes" if found.likes else "",
                        f"changed {found.updated:%d %b %Y}" if found.updated else ""]
                ui.label(", ".join(filter(None, told))).classes("muted small")
            text_button("Show models", lambda: self._open(found.repo, inside), icon="expand_more").props(
                f'aria-label="Show the models of {found.repo}"')
        inside = ui.element("div").classes("inside")

    async def _open(self, repo: str, inside: ui.element) -> None:
        inside.clear()
        with inside:
            waiting = ui.spinner(size="sm")
        try:
            pulls = await asyncio.to_thread(plan_all, repo)
        except DgemmaError as error:
            waiting.delete()
            with inside:
                ui.label(str(error)).classes("danger small pre").props("role=alert")
            return
        waiting.delete()
        free, (available, total) = free_space(cache_folder()), machine_memory()
        with inside:
            if not pulls:
                ui.label("No safetensors and no GGUF files: nothing that dgemma runs.").classes("nothing")
            for pull in pulls:
                self._offer(pull, free, available, total)

    def _offer(self, pull: Pull, free: int, available: int | None, total: int | None) -> None:
        name = pull.model or pull.repo
        needed = model_bytes(pull.size, ":" in name, USUAL_VOCABULARY)
        verdict = fits(needed, available, total)
        towers = [file.name for file in pull.files if "mmproj" in file.name.lower()]
        with ui.row().classes("line offer"):
            with ui.element("div").classes("line-words grow"):
                with ui.row().classes("model-name"):
                    ui.label(name.removeprefix(pull.repo).lstrip(":") or "safetensors").classes("line-name")
                    ui.label(size_text(pull.size)).classes("tag")
                    ui.label(f"needs about {size_text(needed)}").classes(
                        "tag " + {"yes": "good", "no": "bad"}.get(verdict, "warn"))
                words = [count_text(len(pull.files), "file"),
                         f"with {towers[0]}, which sees pictures" if towers else "",
                         "does not fit this machine's memory" if verdict == "no" else ""]
                ui.label(", ".join(filter(None, words))).classes("muted small")
            if pull.to_fetch == 0:
                ui.label("is here").classes("tag good")
            elif pull.to_fetch > free:
                ui.label(f"the disk has {size_text(free)} free").classes("tag bad")
            else:
                button = text_button("Download", lambda: self._fetch(pull, button), icon="download").props(
                    f'aria-label="Download {name}"')

    def _fetch(self, pull: Pull, button: ui.button) -> None:
        button.disable()  # how it goes is shown above, and there it can be stopped and gone on with
        job = fetch_in_background(self._jobs, pull)
        ui.notify(f"{job.title} …", position="top")


def fetch_in_background(jobs: Jobs, pull: Pull) -> Job:
    """Fetch a model; what an earlier try has fetched is not fetched again."""
    def work(job: Job) -> str:
        fetch(pull, job)
        return "It is here, and can be loaded." if pull.model else f"{count_text(len(pull.files), 'file')} are here."

    return jobs.start(download_title(pull.model or pull.repo), work)


def download_title(name: str) -> str:
    """What the job is called that fetches a model."""
    return f"Downloading {name}"


async def go_on(jobs: Jobs, name: str) -> None:
    """Fetch what is missing of a model of the hub."""
    repo, tag = hub_name(name) or (name, None)
    try:
        pull = await asyncio.to_thread(plan_pull, repo, tag)
    except DgemmaError as error:
        ui.notify(str(error), type="negative", position="top", multi_line=True)
        return
    fetch_in_background(jobs, pull)
