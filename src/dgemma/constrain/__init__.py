"""Answers that have a form: a JSON schema, a regular expression, a choice; constrained while they are denoised.

A form becomes a language of texts (`schema`, `language`), the language an automaton over bytes (`automaton`), which
reads the vocabulary's tokens (`vocabulary`, `reading`); with stop tokens and thoughts that makes a graph (`graph`), and
every denoising step takes from it the most probable path and a drawn one (`paths`, `guide`). What was made lately is
kept, by its bytes. Knows nothing of the network. Nothing heavy is imported until a constraint is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from dgemma.constrain.choice import CallableTool, Calls, ToolsError
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma.chat.tokenizer import Tokenizer
    from dgemma.constrain.automaton import Automaton, Effort
    from dgemma.constrain.guide import TextConstraint
    from dgemma.constrain.language import Node

__all__ = ["constraint_of", "made"]

MAX_LENGTH = 2**18  # characters of a response format: it is kept as long as what was made of it
MAX_BYTES = 2**28  # of the constraints that are kept, with all that they have remembered while they were used
LENGTHS = (None, 400, 120, 40)  # of strings that a schema limits, tried one after the other until they are few enough
TYPES = ("text", "json_object", "json_schema", "regex", "choice")


class ByteCache:
    """Constraints by key, at most ``limit`` bytes of them; those that were asked for longest ago go first.

    A value that alone is larger is not kept. They grow while they are used, so they are measured anew whenever the
    cache is. For any thread.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._values: OrderedDict[Hashable, tuple[TextConstraint, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept, as it is now."""
        with self._lock:
            return self._total()

    def get(self, key: Hashable) -> TextConstraint | None:
        """The value of a key, which counts as used just now; None when it is not kept."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            self._trim()
            return found[0]

    def put(self, key: Hashable, value: TextConstraint, beside: int = 0) -> None:
        """Keep a value; ``beside``: bytes that its key takes."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value, beside
            self._trim()

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def _total(self) -> int:
        return sum(value.nbytes + beside for value, beside in self._values.values())

    def _trim(self) -> None:
        total = self._total()
        while total > self.limit and self._values:
            _, (value, beside) = self._values.popitem(last=False)
            total -= value.nbytes + beside


made = ByteCache(MAX_BYTES)


def constraint_of(response_format: Mapping[str, Any] | None, tokenizer: Tokenizer, stop_ids: tuple[int, ...], *,
                  thinking: bool = False, inside_thought: bool = False,
                  calls: Calls | None = None) -> TextConstraint | None:
    """The constraint that a response format asks for; None for {"type": "text"} without ``calls``.

    Formats: {"type": "json_object"}; {"type": "json_schema", "json_schema": {"schema": …}} (or "schema" itself);
    {"type": "regex", "regex": …}, which the whole text matches; {"type": "choice", "choice": ["a", "b"]}.
    With ``thinking`` the answer may begin with one thought, and begins inside one with ``inside_thought``; without,
    the text begins at once, so that what is known of it can stand in the canvas from the start. ``calls`` are the calls
    of tools that the answer may, or must, be instead. Raises DgemmaError naming what is wrong or not supported
    (`ToolsError`, where that is the tools). The last ones made are kept.
    """
    response_format = {"type": "text"} if response_format is None else response_format
    if not isinstance(response_format, Mapping):
        raise DgemmaError(f"response_format must be an object with a type, got {response_format!r}")
    kind = response_format.get("type")
    if kind not in TYPES:
        raise DgemmaError(f"response_format.type must be one of {', '.join(TYPES)}, got {kind!r}")
    if kind == "text" and calls is None:
        return None
    spelt = _spelt(response_format, "response_format is", "response_format has", DgemmaError)
    spelt_calls = "" if calls is None else _spelt(calls, "the tools are", "the tools that a call is held to have",
                                                  ToolsError)
    key = (spelt, tokenizer, tuple(stop_ids), thinking, inside_thought, spelt_calls)
    constraint = made.get(key)
    if constraint is None:
        constraint = _constraint(*key)
        made.put(key, constraint, beside=2 * (len(spelt) + len(spelt_calls)))
    return constraint


def _spelt(value: Mapping[str, Any] | Calls, they_are: str, they_have: str, kind: type[DgemmaError]) -> str:
    """A format, or calls, as the text of JSON that what is made of them is known by."""
    try:
        spelt = json.dumps(dataclasses.asdict(value) if isinstance(value, Calls) else value)
    except (TypeError, ValueError) as error:
        raise kind(f"{they_are} no JSON: {error}") from error
    except RecursionError as error:
        raise kind(f"{they_are} nested too deeply to be read") from error
    if len(spelt) > MAX_LENGTH:
        raise kind(f"{they_have} {len(spelt)} characters; {MAX_LENGTH} are the most")
    return spelt


def _constraint(spelt: str, tokenizer: Tokenizer, stop_ids: tuple[int, ...], thinking: bool,
                inside_thought: bool, spelt_calls: str) -> TextConstraint:
    from dgemma.chat.thoughts import CLOSE, OPEN
    from dgemma.constrain.automaton import FAR
    from dgemma.constrain.graph import OPENING, TEXT, THOUGHT, Graph, Special
    from dgemma.constrain.guide import TextConstraint
    from dgemma.constrain.reading import TableReader
    from dgemma.constrain.stacks import StackReader
    from dgemma.constrain.vocabulary import Vocabulary

    calls = None
    if spelt_calls:
        asked = json.loads(spelt_calls)
        calls = Calls(tuple(CallableTool(**tool) for tool in asked["tools"]), asked["required"], asked["many"])
    form = json.loads(spelt)
    free = calls is not None and not calls.required and form["type"] == "text"  # text, thoughts and calls as they come
    marks: dict[str, int] = {}
    if calls is not None:
        from dgemma.constrain.calls import MARKS

        marks = MARKS if free else {mark: byte for mark, byte in MARKS.items() if mark not in (OPEN, CLOSE)}
        missing = [mark for mark in marks if tokenizer.token_to_id(mark) is None and mark not in (OPEN, CLOSE)]
        if missing:
            raise ToolsError(f"calls cannot be made for sure: the model's vocabulary has no {missing[0]}")
    try:
        automaton, compiled, depth = _compiled(form, calls, inside_thought)
    except RecursionError as error:
        raise DgemmaError("response_format is nested too deeply to be read") from error
    vocabulary = Vocabulary.of(tokenizer, marks)
    marked = tuple(token for mark in marks if (token := tokenizer.token_to_id(mark)) is not None)
    special, start = Special(stop_ids, marks=marked), TEXT
    opened, closed = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
    if (thinking or inside_thought) and opened is not None and closed is not None and not free:
        special, start = Special(stop_ids, opened, closed, marked), THOUGHT if inside_thought else OPENING
    without = {*stop_ids} if free else {*stop_ids, *(token for token in (opened, closed) if token is not None)}
    reader = StackReader(automaton, compiled, vocabulary, without, depth) if compiled else \
        TableReader(automaton, vocabulary, without)
    what = "tool_choice" if calls is not None and calls.required else "response_format"
    if reader.distance(0) >= FAR:
        if calls is not None:
            raise ToolsError("no call satisfies the tools' parameters: they contradict themselves, or need characters "
                             "that the model's vocabulary lacks")
        raise DgemmaError("no text satisfies response_format: it contradicts itself, or needs characters that the "
                          "model's vocabulary lacks")
    return TextConstraint(lambda: Graph(reader.fresh(), vocabulary, special, start), tokenizer, what=what, free=free)


def _compiled(form: Mapping[str, Any], calls: Calls | None,
              inside_thought: bool) -> tuple[Automaton, dict[str, Automaton], int]:
    """The automaton of a response format, with calls beside it, those of the rules that it calls, and how deep.

    Where a schema's lengths make it too large, longer and longer ones are cut (`schema_language`).
    """
    from dgemma.constrain.automaton import MAX_EFFORT, Effort, TooLarge, compile_language
    from dgemma.constrain.stacks import DEEPEST

    refusal: DgemmaError | None = None
    left = MAX_EFFORT  # for all of them together, so that half of it is kept for the shortest lengths
    for longest in LENGTHS if form["type"] == "json_schema" or calls is not None else (None,):
        last = longest == LENGTHS[-1]
        if left < MAX_EFFORT * 3 // 4 and not last:
            continue
        allowed = left if last else left - MAX_EFFORT // 2
        effort = Effort(allowed)
        try:
            made: tuple[Automaton, dict[str, Automaton]] | None = None
            if form["type"] != "text" and not (calls is not None and calls.required):
                language, rules = _language(form, longest, effort)
                made = (compile_language(language, effort),
                        {name: compile_language(rule, effort) for name, rule in rules.items()})
            if calls is None:
                assert made is not None, "text alone is no constraint"
                return *made, DEEPEST
            from dgemma.constrain.calls import calls_automaton

            return calls_automaton(calls, made, longest, inside_thought, effort)
        except TooLarge as error:
            refusal = error
            left -= allowed - max(effort.left, 0)
    assert refusal is not None, "there is always a length to try"
    if calls is not None:
        raise ToolsError(str(refusal)) from refusal
    raise refusal


def _language(form: Mapping[str, Any], longest: int | None, effort: Effort) -> tuple[Node, dict[str, Node]]:
    """The language that a response format describes, and the rules that it calls."""
    from dgemma.constrain.language import Alt, literal, parse_regex
    from dgemma.constrain.schema import schema_language

    kind = form["type"]
    if kind == "json_object":
        return schema_language({"type": "object"}, longest, effort)
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise DgemmaError("response_format needs json_schema.schema: the schema itself")
        return schema_language(inner["schema"], longest, effort)
    if kind == "regex":
        if not isinstance(form.get("regex"), str):
            raise DgemmaError("response_format needs a regular expression as text in 'regex'")
        return parse_regex(form["regex"]), {}
    choices = form.get("choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise DgemmaError("response_format needs 'choice': a list of texts, at least one")
    return Alt(tuple(literal(choice) for choice in choices)), {}
