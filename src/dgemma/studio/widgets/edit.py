"""What can be done with an answer's canvas beside watching it: edit it and denoise again, save it as a file.

Works on: the studio's answers and store. Knows nothing of: the rest of the page.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nicegui import events, ui

from dgemma.errors import DgemmaError
from dgemma.fields import is_whole
from dgemma.formats import count_text
from dgemma.studio.edits import Place, read_places, start_of, step_of, type_over
from dgemma.studio.exports import KINDS, Source, export
from dgemma.studio.frame import Studio
from dgemma.studio.recording import Recording
from dgemma.studio.store import Message
from dgemma.studio.widgets.canvas import Canvas
from dgemma.tokenizer_files import STOPS

_LONGEST = 20_000  # characters that are typed into a canvas


def equip(studio: Studio, canvas: Canvas, message: Message) -> None:
    """Let an answer's canvas be edited and saved; what is denoised again is another answer beside it."""
    def recording() -> Recording:
        found = studio.answers.recording(message.id)
        if found is None:
            raise DgemmaError("nothing was recorded of this answer")
        return found

    def source() -> Source:
        kept = studio.store.message(message.id)
        question = studio.store.message(message.parent or "")
        return Source(str((kept or message).info.get("model", "")), "" if question is None else question.text, STOPS)

    def denoise(asked: Mapping[str, Any]) -> None:
        model, film = studio.serving().model, recording()
        where, _ = step_of(film, asked.get("canvas"), asked.get("step"))
        places = read_places(asked.get("places"), len(where.start), model.config.vocab_size)
        seed = asked.get("seed")
        if seed is not None and not (is_whole(seed) and seed >= 0):
            raise DgemmaError(f"the seed is {seed!r:.40}: it must be a whole number of at least 0")
        start = start_of(film, asked["canvas"], asked["step"], places, asked.get("rest"),
                         model.generation_config.eos_token_id)
        owner = studio.store.conversation(message.conversation)
        allowed = (owner.options if owner else {}).get("max_denoising_steps",
                                                       model.generation_config.max_denoising_steps)
        if start.from_step >= allowed:
            raise DgemmaError(f"there is no step left after step {start.from_step} of at most {allowed}: go back some "
                              "steps, or allow more in the settings")
        if studio.answers.busy(message.conversation):
            raise DgemmaError("an answer is being made: stop it first, or wait for its end")
        studio.answers.denoise_again(message, start, seed)

    canvas.allow(editing=True, saving=True)
    canvas.on("type", lambda event: _told(canvas, partial(_type, studio, recording, canvas, event.args)))
    canvas.on("denoise", lambda event: _told(canvas, partial(denoise, event.args)))
    offer_files(canvas, lambda: (recording(), source()))


def offer_files(canvas: Canvas, of: Callable[[], tuple[Recording, Source]]) -> None:
    """Let a canvas be saved as a file of any kind."""
    async def save(event: events.GenericEventArguments) -> None:
        try:
            kind = str(event.args)
            recording, source = of()
            data = await asyncio.to_thread(export, kind, recording, source)
            name = re.sub(r"\W+", "-", source.prompt[:40]).strip("-") or "denoising"
            ui.download.content(data, f"{name}.{KINDS[kind].ending}")
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")
        finally:
            canvas.run_method("saved")

    canvas.on("save", save)


def _told(canvas: Canvas, action: Callable[[], None]) -> None:
    """Do something; what is wrong with it is told in the editor."""
    try:
        action()
    except DgemmaError as error:
        canvas.run_method("refused", str(error))


def _type(studio: Studio, recording: Callable[[], Recording], canvas: Canvas, asked: Mapping[str, Any]) -> None:
    """Put a text, as tokens, in the place of those that are selected."""
    model, film, text = studio.serving().model, recording(), asked.get("text")
    where, step = step_of(film, asked.get("canvas"), asked.get("step"))
    places = read_places(asked.get("places"), len(where.start), model.config.vocab_size)
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise DgemmaError(f"a text of at most {_LONGEST:,} characters can be typed into a canvas")
    ids = model.tokenizer.encode(text, specials=False)
    first, last = asked.get("first", -1), asked.get("last", -1)
    made = type_over(places, first, last, ids, step, model.generation_config.eos_token_id)
    texts = {token: model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids}
    canvas.run_method("typed", {
        "places": [_told_place(place) for place in made], "first": first, "count": len(ids), "texts": texts,
        "note": _note(last - first + 1, len(ids), len(made) > first + len(ids))})


def _told_place(place: Place) -> list[Any]:
    return [place.origin, place.typed, place.mark]


def _note(before: int, now: int, followed: bool) -> str:
    """What typing has changed, in a sentence."""
    said = f"{count_text(before, 'token')} became {count_text(now, 'token')}"
    if now == before or not followed:
        return f"{said}."
    return f"{said}: what follows moved {'back' if now < before else 'on'} by {abs(now - before)}."
