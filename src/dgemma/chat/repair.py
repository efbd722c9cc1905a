"""Tool calls read as they were meant, those too that are nearly right.

A model that writes a whole canvas at once sometimes leaves out a brace or a quote, or falls back to JSON or Python.
What has only one sensible reading is read; anything else is refused with ValueError inside and stays text outside.
Works on text; what is well formed is read by `tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dgemma.chat.call_repairer import NoCallError, OpenError, Repairer
from dgemma.chat.call_strings import Guesser, Weigher
from dgemma.chat.tools import CLOSE, MAX_DEPTH, NAME, Called, Reading, Tool, Tools, tools_of, well_formed

_BETWEEN = re.compile(rf"(?:[\s,;]|{re.escape(CLOSE)}|<channel\|>)*")  # what may stand between two calls
# What a call written as JSON may hold, at its top and inside; anything more and it is other JSON.
_OUTER = {"name", "function", "arguments", "parameters", "type", "id", "index"}
_INNER = _OUTER - {"function", "id", "index"}
# Ways to read one text that are tried before it is given up as unclear, and characters read on these ways.
_MOST_WAYS, _MOST_READ = 200, 300_000


class UnclearError(ValueError):
    """More than one way to read it."""


def read_calls(source: str, closed: bool = True, tools: Iterable[str | Tool | Mapping[str, Any]] = ()) -> list[Called]:
    """The call that ``source`` is, or the calls that it was surely meant to be; none when it is not sure.

    ``closed``: the closing mark follows. ``tools`` are the declared tools, or their names.
    """
    known = tools_of(tools)
    reading = weigh_calls(source, closed, known)
    return guessed_calls(source, closed, known) if reading is None or reading.unsettled else reading.calls


def weigh_calls(source: str, closed: bool, tools: Tools, held: bool = False) -> Reading | None:
    """The only reading of ``source`` in which every string ends at a sign of its own.

    No calls: it is surely none, or may be several things. None: there is no such reading. ``held``: the call was made
    under a constraint, which does not know all keys: one may come twice, and the later value counts, as in JSON.
    """
    try:
        return Reading([well_formed(source, closed, tools, held)])
    except ValueError:
        return weighed_calls(source, closed, tools)


def weighed_calls(source: str, closed: bool, tools: Tools, marked: bool = True) -> Reading | None:
    """The only reading of ``source`` in which every string ends at a sign of its own; None if there is none.

    Without calls it may be read in several ways, or is no call. ``marked``: it stands between a call's marks; if not,
    there must be more to show that it is a call than a tool's name.
    """
    reader = Repairer(source, closed)
    open_string = False
    try:
        return Reading(_calls(reader, tools, marked), reader.incomplete)
    except OpenError:
        open_string = True
    except NoCallError:
        return Reading([])
    except ValueError:
        pass
    for paired, declared in ((True, True), (True, False), (False, False)):
        try:
            if (reading := _only_way(source, closed, tools, marked, paired, declared)) is not None:
                return reading
        except OpenError:
            open_string = True
        except UnclearError:
            return Reading([])
    return Reading([], open=True) if open_string and closed else None


def guessed_calls(source: str, closed: bool, tools: Tools, marked: bool = True) -> list[Called]:
    """What stands between a call's marks (or behind the first, unless ``closed``) as calls; none if it is not clear."""
    try:
        return _calls(Guesser(source, closed), tools, marked)
    except ValueError:
        return []


def unmarked_calls(text: str, tools: Tools, closed: bool = False) -> list[Called]:
    """The calls of declared tools that a text without marks is; none if it is anything else or anything more."""
    reading = weighed_calls(text, closed, tools, marked=False)
    if reading is None or reading.unsettled:
        return guessed_calls(text, closed, tools, marked=False)
    return reading.calls


