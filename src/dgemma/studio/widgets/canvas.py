"""The live canvas as an element of a page (`static/canvas.js`): told of an answer's steps, or of where they are kept.

Works on: answers, recordings. Knows nothing of: conversations.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nicegui import json, ui

from dgemma.formats import count_text, duration_text, rate_text
from dgemma.studio.answers import Answer
from dgemma.studio.recording import Recording, frame, opening
from dgemma.tokenizer_files import STOPS

FRAME_SECONDS = 1 / 30  # between two messages to a browser
_MOST_FRAMES = 12  # in one message
_STATIC = Path(__file__).parents[1] / "static"
_REASONS = {"stop": "finished", "length": "cut off: the length limit", "tool_calls": "calls a tool",
            "stopped": "stopped by you", "cancelled": "cut off: the server stopped"}


class Canvas(ui.element, component=_STATIC / "canvas.js", esm={"dgemma-studio": str(_STATIC)}):
    """One answer's canvas: `follow` it while it is made; when it is over it can be walked through, step by step.

    What else can be done with it (`dgemma.studio.widgets.edit`) it tells as events: "save" with a kind of file, "type"
    and "denoise" with an edited canvas.
    """

    def __init__(self, source: str, *, running: bool = False, recorded: bool = True, summary: str = ""):
        """``source`` is where the whole recording is had: "/recordings/ID"; "" for one that `show` gets."""
        super().__init__()
        self._props.update(src=source, running=running, recorded=recorded, summary=summary, stops=list(STOPS))

    def allow(self, *, editing: bool = False, saving: bool = False) -> None:
        """Offer what there is somebody to hear of."""
        self._props.update(editable=editing, exportable=saving)

    def show(self, recording: Recording) -> None:
        """Show a recording that is in no store."""
        self.run_method("show", recording.for_page())

    async def follow(self, answer: Answer) -> None:
        """Show an answer as it is made; returns when it is over, or the page is gone."""
        sent = _Sent()
        while True:
            running = answer.running
            news = sent.news(answer.recording)
            if answer.figures.tokens and running:
                news["rate"] = rate_text(answer.figures.tokens, answer.figures.seconds)
            if not running:
                news |= {"over": True, "summary": summary(answer.info), "recorded": bool(answer.recording.canvases)}
            if news:
                # Not `run_method`: its "return" makes the browser read all of this twice.
                self.client.run_javascript(f'runMethod({self.id}, "push", [{json.dumps(news)}])')
            if not running or self.is_deleted:
                return
            if not sent.behind(answer.recording):
                await answer.changed()
            await asyncio.sleep(FRAME_SECONDS)


class _Sent:
    """What a browser has of a recording that grows."""

    def __init__(self) -> None:
        self._canvases = self._steps = 0  # opened ones; steps of the last of these
        self._texts: set[int] = set()

    def behind(self, recording: Recording) -> bool:
        return self._canvases < len(recording.canvases) or bool(
            recording.canvases and self._steps < len(recording.canvases[-1].steps))

    def news(self, recording: Recording) -> dict[str, Any]:
        """What it does not have yet; of many steps the last ones."""
        openings: list[dict[str, Any]] = []
        frames: list[tuple[int, dict[str, Any]]] = []
        if self._canvases < len(recording.canvases):
            if len(recording.canvases) - self._canvases > 1 or not self._canvases:
                self._canvases = len(recording.canvases) - 1  # those before are text by now
            openings.append(opening(recording.canvases[self._canvases], self._canvases))
            self._canvases, self._steps = self._canvases + 1, 0
        if self._canvases:
            canvas = recording.canvases[self._canvases - 1]
            first = max(self._steps, len(canvas.steps) - _MOST_FRAMES)
            before = canvas.steps[self._steps - 1] if self._steps else None
            for step in canvas.steps[first:]:
                frames.append((self._canvases - 1, frame(step, before)))
                before = step
            self._steps = len(canvas.steps)
        if not openings and not frames:
            return {}
        new = recording.texts.keys() - self._texts
        self._texts |= new
        return {"openings": openings, "frames": frames, "texts": {token: recording.texts[token] for token in new},
                "special": [token for token in new if token in recording.special]}


def summary(info: dict[str, Any]) -> str:
    """What became of an answer, in a line."""
    parts = []
    if steps := info.get("steps"):
        canvases = count_text(len(steps), "canvas", "es")
        parts.append(f"{canvases} · {count_text(sum(steps), 'step')}" if len(steps) > 1
                     else count_text(steps[0], "step"))
    if tokens := info.get("tokens"):
        parts += [count_text(tokens, "token"), duration_text(info.get("seconds", 0.0)),
                  f"{rate_text(tokens, info.get('seconds', 0.0))} tokens/s"]
    reason = info.get("finish_reason")
    if reason is not None:
        parts.append(_REASONS.get(reason, reason))
    return " · ".join(parts)
