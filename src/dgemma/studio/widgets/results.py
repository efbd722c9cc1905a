"""What the arena's battles came to, as tables: pairs with their win rates, and the battles themselves.

Works on: the studio's arena. Knows nothing of: battles that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date, datetime
from functools import partial

from nicegui import ui

from dgemma.formats import count_text
from dgemma.studio.arena import Arena
from dgemma.studio.battles import Battle
from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.results import Pair, Share, pair_key, pairs, to_csv, to_json
from dgemma.studio.widgets.battle import FIGURES, verdict_text

_MOST = 50  # battles that are listed at first
_ALL = "All pairs"
_MEDIANS = ("seconds", "tokens_per_second", "tokens_per_forward")


class Results:
    """The tables. ``opened`` is told which battle is to be shown."""

    def __init__(self, arena: Arena, opened: Callable[[str], None]):
        self._arena, self._opened = arena, opened
        self._chosen: str | None = None  # a pair's key
        self._most = _MOST
        self.apart = ui.element("div")  # dialogs outlive what they were opened from
        self._box = ui.element("section").classes("section").props('aria-label="Results"')
        self.refresh()

    def refresh(self) -> None:
        """Show what the store has now."""
        known = [battle for battle in self._arena.battles.all() if battle.over]
        found = pairs(known)
        if self._chosen not in {pair.key for pair in found}:
            self._chosen = None
        self._box.clear()
        self._box.set_visibility(bool(known))
        with self._box:
            ui.label("Results").classes("section-title").props("role=heading aria-level=2")
            ui.label("A win rate is the share of decided votes, with Wilson's 95 % interval; ties and “both bad” are "
                     "counted beside it. Figures are medians.").classes("muted section-about")
            if found:
                self._pairs(found)
            chosen = [battle for battle in known if self._chosen is None or key_of(battle) == self._chosen]
            with ui.row().classes("arena-choices"):
                names = {None: _ALL} | {pair.key: f"{pair.first.title} · {pair.second.title}" for pair in found}
                pick = ui.select(names, value=self._chosen, on_change=lambda: self._choose(pick.value))
                pick.props('outlined dense options-dense aria-label="Battles of"').classes("pair-filter")
                text_button("CSV", partial(self._export, chosen, "csv"), icon="download")
                text_button("JSON", partial(self._export, chosen, "json"), icon="download")
                text_button("Delete these …", partial(self._delete, chosen), icon="delete_outline")
            self._battles(chosen)

    def _choose(self, key: str | None) -> None:
        self._chosen, self._most = key, _MOST
        self.refresh()

    def _pairs(self, found: Sequence[Pair]) -> None:
        with _table("Pairs", ("First", "Second", "Votes", "First better", "Second better", "Tie", "Both bad",
                              "First wins", *(FIGURES[name][0].capitalize() for name in _MEDIANS))):
            for pair in found:
                with ui.element("tr"):
                    _cell(pair.first.title, "who")
                    _cell(pair.second.title, "who")
                    for number in (len(pair.battles) - pair.open, pair.won, pair.lost, pair.ties, pair.bad):
                        _cell(str(number), "number")
                    with ui.element("td").classes("share"):
                        show_share(pair.share)
                    for name in _MEDIANS:
                        _cell(" · ".join("–" if value is None else FIGURES[name][1](value)
                                         for value in (pair.median(0, name), pair.median(1, name))), "number")

    def _battles(self, chosen: Sequence[Battle]) -> None:
        with _table("Battles", ("When", "Prompt", "First", "Second", "Verdict", "")):
            for battle in chosen[: self._most]:
                with ui.element("tr"):
                    _cell(f"{datetime.fromtimestamp(battle.created):%d %b %H:%M}")
                    _cell(" ".join(battle.prompt.split())[:200], "prompt")
                    for outcome in battle.outcomes:
                        _cell("hidden" if battle.hidden else outcome.contestant.title, "who")
                    _cell(verdict_text(battle) or "not voted")
                    with ui.element("td").classes("number"):
                        icon_button("visibility", "Show this battle", partial(self._opened, battle.id), small=True,
                                    hint=False)
                        icon_button("delete_outline", "Delete this battle", partial(self._delete, [battle]),
                                    small=True, hint=False)
        if len(chosen) > self._most:
            text_button(f"Show more of {len(chosen):,}", self._more)

    def _more(self) -> None:
        self._most += 4 * _MOST
        self.refresh()

    def _export(self, battles: Sequence[Battle], kind: str) -> None:
        text = to_csv(battles) if kind == "csv" else to_json(battles)
        ui.download.content(text.encode("utf-8", "replace"), f"dgemma-arena-{date.today()}.{kind}")

    def _delete(self, battles: Sequence[Battle]) -> None:
        def delete() -> None:
            dialog.close()
            self._arena.delete([battle.id for battle in battles])

        if not battles:
            return
        with self.apart, ui.dialog() as dialog, ui.card().classes("dialog"):
            ui.label(f"Delete {count_text(len(battles), 'battle')}?").classes("dialog-title")
            ui.label("Votes, answers and how they came to be will be gone.").classes("muted")
            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", dialog.close)
                main_button("Delete", delete, color="negative")
        dialog.on("hide", dialog.delete)
        dialog.open()


def key_of(battle: Battle) -> str:
    """The pair that a battle is of, as long as that may be told."""
    return "" if battle.hidden else pair_key(battle.first.contestant, battle.second.contestant)


def show_share(share: Share) -> None:
    """A win rate in words, and its interval as a bar from 0 to 1."""
    if not share.of:
        ui.label("–")
        return
    low, high = (100 * bound for bound in share.interval)
    ui.label(f"{100 * share.rate:.0f} % ({low:.0f} to {high:.0f})")
    ui.html(f'<div class="interval" aria-hidden="true"><span style="left:{low:.1f}%;width:{high - low:.1f}%"></span>'
            f'<i style="left:calc({100 * share.rate:.1f}% - 1px)"></i></div>', sanitize=False)


def _table(label: str, heads: Sequence[str]) -> ui.element:
    """A table's body, to be filled."""
    box = ui.element("div").classes("table-box").props(f'tabindex=0 role=region aria-label="{label}"')
    with box, ui.element("table").classes("table"):
        with ui.element("thead"), ui.element("tr"):
            for head in heads:
                with ui.element("th" if head else "td").props("scope=col" if head else ""):
                    ui.label(head)
        return ui.element("tbody")


def _cell(text: str, classes: str = "") -> None:
    with ui.element("td").classes(classes):
        ui.label(text)
