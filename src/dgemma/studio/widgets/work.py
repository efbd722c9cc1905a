"""What is being downloaded or converted: how far it is, and a way to stop it.

Works on: the studio's jobs. Knows nothing of: what they do.
"""

from __future__ import annotations

from functools import partial

from nicegui import ui

from dgemma.formats import long_duration_text, size_text
from dgemma.studio.buttons import icon_button
from dgemma.studio.jobs import Job, Jobs, Progress

_ICONS = {"done": "check_circle", "failed": "error_outline", "stopped": "do_not_disturb_on"}


class Work:
    """The list; it looks after itself when it is told to `refresh`."""

    def __init__(self, jobs: Jobs):
        self._jobs = jobs
        self._shown: tuple[tuple[int, str], ...] = ()
        self._running: list[tuple[Job, ui.linear_progress, ui.label]] = []
        self._box = ui.element("div").classes("wide").props('aria-live="polite"')
        self.refresh()

    def refresh(self) -> bool:
        """Show how things stand; whether something has begun or ended since the last time."""
        jobs = self._jobs.all()
        now = tuple((id(job), job.state) for job in jobs)
        new = now != self._shown
        if new:
            self._shown = now
            self._build(jobs)
        for job, bar, words in self._running:
            bar.set_value(job.progress.share)
            words.set_text("stopping …" if job.stopping else progress_text(job.progress))
        return new

    def _build(self, jobs: list[Job]) -> None:
        self._running = []
        self._box.clear()
        with self._box:
            for job in jobs:
                with ui.element("div").classes(f"job {job.state}"):
                    if job.state == "running":
                        self._run(job)
                    else:
                        self._ended(job)

    def _run(self, job: Job) -> None:
        with ui.row().classes("line"):
            with ui.element("div").classes("line-words"):
                ui.label(job.title).classes("line-name")
                words = ui.label().classes("muted small figures")
            icon_button("close", f"Stop: {job.title}", job.stop)
        bar = ui.linear_progress(0, show_value=False).props(f'rounded aria-label="{_quoted(job.title)}"')
        self._running.append((job, bar, words))

    def _ended(self, job: Job) -> None:
        with ui.row().classes("line"):
            ui.icon(_ICONS[job.state]).classes("job-icon")
            with ui.element("div").classes("line-words grow"):
                ui.label(job.title).classes("line-name")
                told = job.result if job.state != "stopped" else "Stopped. What has come is kept where it can be."
                ui.label(told).classes("muted small pre")
            icon_button("close", f"Remove from the list: {job.title}", partial(self._forget, job))

    def _forget(self, job: Job) -> None:
        self._jobs.forget(job)
        self.refresh()


def progress_text(progress: Progress) -> str:
    """How far something is: what, 3.1 of 16.8 GB, how fast, how long it will take; and news of it."""
    if not progress.what:
        return progress.note or "beginning …"
    told = [f"{progress.what}: {size_text(progress.done)} of {size_text(progress.total)}"]
    if progress.per_second:
        told.append(f"{size_text(round(progress.per_second))}/s")
    if progress.seconds_left and progress.seconds_left > 1:
        told.append(f"{long_duration_text(progress.seconds_left)} left")
    return ", ".join(told) + (f" ({progress.note})" if progress.note else "")


def _quoted(text: str) -> str:
    return text.replace('"', "&quot;")
