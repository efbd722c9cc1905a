"""Battles of the arena: two contestants' answers to one prompt, and which of them was found better; kept in the store.

Works on: a store. Knows nothing of: pages, models, the network.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dgemma.errors import DgemmaError
from dgemma.studio.store import Store

Verdict = Literal["first", "second", "tie", "both bad"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
BattleStatus = Literal["waiting", "running", "done", "stopped"]
LONGEST_SET = 1000  # prompts that are run in a row
_LONGEST_NAME = 80  # characters


@dataclass(frozen=True)
class Contestant:
    """Who answers, and how. ``model`` None: what is loaded; ``options``: of `dgemma.studio.asking.OPTIONS`."""

    name: str = ""
    model: str | None = None
    adapter: str | None = None
    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for contestants that differ in nothing but their names."""
        return json.dumps([self.model, self.adapter, self.system, dict(self.options)], sort_keys=True)

    @property
    def title(self) -> str:
        """Its name, or what it is made of."""
        return self.name.strip()[:_LONGEST_NAME] or described(self)


@dataclass(frozen=True)
class Outcome:
    """What a contestant answered; ``info`` is of `dgemma.studio.answers.Answer`: steps, tokens, seconds, error."""

    contestant: Contestant
    text: str = ""
    reasoning: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Battle:
    """``swapped``: the second contestant's answer is shown at the left. ``blind``: names are hidden until the vote."""

    id: str
    series: str  # the same for prompts that were run in a row
    prompt: str
    first: Outcome
    second: Outcome
    blind: bool = True
    swapped: bool = False
    in_turn: bool = False  # one after the other, so that neither takes time from the other
    status: BattleStatus = "waiting"
    verdict: Verdict | None = None
    created: float = 0.0

    @property
    def hidden(self) -> bool:
        """Whether who is who must not be told yet."""
        return self.blind and self.verdict is None

    @property
    def over(self) -> bool:
        return self.status in ("done", "stopped")

    @property
    def shown(self) -> tuple[int, int]:
        """Which outcomes are at the left and at the right: 0 the first, 1 the second."""
        return (1, 0) if self.swapped else (0, 1)

    @property
    def outcomes(self) -> tuple[Outcome, Outcome]:
        return self.first, self.second


def about(contestant: Contestant) -> str:
    """What it is made of, where its title does not say that already."""
    made_of = described(contestant)
    return "" if made_of.casefold() == contestant.title.casefold() else made_of


def described(contestant: Contestant) -> str:
    """What sets a contestant apart, in a line."""
    parts = [part for part in (contestant.model, contestant.adapter) if part]
    parts += ["thinking" if name == "thinking" else f"{name.replace('_', ' ')} {value:g}"
              if isinstance(value, int | float) else f"{name.replace('_', ' ')} {value}"
              for name, value in sorted(contestant.options.items()) if value not in (None, False)]
    if words := " ".join(contestant.system.split()):
        parts.append(f"“{words[:29]}…”" if len(words) > 30 else f"“{words}”")
    return ", ".join(parts) or "the model's own settings"


class Battles:
    """The battles in a store, and the recordings of their answers."""

    def __init__(self, store: Store):
        self._store = store

    def add(self, prompts: Sequence[str], first: Contestant, second: Contestant, *, blind: bool,
            in_turn: bool) -> list[Battle]:
        """A series: every prompt is a battle that waits, its sides drawn by lot. Raises DgemmaError for none."""
        said = [prompt.strip() for prompt in prompts if prompt.strip()]
        if not 0 < len(said) <= LONGEST_SET:
            raise DgemmaError(f"a series has 1 to {LONGEST_SET:,} prompts, these are {len(said):,}")
        series, made = secrets.token_urlsafe(12), []
        for prompt in said:
            battle = Battle(secrets.token_urlsafe(12), series, prompt, Outcome(first), Outcome(second), blind,
                            blind and bool(secrets.randbits(1)), in_turn, created=self._store.now())
            self._store.execute("INSERT INTO battles VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", battle.id, series,
                                _storable(prompt), _json(battle.first), _json(battle.second), blind, battle.swapped,
                                in_turn, battle.status, None, battle.created)
            made.append(battle)
        return made

    def change(self, id: str, *, status: BattleStatus | None = None, verdict: Verdict | None = None,
               first: Outcome | None = None, second: Outcome | None = None) -> None:
        """Change what is given; a battle that is gone stays gone. Raises DgemmaError for an unknown verdict."""
        if verdict is not None and verdict not in VERDICTS:
            raise DgemmaError(f"a verdict is one of {', '.join(VERDICTS)}")
        given = {"status": status, "verdict": verdict, "first": first and _json(first),
                 "second": second and _json(second)}
        for name, value in given.items():
            if value is not None:
                self._store.execute(f"UPDATE battles SET {name} = ? WHERE id = ?", value, id)

    def get(self, id: str) -> Battle | None:
        rows = self._store.execute("SELECT * FROM battles WHERE id = ?", id)
        return _battle(rows[0]) if rows else None

    def all(self) -> list[Battle]:
        """All of them, the newest first."""
        return [_battle(row) for row in self._store.execute("SELECT * FROM battles ORDER BY created DESC, rowid DESC")]

    def series(self, series: str) -> list[Battle]:
        """Those of a series, in its order."""
        return [_battle(row) for row in self._store.execute("SELECT * FROM battles WHERE series = ? ORDER BY rowid",
                                                            series)]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete battles with their recordings."""
        for id in ids:
            self._store.execute("DELETE FROM battles WHERE id = ?", id)

    def mark_interrupted(self) -> None:
        """Battles that were not over when the server last went away never will be."""
        self._store.execute("UPDATE battles SET status = 'stopped' WHERE status IN ('waiting', 'running')")

    def put_recording(self, id: str, side: int, data: bytes) -> None:
        """Keep how an answer came to be, unless the battle is gone."""
        self._store.execute("INSERT OR REPLACE INTO battle_recordings SELECT id, ?, ? FROM battles WHERE id = ?",
                            side, data, id)

    def recording(self, id: str, side: int) -> bytes | None:
        rows = self._store.execute("SELECT data FROM battle_recordings WHERE battle = ? AND side = ?", id, side)
        return rows[0][0] if rows else None


def _json(outcome: Outcome) -> str:
    return json.dumps(dataclasses.asdict(outcome), separators=(",", ":"))


def _storable(text: str) -> str:
    """The text without halves of characters, which SQLite cannot write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _battle(row: Sequence[Any]) -> Battle:
    id, series, prompt, first, second, blind, swapped, in_turn, status, verdict, created = row
    return Battle(id, series, prompt, _outcome(first), _outcome(second), bool(blind), bool(swapped), bool(in_turn),
                  status, verdict, created)


def _outcome(text: str) -> Outcome:
    known = json.loads(text)
    return Outcome(Contestant(**known["contestant"]), known["text"], known["reasoning"], known["info"])


def read_prompts(data: bytes) -> list[str]:
    """The prompts of a JSONL file: each line a text, or an object with a "prompt". Raises DgemmaError by the line."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DgemmaError(f"this file is no text in UTF-8 ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DgemmaError(f"line {number} is no JSON ({error})") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt.strip():
            raise DgemmaError(f'line {number} is neither a text nor an object with a "prompt" that is one')
        prompts.append(prompt)
    return prompts
