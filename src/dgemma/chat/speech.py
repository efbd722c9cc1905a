"""What a model says to its user, let through as soon as it is sure to be said.

Held back for a while: a call whose opening mark is missing, and what may be the beginning of a stop string. Works on
text that knows its tokens' places, and which of it is marks. Knows nothing of: tokens themselves, thoughts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dgemma.chat.repair import unmarked_calls, weighed_calls
from dgemma.chat.thoughts import possible_beginning
from dgemma.chat.tools import CLOSE, PRIVATE, QUOTE, Called, Tools

FENCE = "```"
_OPEN_FENCE = re.compile(FENCE + r"(?:json|tool_calls?|tool_code)?\s*")
_CODE_FENCE = re.compile(FENCE + r"tool_(?:calls?|code)\s*")
_SPACE = re.compile(r"\s*")
_HEAD = 400  # characters in which a call shows that it may be one
# How a call in JSON may begin, white space left out.
_BEGINNINGS = tuple(f'{lead}"{key}"' for lead in ("{", "[{") for key in
                    ("name", "function", "arguments", "parameters", "type", "id", "index", "tool_calls"))
_CODE_KINDS = ("tool_calls", "tool_call", "tool_code")
_FENCED = tuple(FENCE + kind + beginning for kind in ("", "json", *_CODE_KINDS) for beginning in _BEGINNINGS)
# What may stand before the name of a tool that is called without marks, one of each.
_LEADS = (("[",), ("print(",), ("call:",), ("default_api.", "default_api:", "functions.", "functions:", "tools.",
                                           "tools:"), (QUOTE, '"', "'", "`"))


@dataclass(frozen=True)
class Said:
    """A stretch of what the user reads; never empty. ``tokens``: it is of the answer's tokens [start, stop)."""

    text: str
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Spelt:
    """A text whose every character knows the tokens [start, stop) that spell it, and whether it is a mark's."""

    text: str = ""
    places: list[tuple[int, int]] = field(default_factory=list)
    marks: list[bool] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Spelt]) -> Spelt:
        return cls("".join(part.text for part in parts), [place for part in parts for place in part.places],
                   [mark for part in parts for mark in part.marks])

    def __add__(self, other: Spelt) -> Spelt:
        return Spelt.joined([self, other])

    def __getitem__(self, part: slice) -> Spelt:
        return Spelt(self.text[part], self.places[part], self.marks[part])

    def guarded(self, tools: Tools) -> Guarded:
        """As a text in which marks only are spelt like marks: another character stands for every other "<"."""
        guard = next(chr(code) for code in PRIVATE if chr(code) not in self.text)
        source = self.text
        if "<" in source:
            source = "".join(guard if char == "<" and not mark else char
                             for char, mark in zip(source, self.marks, strict=True))
        if any("<" in name for tool in tools.values() for name in (tool.name, *(tool.parameters or ()))):
            spelt = [tool.spelt("<", guard) for tool in tools.values()]
            tools = {tool.name: tool for tool in spelt}
        return Guarded(source, tools, guard)


