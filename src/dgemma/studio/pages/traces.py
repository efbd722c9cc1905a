"""Traces: a saved denoising is opened, walked through step by step, and saved as something else.

Works on: files of `dgemma run --trace`. Knows nothing of: models, what the studio keeps.
"""

from __future__ import annotations

import asyncio

from nicegui import events, ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import file_field
from dgemma.studio.exports import Source, recording_of
from dgemma.studio.frame import Frame, Page, Studio
from dgemma.studio.recording import Recording
from dgemma.studio.widgets.canvas import Canvas
from dgemma.studio.widgets.edit import offer_files

_LARGEST = 256 << 20  # bytes of a trace


async def build(studio: Studio, frame: Frame) -> None:
    """The page; what is opened is on it alone, and gone with it."""
    opened: list[tuple[Recording, Source]] = []

    async def read(event: events.UploadEventArguments) -> None:
        try:
            found = await asyncio.to_thread(recording_of, await event.file.read())
        except DgemmaError as error:
            why.set_text(str(error))
            why.set_visibility(True)
            return
        finally:
            upload.reset()
        opened[:] = [found]
        recording, source = found
        why.set_visibility(False)
        name.set_text(event.file.name)
        model.set_text(f"{source.model} · {recording.count}")
        prompt.set_text(source.prompt)
        shown.set_visibility(True)
        canvas.show(recording)

    with frame.bar:
        ui.label("Traces").classes("bar-title")
    with ui.element("div").classes("column-of-text sheet"):
        ui.label("Watch a saved denoising again: a file of dgemma run --trace, or one that was saved from an answer "
                 "here. It is shown on this page, and kept nowhere.").classes("muted")
        upload = file_field("Choose a trace, or drop it here", read, max_files=1, max_file_size=_LARGEST,
                            on_rejected=lambda: ui.notify("A trace is a .jsonl file of at most 256 MiB",
                                                          position="top", type="negative"))
        upload.props('accept=".jsonl"').classes("trace-upload")
        why = ui.label().classes("control-error").props("role=alert")
        why.set_visibility(False)
        with ui.element("section").classes("trace") as shown:
            name = ui.label().classes("section-title")
            model = ui.label().classes("muted small")
            with ui.element("div").classes("question"):
                prompt = ui.label().classes("bubble")
            canvas = Canvas("", recorded=False)
            canvas.allow(saving=True)
            offer_files(canvas, lambda: opened[0])
        shown.set_visibility(False)


PAGE = Page("/traces", "Traces", "movie_filter", build)