def _only_way(source: str, closed: bool, tools: Tools, marked: bool, paired: bool, declared: bool) -> Reading | None:
    """The one way to read it as `Weigher` does. Raises UnclearError when there are several, or too many to try."""
    found: dict[str, Reading] = {}
    way: list[int] | None = []
    ways = was_open = 0
    while way is not None:
        weigher = Weigher(source, closed, way, paired, declared)
        try:
            calls = _calls(weigher, tools, marked)
            key = json.dumps([(call.name, call.arguments) for call in calls], sort_keys=True)
            found.setdefault(key, Reading(calls, weigher.incomplete))
        except OpenError:
            was_open += 1
        except ValueError:
            pass
        way = weigher.next_way()
        ways += 1
        if len(found) > 1 or (way is not None and (ways >= _MOST_WAYS or ways * len(source) > _MOST_READ)):
            raise UnclearError("more than one way to read it")
    if not found and was_open:
        raise OpenError("a string without end")
    return next(iter(found.values()), None)


def _calls(reader: Repairer, tools: Tools, marked: bool) -> list[Called]:
    """All that the reader's text is: calls one after the other, perhaps as a list; raises ValueError."""
    text = reader.text
    at = reader.skip(0)
    calls: list[tuple[str, dict[str, Any]]] = []
    listed = False
    if text.startswith("[", at):
        try:
            value, end = reader.value(at, MAX_DEPTH)
            calls, at = _calls_of(value, tools, marked), end
        except NoCallError:
            raise
        except ValueError:
            reader.begin_again()
            listed, at = True, reader.skip(at + 1)
    while at < len(text) and not (calls and reader.left_over.fullmatch(text, at)):
        if text.startswith("{", at):
            reader.begin_again()
            value, at = reader.value(at, MAX_DEPTH)
            calls += _calls_of(value, tools, marked)
        else:
            name, arguments, at = reader.call(at, tools, marked)
            calls.append((name, arguments))
        following = _BETWEEN.match(text, at)
        if following and not reader.left_over.fullmatch(text, at):
            at = following.end()
        if listed and text.startswith("]", at):
            listed, at = False, at + 1
    if not calls:
        raise ValueError("no call")
    if listed:
        reader.leave_open()
    return [Called(name, arguments, repaired=True) for name, arguments in calls]


def _calls_of(value: Any, tools: Tools, marked: bool) -> list[tuple[str, dict[str, Any]]]:
    """Calls in the forms that other models write.

    {"name": …, "arguments": {…}}, {"function": …, "parameters": {…}}, OpenAI's nested one, and lists of these. Outside
    marks, of declared tools only and with their arguments: then it may also be plain JSON that looks alike.
    """
    if isinstance(value, dict) and set(value) == {"tool_calls"}:
        value = value["tool_calls"]
    if isinstance(value, list) and value:
        return [call for item in value for call in _calls_of(item, tools, marked)]
    if not isinstance(value, dict):
        raise ValueError("no call")
    if not set(value) <= _OUTER:
        raise NoCallError("other keys than a call's")
    inner = value.get("function")
    if inner is None:
        inner = value
    elif not isinstance(inner, dict):
        inner = {**value, "name": inner}
    elif not set(inner) <= _INNER:
        raise NoCallError("other keys than a function's")
    name = inner.get("name")
    arguments = inner.get("arguments", inner.get("parameters", {} if marked else None))
    if isinstance(arguments, str):  # OpenAI writes them as JSON text
        reader = Repairer(arguments, closed=False)  # not json.loads: that takes NaN and any depth
        try:
            arguments, end = reader.value(reader.skip(0), MAX_DEPTH)
        except ValueError as error:
            raise NoCallError("arguments that are no JSON") from error
        if end != len(reader.text):
            raise NoCallError("more than the arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NoCallError("no name or no arguments")
    if name not in tools if tools or not marked else not NAME.fullmatch(name):
        raise NoCallError("no tool's name")
    if not marked and {"type", "properties"} <= set(arguments):
        raise NoCallError("a tool's declaration repeated")
    return [(name, arguments)]
