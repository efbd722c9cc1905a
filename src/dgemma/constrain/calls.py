"""Calls of tools as a language: the model's own notation, with arguments that their JSON schemas accept.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3}<tool_call|>`: strings as they are between marks, bare keys,
JSON's numbers and words, no white space. Its marks are single tokens, never text. Here each of them is one byte that no
text has, so that a language with marks is an ordinary one to all that reads languages. The arguments' automaton is that
of their JSON (`schema`), rewritten: what JSON escapes stands as it is. Knows nothing of token ids, canvases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dgemma.chat import thoughts, tools
from dgemma.constrain.automaton import FAR, Automaton, Effort, Nfa, TooLarge, compile_language, nearest
from dgemma.constrain.choice import CallableTool, Calls, ToolsError
from dgemma.constrain.language import ANY_CHAR, Alt, Chars, Literal, Repeat, complement, seq
from dgemma.constrain.schema import schema_language
from dgemma.errors import DgemmaError

MARKS = {tools.OPEN: 0xF8, tools.CLOSE: 0xF9, tools.QUOTE: 0xFA, thoughts.OPEN: 0xFB, thoughts.CLOSE: 0xFC}
_OPEN, _CLOSE, _QUOTE, _THINK, _THOUGHT = (Literal(bytes([byte])) for byte in MARKS.values())
# What a bare key can be made of (`dgemma.chat.tools.KEY`): no white space of Unicode, and nothing with a meaning.
_NO_KEY = [(0, 0x20), (0x7F, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
           (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xE000, 0xF8FF),
           *((ord(sign), ord(sign)) for sign in "{}[],:<>()=;")]
_THOUGHT_BODY = Repeat(Alt((Chars(ANY_CHAR), _QUOTE)), 0, None)
_LOOSE = seq(Literal(b"{"), Repeat(Alt((Chars(ANY_CHAR), _QUOTE)), 0, None), Literal(b"}"))  # held to nothing
_ESCAPES = {ord("n"): 10, ord("t"): 9, ord("r"): 13, ord("b"): 8, ord("f"): 12, 34: 34, 92: 92, ord("/"): ord("/")}
_HEX = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}


def calls_automaton(calls: Calls, form: tuple[Automaton, dict[str, Automaton]] | None, longest: int | None,
                    inside_thought: bool, effort: Effort) -> tuple[Automaton, dict[str, Automaton], int]:
    """The automaton of an answer that may hold calls, those of the rules that it calls, and how deep these may call.

    Required: calls. With a ``form`` (the automata of one): calls, or that. Otherwise text, thoughts and calls; inside a
    thought at first if ``inside_thought``. ``longest``: as for `schema_language`. Raises `ToolsError` naming a tool
    whose schema cannot be kept.
    """
    free = not calls.required and form is None
    rules: dict[str, Automaton] = {} if form is None else dict(form[1])
    nfa = Nfa(effort)
    start, once, closed = nfa.state(), nfa.state(), nfa.state()
    depths = [1]  # brackets that a part of a call can have open at a time
    for index, tool in enumerate(calls.tools):
        at = nfa.add(seq(_OPEN, Literal(f"call:{tool.name}".encode())), once)
        if free and not tool.strict:
            at = nfa.add(_LOOSE, at)
        else:
            made, brackets = _arguments(tool, index, rules, longest, effort,
                                        may_fail=form is not None and not calls.required)
            at, depths = nfa.embed(made, at), depths + brackets
        nfa.empty[nfa.add(_CLOSE, at)].append(closed)
    end = nfa.state()
    if free:
        # Text and thoughts stand before, between and behind calls.
        said = Repeat(Alt((Chars(ANY_CHAR), seq(_THINK, _THOUGHT_BODY, _THOUGHT))), 0, None)
        before = nfa.add(said, nfa.add(seq(_THOUGHT_BODY, _THOUGHT), start) if inside_thought else start)
        behind = nfa.add(said, closed)
        for spoken in (before, behind) if calls.many else (before,):
            nfa.empty[spoken].append(once)
        nfa.empty[before].append(end)
        nfa.empty[behind].append(end)
    else:
        nfa.empty[start].append(once)
        nfa.empty[closed].append(end)
        if calls.many:
            nfa.empty[closed].append(once)
        if form is not None:
            nfa.empty[nfa.embed(form[0], start)].append(end)
    automaton = nfa.automaton(start, end)
    effort.states -= len(automaton.table)
    if effort.states < 0:
        raise TooLarge("the tools' schemas need automata of too many states together: declare fewer or simpler tools")
    return automaton, rules, max((tools.MAX_DEPTH - max(depths)) // max(depths), 1)


def _arguments(tool: CallableTool, index: int, rules: dict[str, Automaton], longest: int | None, effort: Effort,
               may_fail: bool) -> tuple[Automaton, list[int]]:
    """A tool's arguments in braces, and the brackets that they and their rules open; these join the ``rules``.

    Any object where ``may_fail`` and the schema of a tool that is not strict cannot be kept.
    """
    try:
        language, called = schema_language(_object_schema(tool), longest, effort)
        names = {rule: f"{index} {rule}" for rule in called}
        made, *own = (_rewritten(compile_language(node, effort), names, effort) for node in (language,
                                                                                              *called.values()))
    except TooLarge as error:
        raise TooLarge(f"the tool {tool.name!r}: {error}") from error
    except DgemmaError as error:
        if may_fail and not tool.strict:
            loose = CallableTool(tool.name, {"type": "object"}, False)
            return _arguments(loose, index, rules, longest, effort, may_fail=False)
        raise ToolsError(f"the tool {tool.name!r} cannot be held to its parameters: {error}") from error
    rules.update(zip(names.values(), own, strict=True))
    return made, [_brackets(automaton) for automaton in (made, *own)]


def _object_schema(tool: CallableTool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object; nothing said: there are none."""
    said = {"properties": {}} if tool.parameters is None else tool.parameters
    if not isinstance(said, Mapping):
        raise DgemmaError("its parameters must be a JSON schema: an object")
    kinds = said.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise DgemmaError(f"its parameters must be of type object, not {kinds!r}")
    schema = {**said, "type": "object"}
    if schema.get("properties") == {} and not schema.keys() & {
            "additionalProperties", "patternProperties", "propertyNames", "required", "unevaluatedProperties",
            "minProperties", "$ref", "allOf", "anyOf", "oneOf"}:
        schema["additionalProperties"] = False  # a function without parameters
    return schema


