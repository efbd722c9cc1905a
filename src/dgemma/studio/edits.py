"""A canvas that a user has edited, and the denoising that begins there.

Works on: recordings, token ids. Knows nothing of: pages, how an answer is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dgemma.errors import DgemmaError
from dgemma.fields import is_whole
from dgemma.serve.ask import Ask
from dgemma.studio.recording import Canvas, Recording, Step

Mark = Literal["", "pin", "clear"]
Rest = Literal["stay", "go_on", "anew"]  # what becomes of unmarked places: pinned; as the step left them; noise


@dataclass(frozen=True)
class Place:
    """A position of an edited canvas: one of the recorded canvas (``origin``), or a token that was ``typed``."""

    origin: int | None
    typed: int | None = None
    mark: Mark = ""


@dataclass(frozen=True)
class Start:
    """Where a denoising begins again. ``before`` are the canvases that the answer has behind it, ``prefix`` the tokens
    that it has said in them."""

    canvas: list[int | None]  # None: noise
    pinned: list[bool]
    from_step: int
    prefix: list[int]
    before: Recording

    def asked_in(self, ask: Ask) -> Ask:
        """The request that begins here."""
        return dataclasses.replace(ask, options={
            **ask.options, "canvas": self.canvas, "pinned": self.pinned, "prefix": self.prefix,
            "from_step": self.from_step})


def step_of(recording: Recording, number: Any, index: Any) -> tuple[Canvas, Step]:
    """A canvas and one of its steps by their places in the recording; raises DgemmaError where there is none."""
    if is_whole(number) and is_whole(index) and 0 <= number < len(recording.canvases):
        canvas = recording.canvases[number]
        if 0 <= index < len(canvas.steps):
            return canvas, canvas.steps[index]
    raise DgemmaError(f"nothing was recorded of step {index!r} of canvas {number!r}")


def read_places(given: Any, length: int, vocabulary: int) -> list[Place]:
    """Places as a browser tells of them, ``[origin, typed, mark]`` each; raises DgemmaError for anything else."""
    def place(one: Any) -> Place:
        origin, typed, mark = one
        if mark not in get_args(Mark) or (origin is None) == (typed is None):
            raise ValueError
        if not (is_whole(origin) and 0 <= origin < length if typed is None else
                is_whole(typed) and 0 <= typed < vocabulary):
            raise ValueError
        return Place(origin, typed, mark)

    try:
        places = [place(one) for one in given]
    except (TypeError, ValueError) as error:
        raise DgemmaError("this is no edited canvas: reload the page, and try again") from error
    if len(places) > length:
        raise DgemmaError(f"the edited canvas has {len(places)} tokens, the model's {length}")
    return places


def type_over(places: Sequence[Place], first: int, last: int, ids: Sequence[int], step: Step,
              stops: Collection[int]) -> list[Place]:
    """The places with tokens ``ids`` pinned instead of those from ``first`` to ``last``.

    What follows moves. Of a canvas that grows too long what stands behind the answer's end goes; raises DgemmaError
    when that is not enough.
    """
    if not (is_whole(first) and is_whole(last) and 0 <= first <= last < len(places)):
        raise DgemmaError("select the tokens that the text is to replace")
    length = len(step.token_ids)
    made = [*places[:first], *(Place(None, token, "pin") for token in ids), *places[last + 1 :]]
    end = next((at for at, place in enumerate(made) if token_at(place, step) in stops), len(made) - 1)
    if end >= length:
        raise DgemmaError(f"this text has {len(ids)} tokens in the place of {last - first + 1}: the canvas of {length} "
                          f"has no room for {end + 1 - length} of them; select more, or write less")
    return made[:length]


def token_at(place: Place, step: Step) -> int:
    """What stands at a place: what was typed, or the draft of the step."""
    return int(step.token_ids[place.origin]) if place.typed is None else place.typed


def start_of(recording: Recording, number: int, index: int, places: Sequence[Place], rest: Any,
             stops: Collection[int]) -> Start:
    """The denoising that goes on from a step of a canvas, edited. Raises DgemmaError, saying what contradicts what.

    Cleared places are noise, pinned and typed ones stay, and of all others ``rest`` says what becomes of them. Where
    the answer's end is pinned, what is behind it says nothing.
    """
    canvas, step = step_of(recording, number, index)
    if rest not in get_args(Rest):
        raise DgemmaError(f"the rest of a canvas can {', '.join(get_args(Rest))}, not {rest!r:.40}")
    ids: list[int | None] = []
    pinned: list[bool] = []
    for place in places:
        stays = place.mark == "pin" or (rest == "stay" and not place.mark)
        if place.mark == "clear" or (rest == "anew" and not stays):
            ids.append(None)
        elif stays or place.origin is None:
            ids.append(token_at(place, step))
        else:
            ids.append(int(step.canvas_ids[place.origin]))
        pinned.append(stays)
    end = next((at for at, token in enumerate(ids) if pinned[at] and token in stops), None)
    if end is not None:
        behind = next((at for at in range(end + 1, len(places)) if places[at].mark == "pin"
                       and ids[at] not in stops), None)
        if behind is not None:
            raise DgemmaError(f"position {behind + 1} is pinned, but the answer ends before it: its end at position "
                              f"{end + 1} is pinned, too; clear one of them")
    if all(pinned[: None if end is None else end]) and (end is not None or len(ids) == len(canvas.start)):
        raise DgemmaError("all of this canvas stays as it is: clear the tokens that are to be drawn again")
    before = recording.before(number)
    prefix = [token for earlier in before.canvases for token in earlier.committed or ()]
    return Start(ids, pinned, step.step if rest == "go_on" else 0, prefix, before)


