"""Calls of tools as a language: the model's own notation, with arguments that their JSON schemas accept.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3}<tool_call|>`: strings as they are between marks, bare keys,
JSON's numbers and words, no white space. Its marks are single tokens, never text. Here each of them is one byte that no
text has, so that a language with marks is an ordinary one to all that reads languages, and the notation one in which
`schema` writes values. Knows nothing of token ids, canvases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dgemma.chat import thoughts, tools
from dgemma.constrain.automaton import Automaton, Effort, Nfa, TooLarge, compile_language
from dgemma.constrain.choice import CallableTool, Calls, ToolsError
from dgemma.constrain.language import ANY_CHAR, Alt, Chars, Literal, Repeat, seq
from dgemma.constrain.scalars import Notation, text_chars
from dgemma.constrain.schema import schema_language
from dgemma.errors import DgemmaError

MARKS = {tools.OPEN: 0xF8, tools.CLOSE: 0xF9, tools.QUOTE: 0xFA, thoughts.OPEN: 0xFB, thoughts.CLOSE: 0xFC}
_OPEN, _CLOSE, _QUOTE, _THINK, _THOUGHT = (Literal(bytes([byte])) for byte in MARKS.values())
# What a bare key can be made of (`dgemma.chat.tools.KEY`): no white space of Unicode, and nothing with a meaning.
_NO_KEY = (r"\x00-\x20\x7f-\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ue000-\uf8ff"
           r"{}\[\],:<>()=;")
NOTATION = Notation(Literal(b","), Literal(b":"), _QUOTE, text_chars, str, rf"[^{_NO_KEY}\"'][^{_NO_KEY}]*")
_THOUGHT_BODY = Repeat(Alt((Chars(ANY_CHAR), _QUOTE)), 0, None)
_LOOSE = seq(Literal(b"{"), Repeat(Alt((Chars(ANY_CHAR), _QUOTE)), 0, None), Literal(b"}"))  # held to nothing


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
    automaton = effort.keep(nfa.automaton(start, end), "the tools' schemas need automata of too many states together: "
                            "declare fewer or simpler tools")
    return automaton, rules, max((tools.MAX_DEPTH - max(depths)) // max(depths), 1)


def _arguments(tool: CallableTool, index: int, rules: dict[str, Automaton], longest: int | None, effort: Effort,
               may_fail: bool) -> tuple[Automaton, list[int]]:
    """A tool's arguments in braces, and the brackets that they and their rules open; these join the ``rules``.

    Any object where ``may_fail`` and the schema of a tool that is not strict cannot be kept.
    """
    try:
        language, called = schema_language(_object_schema(tool), longest, effort, NOTATION)
        names = {rule: f"{index} {rule}" for rule in called}
        made, *own = (_renamed(compile_language(node, effort), names) for node in (language, *called.values()))
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


def _renamed(automaton: Automaton, names: Mapping[str, str]) -> Automaton:
    """One that calls its rules by other names."""
    return replace(automaton, calls=[[(names[rule], back) for rule, back in out] for out in automaton.calls])


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
