"""A battle as it is seen: two answers side by side, their canvases, one scrubber for both, the vote.

Works on: the studio's arena. Knows nothing of: how contestants are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import background_tasks, ui
from nicegui.events import KeyEventArguments

from dgemma.errors import DgemmaError
from dgemma.formats import duration_text, number_text, rate_text
from dgemma.studio.answers import Answer
from dgemma.studio.arena import Arena, recording_name
from dgemma.studio.battles import Battle, Outcome, Verdict, about
from dgemma.studio.buttons import main_button, text_button
from dgemma.studio.markdown import plain_to_html, to_html
from dgemma.studio.results import figures
from dgemma.studio.widgets.canvas import Canvas, summary

_SCRIPT = Path(__file__).parents[1] / "static" / "together.js"
_LETTERS = "AB"
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {  # what they are called, and how they are written
    "steps": ("steps", number_text), "tokens": ("tokens", number_text),
    "tokens_per_forward": ("tokens a step", number_text), "seconds": ("time", duration_text),
    "tokens_per_second": ("tokens/s", lambda rate: rate_text(rate, 1))}
_ENDINGS = {"length": "at the length limit", "stopped": "stopped", "cancelled": "cut off", "tool_calls": "with a call"}
_VOTES = (("A is better", "1"), ("B is better", "2"), ("Tie", "3"), ("Both bad", "4"))


class Together(ui.element, component=_SCRIPT):
    """One scrubber for several canvases."""

    def __init__(self, canvases: list[Canvas]):
        super().__init__()
        self._props["canvases"] = [canvas.id for canvas in canvases]


class BattleView:
    """What is shown of a battle. ``opened`` is told when another one of its series is to be shown."""

    def __init__(self, arena: Arena, opened: Callable[[str], None]):
        self._arena, self._opened = arena, opened
        self.id: str | None = None
        self._sides: list[_Side] = []
        self._box = ui.element("div").classes("battle")
        ui.keyboard(self._pressed, repeating=False, ignore=["input", "select", "textarea"])

    def show(self, id: str | None) -> None:
        """Show another battle; None: none."""
        self.id, self._sides = id, []
        self._box.clear()
        battle = None if id is None else self._arena.battles.get(id)
        if battle is None:
            return
        with self._box:
            asked = ui.html(plain_to_html(battle.prompt)).classes("prose arena-prompt")
            asked.props('role=group aria-label="The prompt"')
            with ui.element("div").classes("two"):
                self._sides = [_Side(battle, place) for place in (0, 1)]
            self._scrubber = ui.element("div")
            self._revealed = ui.label().classes("revealed").props("role=status")
            with ui.element("div").classes("votes") as self._votes:
                for place, (label, key) in enumerate(_VOTES):
                    button = ui.button(color=None, on_click=partial(self._vote, place)).classes("vote")
                    with button.props("flat no-caps"):
                        ui.label(label)
                        ui.html(f"<kbd>{key}</kbd>").props("aria-hidden=true")
            with ui.element("div").classes("battle-state"):
                self._state = ui.label().props("role=status")
                self._stop = text_button("Stop both", lambda: self._arena.stop(battle.id), icon="stop")
                self._stop.props("data-key=stop")
                self._next = main_button("Next", self._go_on)
        self.refresh()

    def refresh(self) -> None:
        """Show what has become of it."""
        battle = None if self.id is None else self._arena.battles.get(self.id)
        if battle is None or not self._sides:
            self._box.clear()
            self._sides = []
            return
        self._box.classes(add="blind" if battle.hidden else "", remove="" if battle.hidden else "blind")
        for side in self._sides:
            side.refresh(battle, self._arena.answer(battle.id, side.side))
        canvases = [side.canvas for side in self._sides if side.canvas is not None]
        if battle.over and len(canvases) == 2 and not self._scrubber.default_slot.children:
            with self._scrubber:
                Together(canvases)
        self._votes.set_visibility(battle.over and battle.verdict is None)
        self._revealed.set_visibility(battle.verdict is not None)
        self._revealed.set_text(verdict_text(battle))
        self._stop.set_visibility(not battle.over)
        series = self._arena.battles.series(battle.series)
        voted = sum(one.verdict is not None for one in series)
        self._next.set_visibility(battle.verdict is not None and voted < len(series))
        parts = {"waiting": ["waits for its turn"], "running": ["is being answered"], "stopped": ["was stopped"],
                 "done": []}[battle.status]
        if len(series) > 1:
            number = next(index for index, one in enumerate(series, 1) if one.id == battle.id)
            parts = [f"prompt {number} of {len(series)}", *parts,
                     f"{sum(one.over for one in series)} answered, {voted} voted on"]
        self._state.set_text(" · ".join(parts))

    def _vote(self, place: int) -> None:
        """``place``: of `_VOTES`."""
        battle = None if self.id is None else self._arena.battles.get(self.id)
        if battle is None or not battle.over or battle.verdict is not None:
            return
        by_side: tuple[Verdict, Verdict] = ("first", "second")
        verdict: Verdict = by_side[battle.shown[place]] if place < 2 else "tie" if place == 2 else "both bad"
        try:
            self._arena.vote(battle.id, verdict)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")

    def _go_on(self) -> None:
        """To the first of the series that nobody voted on."""
        battle = None if self.id is None else self._arena.battles.get(self.id)
        if battle is not None and battle.verdict is not None:
            later = next((one for one in self._arena.battles.series(battle.series) if one.verdict is None), None)
            if later is not None:
                self._opened(later.id)

    def _pressed(self, event: KeyEventArguments) -> None:
        modifiers = event.modifiers
        if not event.action.keydown or modifiers.ctrl or modifiers.alt or modifiers.meta:
            return
        key = str(event.key)
        if key in "1234":
            self._vote(int(key) - 1)
        elif key == "n":
            self._go_on()


class _Side:
    """One of the two answers. ``place``: 0 at the left, 1 at the right."""

    def __init__(self, battle: Battle, place: int):
        self.side = battle.shown[place]
        self.canvas: Canvas | None = None
        self._source = f"/recordings/{recording_name(battle.id, self.side)}"
        self._following: Answer | None = None
        with ui.element("article").classes("card").props(f'aria-label="Answer {_LETTERS[place]}"') as self.box:
            with ui.row().classes("card-head"):
                ui.label(_LETTERS[place]).classes("letter")
                self._name = ui.label().classes("name")
            self._about = ui.label().classes("muted small")
            self._text = ui.html().classes("prose")
            with ui.row().classes("failure") as self._failure:
                ui.icon("error_outline")
                self._why = ui.label()
            self._place = ui.element("div")
            self._figures = ui.element("dl").classes("figures")

    def refresh(self, battle: Battle, answer: Answer | None) -> None:
        outcome = battle.outcomes[self.side]
        hidden = battle.hidden
        self._name.set_text("" if hidden else outcome.contestant.title)
        self._about.set_text("" if hidden else about(outcome.contestant))
        won = battle.verdict == ("first", "second")[self.side]
        self.box.classes(add="won" if won else "", remove="" if won else "won")
        if answer is not None and answer.running:
            if self._following is not answer:
                self._following = answer
                self._put_canvas(running=True, recorded=False, line="")
                background_tasks.create(self.canvas.follow(answer), name="canvas")  # type: ignore[union-attr]
                background_tasks.create(self._follow(answer), name="text")
            return
        if answer is not None:
            outcome = Outcome(outcome.contestant, answer.text, answer.reasoning, answer.info)
        if self.canvas is None and outcome.info.get("canvases"):
            self._put_canvas(running=False, recorded=True, line=summary(dict(outcome.info)))
        self._tell(outcome.text, outcome.info.get("error"))
        self._figures.clear()
        if not hidden and outcome.info:
            with self._figures:
                for name, value in _told(outcome):
                    with ui.element("div"):
                        _words("dt", name)
                        _words("dd", value)

    def _put_canvas(self, **given: Any) -> None:
        self._place.clear()
        with self._place:
            self.canvas = Canvas(self._source, running=given["running"], recorded=given["recorded"],
                                 summary=given["line"])

    def _tell(self, text: str, error: str | None) -> None:
        self._text.set_content(to_html(text))
        self._failure.set_visibility(error is not None)
        self._why.set_text(error or "")

    async def _follow(self, answer: Answer) -> None:
        while answer.running and not self.box.is_deleted:
            self._tell(answer.text, None)
            await answer.changed()
        if not self.box.is_deleted:
            self._tell(answer.text, answer.error)


def _words(tag: str, text: str) -> None:
    with ui.element(tag):
        ui.label(text)


def _told(outcome: Outcome) -> list[tuple[str, str]]:
    """Figures as they are read, and how it ended unless the model ended it."""
    known = figures(outcome)
    told = [(label, write(known[name])) for name, (label, write) in FIGURES.items() if known[name] is not None]
    ending = _ENDINGS.get(outcome.info.get("finish_reason") or "")
    return told if ending is None else [*told, ("ended", ending)]


def verdict_text(battle: Battle) -> str:
    """Who won, by name."""
    if battle.verdict in ("first", "second"):
        side = 0 if battle.verdict == "first" else 1
        letter = _LETTERS[battle.shown.index(side)]
        return f"{letter} is better: {battle.outcomes[side].contestant.title}"
    return {"tie": "A tie", "both bad": "Both bad"}.get(battle.verdict or "", "")