@dataclass(frozen=True)
class Guarded:
    """A text, and the tools as it spells them, with ``guard`` for every "<" that is not a mark's: positions stay."""

    source: str
    tools: Tools
    guard: str

    def restored(self, calls: list[Called]) -> list[Called]:
        """Calls read from it, as they were spelt."""
        return [replace(call, name=call.name.replace(self.guard, "<"), arguments=self._restored(call.arguments))
                for call in calls]

    def _restored(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(self.guard, "<")
        if isinstance(value, list):
            return [self._restored(item) for item in value]
        if isinstance(value, dict):
            return {key.replace(self.guard, "<"): self._restored(item) for key, item in value.items()}
        return value


class Speech:
    """Takes in text by `add`; `pause` says that the next is not its continuation, or that there is none.

    What comes out, put together, does not depend on how the text was cut. Line breaks at the very beginning are
    dropped. ``tools`` are the declared tools: without any, nothing but text is in a text.
    """

    def __init__(self, tools: Tools, stop: Sequence[str]):
        self.stopped: str | None = None  # the stop string that was met; nothing comes after it
        self.stop_place: int | None = None  # one past the token that completed it
        self._tools, self._stop = tools, tuple(filter(None, stop))
        self._unread = Spelt()  # may be a call
        self._unsaid = Spelt()  # is said unless it becomes a stop string
        self._begun = False
        self._fresh = True  # nothing was said yet, or not since the last thought
        self._told = 0  # one past the last token of what was said

    def add(self, text: Spelt) -> list[Said | Called]:
        self._unread += text
        return self._settle(final=False)

    def pause(self) -> list[Said | Called]:
        return self._settle(final=True)

    def begin_afresh(self) -> None:
        """A thought has ended, and what follows may be a call without its opening mark."""
        self._fresh = True

    def _settle(self, final: bool) -> list[Said | Called]:
        pieces: list[Said | Called] = []
        while self.stopped is None:
            if not self._begun:
                self._drop(len(self._unread.text) - len(self._unread.text.lstrip("\n")))
            if not self._unread.text:
                break
            if self._fresh and self._tools:
                alone = self._calls_alone(final)
                if alone is None:
                    break
                if alone:
                    self._flush(pieces)
                    pieces += alone
                    self._drop(len(self._unread.text))
                    continue
            start, fenced = self._next_json(final)
            self._say(start, pieces)
            if self.stopped is not None or not self._unread.text:
                break
            guarded = self._unread.guarded(self._tools)
            found = _fenced_or_json_calls(guarded.source, fenced, guarded.tools, final)
            if found is None:
                break
            calls, end = found
            if calls:
                self._flush(pieces)
                pieces += guarded.restored(calls)
                self._drop(end)
            else:
                self._say(end, pieces)
        if final:
            self._flush(pieces)
        return pieces

    def _calls_alone(self, final: bool) -> list[Called] | None:
        """The calls that all of a stretch is, not written as JSON and without opening marks; None while it may be."""
        head = self._unread[:_HEAD].guarded(self._tools)
        if not _may_call("".join(head.source.split()), head.tools):
            return []
        if not final:
            return None
        text = self._unread.text.rstrip()
        closed = text.endswith(CLOSE) and self._unread.marks[len(text) - 1]
        guarded = self._unread.guarded(self._tools)
        return guarded.restored(unmarked_calls(guarded.source, guarded.tools, closed))

    def _next_json(self, final: bool) -> tuple[int, bool]:
        """Where a call in JSON may begin (the end of what is unread: nowhere), and whether within a fence."""
        text = self._unread.text
        if not self._tools:
            return len(text), False
        if self._fresh and (text.lstrip().startswith(("{", "[")) or (text.isspace() and not final)):
            return 0, False
        fence = text.find(FENCE)
        if fence < 0:
            return len(text) - (0 if final else possible_beginning(text, (FENCE,))), True
        return fence, True

    def _drop(self, count: int) -> None:
        self._unread = self._unread[count:]

    def _say(self, count: int, pieces: list[Said | Called]) -> None:
        """Let through the next characters, unless a stop string is among them."""
        if not count:
            return
        self._begun, self._fresh = True, False
        self._unsaid += self._unread[:count]
        self._drop(count)
        text = self._unsaid.text
        met = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if met:
            end, at, self.stopped = min(met)  # the one that was complete first
            self.stop_place = self._unsaid.places[end - 1][1]
            self._tell(at, pieces)
        else:
            self._tell(len(text) - (possible_beginning(text, self._stop) if self._stop else 0), pieces)

    def _flush(self, pieces: list[Said | Called]) -> None:
        if self.stopped is None:
            self._tell(len(self._unsaid.text), pieces)

    def _tell(self, count: int, pieces: list[Said | Called]) -> None:
        said, self._unsaid = self._unsaid[:count], self._unsaid[count:]
        if said.text:
            start, self._told = max(self._told, said.places[0][0]), said.places[-1][1]
            pieces.append(Said(said.text, (min(start, self._told), self._told)))


def _may_call(head: str, tools: Tools) -> bool:
    """Whether what begins so, white space left out, may be calls of declared tools: `call:look{`, `look(`, `[look(`."""
    rests = {head}
    for leads in _LEADS:
        for rest in tuple(rests):
            for lead in leads:
                if lead.startswith(rest):  # all there is so far is a part of it
                    return True
                if rest.startswith(lead):
                    rests.add(rest[len(lead):])
    for tool in tools:
        name = "".join(tool.split())
        for rest in rests:
            if name.startswith(rest):
                return True
            if rest.startswith(name):
                behind = rest[len(name):]
                quote = next((sign for sign in _LEADS[-1] if behind.startswith(sign)), "")
                behind = behind[len(quote):].removeprefix(":")
                if not behind or behind[0] in "{(" or any(sign.startswith(behind) for sign in _LEADS[-1]):
                    return True
    return False


def _fenced_or_json_calls(text: str, fenced: bool, tools: Tools, final: bool) -> tuple[list[Called], int] | None:
    """The calls that a text begins with, and where they end; None while it is not sure.

    No calls: so many characters are surely text. A fence may stand anywhere; without one the whole text must be calls.
    """
    no_call = ([], len(FENCE) if fenced else len(text) - len(text.lstrip()) + 1)
    head = "".join(text[:_HEAD].split())
    if not head:
        return ([], len(text)) if final else None
    if not any(head.startswith(known) or known.startswith(head) for known in (_FENCED if fenced else _BEGINNINGS)):
        kind = next((kind for kind in _CODE_KINDS if fenced and head.startswith(FENCE + kind)), None)
        if kind is None or not _may_call(head[len(FENCE + kind):], tools):
            return no_call
        return _code_calls(text, tools, final) or (no_call if final else None)
    opening = _OPEN_FENCE.match(text) if fenced else _SPACE.match(text)
    if opening is None:  # half a fence so far
        return None if not final else no_call
    at = opening.end()
    calls: list[Called] = []
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too
        rest = text[at : at + len(FENCE)]
        if fenced and rest == FENCE:
            return (calls, at + len(FENCE)) if calls else no_call
        if not rest or (fenced and FENCE.startswith(rest)):  # nothing follows so far, or half a fence
            return None if not final else (calls, len(text)) if calls else no_call
        if rest[0] not in "{[" and calls:
            return no_call
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            if not final:
                return None
            end = text.find(FENCE, at) if fenced else -1
            end = len(text) if end < 0 else end
        more = unmarked_calls(text[at:end], tools)
        if not more:
            return no_call
        calls, at = calls + more, end


def _code_calls(text: str, tools: Tools, final: bool) -> tuple[list[Called], int] | None:
    """The calls in a fence that says it holds code of calls; None while there is no end to it, or no call."""
    opening = _CODE_FENCE.match(text)
    if opening is None:
        return None
    fence = text.find(FENCE, opening.end())
    while fence >= 0:
        reading = weighed_calls(text[opening.end() : fence], True, tools, marked=False)
        if reading is None or not reading.open:
            return (reading.calls, fence + len(FENCE)) if reading is not None and reading.calls else ([], len(FENCE))
        fence = text.find(FENCE, fence + len(FENCE))  # it may stand within a string
    calls = unmarked_calls(text[opening.end() :], tools) if final else []
    return (calls, len(text)) if calls else None
