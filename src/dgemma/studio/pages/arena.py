"""The arena: two contestants answer one prompt side by side, somebody finds one of them better, all of it is counted.

Works on: the studio's arena and store. Knows nothing of: the network, HTTP.
"""

from __future__ import annotations

import dataclasses

from nicegui import events, ui

from dgemma.errors import DgemmaError
from dgemma.formats import count_text
from dgemma.studio.battles import Contestant, read_prompts
from dgemma.studio.buttons import file_field, icon_button, main_button, text_button
from dgemma.studio.frame import Frame, Page, Studio
from dgemma.studio.widgets.battle import BattleView
from dgemma.studio.widgets.contestant import ContestantCard, starting_points, usual_contestants
from dgemma.studio.widgets.results import Results

_SETTING = "arena"  # who met last, and how
_LARGEST = 4_000_000  # bytes of a file of prompts


class ArenaPage:
    """One browser's page."""

    def __init__(self, studio: Studio, frame: Frame, battle: str | None):
        self._studio, self._arena = studio, studio.arena
        with frame.bar:
            ui.label("Arena").classes("bar-title")
        with ui.element("div").classes("wide-sheet"):
            self._contestants()
            self._ask()
            self._view = BattleView(self._arena, self.open)
            self._results = Results(self._arena, self.open)
        self._arena.changed.subscribe(self._hear)
        running = self._arena.active()
        self._view.show(battle if battle is not None else running[0] if running else None)

    def _contestants(self) -> None:
        store = self._studio.store
        defaults = self._studio.serving().model.generation_config
        last = store.setting(_SETTING, {})
        known = [Contestant(**one) for one in last.get("contestants", [])]
        first, second = known if len(known) == 2 else usual_contestants(defaults)
        met = {outcome.contestant.title: outcome.contestant for battle in self._arena.battles.all()
               if not battle.hidden for outcome in battle.outcomes}
        starts = starting_points(defaults, store.setting("last_used", {}), met)
        with ui.element("div").classes("two"):
            self._cards = [ContestantCard(number, one, self._studio.serving, starts, lambda one: self._keep())
                           for number, one in enumerate((first, second), 1)]
        with ui.row().classes("arena-choices"):
            self._blind = ui.switch("Blind: names are told after the vote", value=last.get("blind", True),
                                    on_change=self._keep)
            self._in_turn = ui.switch("One after the other: neither takes time from the other",
                                      value=last.get("in_turn", False), on_change=self._keep)
            icon_button("swap_horiz", "Swap the contestants", self._swap)

    def _ask(self) -> None:
        with ui.element("div").classes("arena-ask"):
            with ui.element("div").classes("compose-box"):
                self._words = ui.textarea(placeholder="A prompt for both").props(
                    'autogrow borderless dense data-key=compose aria-label="Prompt"')
                self._words.on("keydown", lambda event: self._start_words(event.args), js_handler=_START_ON_ENTER)
                ui.button(icon="arrow_upward", on_click=lambda: self._start_words(self._words.value)).props(
                    'round unelevated dense aria-label="Start"').classes("send")
            with ui.row().classes("compose-foot"):
                ui.label("Enter starts · 1 2 3 4 vote · N next · Esc stops both").classes("keys")
                text_button("Several prompts …", self._several, small=True)

    # ---- what the user does ----

    def open(self, battle: str) -> None:
        """Show another battle."""
        ui.navigate.history.push(f"/arena/{battle}")
        self._view.show(battle)
        ui.run_javascript("document.activeElement?.blur(); scrollTo({top: 0})")

    def _keep(self) -> None:
        self._studio.store.set_setting(_SETTING, {
            "contestants": [dataclasses.asdict(card.contestant) for card in self._cards],
            "blind": self._blind.value, "in_turn": self._in_turn.value})

    def _swap(self) -> None:
        first, second = (card.contestant for card in self._cards)
        self._cards[0].set(second)
        self._cards[1].set(first)

    def _start_words(self, words: str | None) -> None:
        if (words or "").strip() and self._start([words or ""]):
            self._words.value = ""

    def _start(self, prompts: list[str]) -> bool:
        """Whether it began."""
        first, second = (card.contestant for card in self._cards)
        try:
            made = self._arena.start(prompts, first, second, blind=bool(self._blind.value),
                                     in_turn=bool(self._in_turn.value))
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)
            return False
        self.open(made[0].id)
        return True

    def _several(self) -> None:
        async def take(event: events.UploadEventArguments) -> None:
            try:
                prompts = read_prompts(await event.file.read())
            except DgemmaError as error:
                ui.notify(str(error), type="negative", position="top", multi_line=True)
                return
            start(prompts)

        def start(prompts: list[str]) -> None:
            if self._start(prompts):
                dialog.close()

        def tell() -> None:
            count = sum(bool(line.strip()) for line in (lines.value or "").splitlines())
            counted.set_text(count_text(count, "prompt") if count else "")

        with self._results.apart, ui.dialog() as dialog, ui.card().classes("dialog several"):
            ui.label("Several prompts, one battle each").classes("dialog-title")
            lines = ui.textarea("A prompt on each line", on_change=tell).props("outlined autofocus").classes("wide")
            counted = ui.label().classes("muted small")
            file_field('Or a file of JSON lines: texts, or objects with a "prompt"', take,
                       max_file_size=_LARGEST).props('accept=".jsonl,.ndjson,.json,.txt"')
            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", dialog.close)
                main_button("Start", lambda: start((lines.value or "").splitlines()))
        dialog.on("hide", dialog.delete)
        dialog.open()

    # ---- what is shown ----

    def _hear(self, battle: str) -> None:
        self._view.refresh()
        known = self._arena.battles.get(battle) if battle else None
        if known is None or known.over:
            self._results.refresh()


_START_ON_ENTER = """(event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.blur();
  emit(event.target.value);
}"""


async def build(studio: Studio, frame: Frame, battle: str | None = None) -> None:
    """The page; a battle that is not there (any more) is not shown."""
    ArenaPage(studio, frame, battle)


PAGE = Page("/arena", "Arena", "compare", build, aliases=("/arena/{battle}",))