def _rewritten(json_text: Automaton, names: Mapping[str, str], effort: Effort) -> Automaton:
    """An automaton of JSON texts as one of the notation of calls; ``names``: of rules, what they are called now."""
    nfa = Nfa(effort)
    start = nfa.state()
    return nfa.automaton(start, _Rewriting(nfa, json_text, names).add(start))


# How the text that stands before a state is to be read: outside strings; behind a key; in a string that is a value; in
# one that is a key, with the state of the automaton of bare keys (-1: this is none), which is written bare or between
# marks; and, inside any of these, behind a backslash or within an escape of four digits.
_OUT, _BEHIND_KEY, _VALUE, _BARE, _MARKED = range(5)
_MARK = (MARKS[tools.QUOTE], MARKS[tools.QUOTE])  # an edge of a quote mark


@dataclass(frozen=True)
class _Place:
    """A state of the JSON automaton and how its text is to be read."""

    state: int
    mode: int
    key: int = 0  # state of the automaton of bare keys
    escape: tuple[int, ...] | None = None  # (): behind a backslash; (4 + digits): within \\u


class _Rewriting:
    """An automaton of JSON texts, added to another as one of the notation of calls."""

    def __init__(self, nfa: Nfa, json_text: Automaton, names: Mapping[str, str]):
        self.nfa, self.json_text, self.names = nfa, json_text, names
        self.bare = compile_language(seq(Chars(complement([*_NO_KEY, (34, 34), (39, 39)])),
                                         Repeat(Chars(complement(_NO_KEY)), 0, None)))
        self.rows = np.ascontiguousarray(json_text.table[:, json_text.byte_class])  # [S, 256]
        self.keys, self.values = self._strings()
        self._states: dict[_Place, int] = {}
        self._todo: list[_Place] = []
        # States where the bytes of the one or the other automaton begin to do something else.
        self._cuts = sorted({0, 256, *(np.flatnonzero(np.diff(json_text.byte_class)) + 1).tolist(), 34, 35, 92, 93,
                             *(np.flatnonzero(np.diff(self.bare.byte_class)) + 1).tolist()})

    def add(self, start: int) -> int:
        end = self.nfa.state()
        self.nfa.empty[start].append(self._at(_Place(0, _OUT)))
        while self._todo:
            place = self._todo.pop()
            source = self._states[place]
            if place.escape is not None:
                self._escaped(place, source)
            elif place.mode in (_OUT, _BEHIND_KEY):
                self._outside(place, source)
                if place.mode == _OUT and self.json_text.accepts[place.state]:
                    self.nfa.empty[source].append(end)
            else:
                self._inside(place, source)
        return end

    def _at(self, place: _Place) -> int:
        if place not in self._states:
            self._states[place] = self.nfa.state()
            self._todo.append(place)
        return self._states[place]

    def _strings(self) -> tuple[np.ndarray, np.ndarray]:
        """[S] each: whether a string that is open in a state can still become a key, and a value."""
        states, rows = len(self.rows), self.rows
        behind = rows[:, 34]  # where a quote leads
        plain = rows.copy()
        plain[:, [34, 92]] = -1
        escaped = np.where(rows[:, 92:93] >= 0, rows[:, 92:93] + states, -1)
        # States S … 2S - 1 are behind a backslash; a column for every class of bytes would do, all 256 are as well.
        steps = np.concatenate([np.concatenate([plain, escaped], axis=1),
                                np.concatenate([rows, np.full((states, 1), -1, rows.dtype)], axis=1)])
        colon = np.append(rows[:, ord(":")] >= 0, False)[behind]
        other = np.delete(rows, ord(":"), axis=1)
        goes_on = (other >= 0).any(axis=1) | self.json_text.accepts | np.array([bool(out) for out in
                                                                                self.json_text.calls])
        value = np.append(goes_on, False)[behind]
        none = np.zeros(states, bool)
        keys, values = (nearest(steps, np.concatenate([ends & (behind >= 0), none]))[:states] < FAR
                        for ends in (colon, value))
        return keys, values

    def _ranges(self, state: int) -> Iterator[tuple[int, int, int]]:
        """(first byte, last byte, next state) of what a state of the JSON automaton reads."""
        row = self.rows[state]
        for low, past in pairwise(self._cuts):
            if row[low] >= 0:
                yield low, past - 1, int(row[low])

    def _outside(self, place: _Place, source: int) -> None:
        nfa = self.nfa
        for low, high, target in self._ranges(place.state):
            if low == 34 and place.mode == _OUT:
                if self.values[target]:
                    nfa.edges[source].append((*_MARK, self._at(_Place(target, _VALUE))))
                if self.keys[target]:
                    nfa.empty[source].append(self._at(_Place(target, _BARE)))
                    nfa.edges[source].append((*_MARK, self._at(_Place(target, _MARKED))))
                continue
            for byte in range(low, high + 1):
                if byte in b" \t\n\r":
                    nfa.empty[source].append(self._at(_Place(target, place.mode)))
                elif (byte == ord(":")) == (place.mode == _BEHIND_KEY):
                    nfa.edges[source].append((byte, byte, self._at(_Place(target, _OUT))))
        if place.mode == _OUT:
            for rule, back in self.json_text.calls[place.state]:
                nfa.calls[source].append((self.names[rule], self._at(_Place(back, _OUT))))

    def _inside(self, place: _Place, source: int) -> None:
        for low, high, target in self._ranges(place.state):
            if low == 34:
                self._close(place, source, target)
            elif low == 92:
                self.nfa.empty[source].append(self._at(_Place(target, place.mode, place.key, ())))
            else:
                self._emit(source, place, low, high, target)

    def _close(self, place: _Place, source: int, target: int) -> None:
        """Behind a string's last character; a key is bare if it can be."""
        if place.mode == _BARE:
            if place.key >= 0 and self.bare.accepts[place.key]:
                self.nfa.empty[source].append(self._at(_Place(target, _BEHIND_KEY)))
        elif place.mode == _VALUE or place.key < 0 or not self.bare.accepts[place.key]:
            mode = _OUT if place.mode == _VALUE else _BEHIND_KEY
            self.nfa.edges[source].append((*_MARK, self._at(_Place(target, mode))))

    def _emit(self, source: int, place: _Place, low: int, high: int, target: int) -> None:
        """An edge over bytes of a string's text that do the same to both automata."""
        key = place.key
        if place.mode == _VALUE:
            if not self.values[target]:
                return
        else:
            key = self.bare.next_byte(key, low) if key >= 0 else -1
            if not self.keys[target] or (place.mode == _BARE and key < 0):
                return
        self.nfa.edges[source].append((low, high, self._at(_Place(target, place.mode, key))))

    def _escaped(self, place: _Place, source: int) -> None:
        assert place.escape is not None
        inner = _Place(place.state, place.mode, place.key)
        for low, high, target in self._ranges(place.state):
            for byte in range(low, high + 1):
                if not place.escape and byte in _ESCAPES:
                    self._emit(source, inner, _ESCAPES[byte], _ESCAPES[byte], target)
                elif not place.escape and byte == ord("u"):
                    self.nfa.empty[source].append(self._at(_Place(target, place.mode, place.key, (4,))))
                elif place.escape and byte in _HEX:
                    self._digit(source, place, (*place.escape, _HEX[byte]), target)

    def _digit(self, source: int, place: _Place, escape: tuple[int, ...], target: int) -> None:
        if len(escape) < 5:
            self.nfa.empty[source].append(self._at(_Place(target, place.mode, place.key, escape)))
            return
        code = int("".join(f"{digit:x}" for digit in escape[1:]), 16)
        if 0xD800 <= code <= 0xDFFF:
            return  # half of a pair: such a text is not written in the notation
        data, key = chr(code).encode(), place.key
        for byte in data[:-1]:
            following = self.nfa.state()
            self.nfa.edges[source].append((byte, byte, following))
            source, key = following, self.bare.next_byte(key, byte) if key >= 0 and place.mode != _VALUE else key
        self._emit(source, _Place(place.state, place.mode, key), data[-1], data[-1], target)


def _brackets(automaton: Automaton) -> int:
    """The most brackets that a text of it can have open at a time, calls left out."""
    rows = automaton.table[:, automaton.byte_class]
    depth, todo, most = {0: (0, False)}, [0], 1
    for state in todo:  # grows while it is walked; whichever way leads to a state, as many brackets are open
        level, inside = depth[state]
        most = max(most, level)
        steps = [(byte, int(rows[state, byte])) for byte in np.flatnonzero(rows[state] >= 0).tolist()]
        for byte, target in [*steps, *((0, back) for _, back in automaton.calls[state])]:
            if target not in depth:
                step = 0 if inside else (byte in b"{[") - (byte in b"}]")
                depth[target] = (level + step, inside != (byte == MARKS[tools.QUOTE]))
                todo.append(target)
    return most
