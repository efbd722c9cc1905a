"""Whether an answer is what was wanted: metrics by name, and the user's own from a file.

Works on a question with its reference answer, and on what a model generated. Knows nothing of models and samplers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import numbers
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dgemma.chat.messages import normalise_messages
from dgemma.diffusion.events import Generation
from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku
from dgemma.tasks.evaluate import band_of, grade, is_read
from dgemma.train.data.conversations import text_of

Values = dict[str, float]
# What `tasks.run_task` measures of every answer, whatever the metric.
RESERVED = ("steps_per_canvas", "tokens_per_forward", "seconds_per_answer", "failed")


@dataclass(frozen=True)
class Question:
    """An answer to be given: the messages before it, and the text and the tool calls ({"name", "arguments"}) that were
    to be written. ``where`` names the row that it comes from."""

    prompt: list[dict[str, Any]]
    reference: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    where: str = "question"


def means(rows: Sequence[Values]) -> Values:
    """The mean of every value, over the answers that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class Metric:
    """``score`` gives an answer's values by name, the higher the better; the answer is None where the request failed.
    ``main`` is the value that tells good models from bad ones (None: the first that comes); ``summary`` makes the
    values of a run out of those of its answers. Raises DgemmaError where a question is none for this metric."""

    name: str
    main: str | None
    score: Callable[[Question, Generation | None], Values]
    summary: Callable[[Sequence[Values]], Values] = means


# ---- metrics of the package ------------------------------------------------------------------------


def _exact(question: Question, answer: Generation | None) -> Values:
    """Text equal but for white space, and the same tool calls."""
    right = (answer is not None and answer.text.split() == question.reference.split()
             and _calls(answer.tool_calls) == _calls(question.tool_calls))
    return {"exact": float(right)}


def _contains(question: Question, answer: Generation | None) -> Values:
    """The reference stands somewhere in the answer, white space aside."""
    wanted = " ".join(question.reference.split())
    if not wanted:
        raise DgemmaError(f'{question.where}: the metric "contains" needs a reference answer with text in it')
    return {"contains": float(answer is not None and wanted in " ".join(answer.text.split()))}


def _tool_calls(question: Question, answer: Generation | None) -> Values:
    """The same calls in any order, arguments included; and the same names."""
    calls = [] if answer is None else answer.tool_calls
    wanted = question.tool_calls
    return {"tool_calls": float(answer is not None and _calls(calls) == _calls(wanted)),
            "tool_names": float(answer is not None and _names(calls) == _names(wanted))}


def _json(question: Question, answer: Generation | None) -> Values:
    """Of one record; "right", "given" and "wanted" count its (path, value) pairs, for `_json_summary`."""
    reference = _read_json(question.reference)
    if reference is None:
        raise DgemmaError(f'{question.where}: the metric "json" needs a reference answer that is JSON, not '
                          f"{question.reference[:60]!r}")
    wanted = pairs(reference[0])
    read = None if answer is None else _read_json(answer.text)
    given = set() if read is None else pairs(read[0])
    right = len(given & wanted)
    return {"record": float(given == wanted), "fields": right / len(wanted), "valid_json": float(read is not None),
            "right": right, "given": len(given), "wanted": len(wanted)}


def _json_summary(rows: Sequence[Values]) -> Values:
    """Precision, recall and F1 of all pairs together; ``fields`` is the mean share of a record's fields."""
    right, given, wanted = (sum(row[name] for row in rows) for name in ("right", "given", "wanted"))
    values = means([{name: row[name] for name in ("record", "fields", "valid_json")} for row in rows])
    return values | {"precision": right / given if given else 0.0, "recall": right / wanted,
                     "f1": 2 * right / (given + wanted)}


def _sudoku(question: Question, answer: Generation | None) -> Values:
    """All digits right, givens kept; together and by band."""
    asked = [message["content"] for message in normalise_messages(question.prompt) if message["role"] == "user"]
    puzzle = sudoku.parse(text_of(asked[-1])) if asked else None
    solution = sudoku.parse(question.reference)
    if puzzle is None or solution is None or not sudoku.is_solved(solution, puzzle):
        raise DgemmaError(f'{question.where}: the metric "sudoku" needs a puzzle in the last user message and its '
                          "solution as the reference answer")
    solved, kept = (False, False) if answer is None else grade(puzzle, solution, answer.text)
    band = band_of(puzzle)
    return {"solved": float(solved), "givens_kept": float(kept), f"solved/{band}": float(solved),
            f"givens_kept/{band}": float(kept)}


def _sudoku_pictures(question: Question, answer: Generation | None) -> Values:
    """All 81 cells right, of what is read from pictures (blanks in its reference), solved from them, or solved as
    text."""
    parts = [part for message in normalise_messages(question.prompt) if isinstance(message["content"], list)
             for part in message["content"] if part["type"] == "image"]
    if not parts:
        solved = _sudoku(question, answer)["solved"]
        return {"right": solved, "solved/text": solved}
    wanted = sudoku.parse(question.reference)
    if wanted is None:
        raise DgemmaError(f'{question.where}: the metric "sudoku_pictures" needs a grid as the reference answer')
    right = float(answer is not None and is_read(wanted, answer.text))
    return {"right": right, f"{'solved' if wanted.all() else 'read'}/{parts[-1].get('name', 'picture')}": right}


METRICS = {metric.name: metric for metric in (
    Metric("exact", "exact", _exact), Metric("json", "record", _json, _json_summary),
    Metric("contains", "contains", _contains), Metric("tool_calls", "tool_calls", _tool_calls),
    Metric("sudoku", "solved", _sudoku), Metric("sudoku_pictures", "right", _sudoku_pictures))}


# ---- values ----------------------------------------------------------------------------------------


def pairs(value: Any) -> set[tuple[tuple[str | int, ...], str]]:
    """Every leaf of a JSON value with its path: keys, and places in lists. Empty lists and objects are leaves.

    1 and 1.0 are the same number; true and 1, or "1" and 1, are not the same value.
    """
    found: set[tuple[tuple[str | int, ...], str]] = set()
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while left:
        path, item = left.pop()
        if isinstance(item, (Mapping, list)) and item:
            inner = item.items() if isinstance(item, Mapping) else enumerate(item)
            left += [((*path, key), child) for key, child in inner]
        else:
            found.add((path, json.dumps(int(item) if isinstance(item, float) and item.is_integer() else item)))
    return found


def _read_json(text: str) -> tuple[Any] | None:
    """The value in a tuple, since null is one; None when the text is no JSON (NaN and infinities are none)."""
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return (json.loads(text, parse_constant=refuse),)
    except (ValueError, RecursionError):
        return None


def _calls(calls: Sequence[Mapping[str, Any]]) -> Counter[tuple[str, frozenset[Any]]]:
    return Counter((call["name"], frozenset(pairs(call["arguments"]))) for call in calls)


def _names(calls: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(call["name"] for call in calls)


# ---- the user's own --------------------------------------------------------------------------------


def metric_of(name: str) -> Metric:
    """The metric of that name: one of `METRICS`, or a function of the user's as ``path/to/file.py:function``.

    The function gets a `Question` and a `Generation` and returns a number or a dictionary of numbers by name, the first
    of them the main one; the higher, the better. Raises DgemmaError naming file and line when there is no such function
    or it cannot be loaded.
    """
    if name in METRICS:
        return METRICS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise DgemmaError(f"there is no metric {name!r}: use one of {', '.join(METRICS)}, or a function of your own as "
                          "path/to/file.py:function")
    path = Path(file).expanduser().resolve()
    call = getattr(_load(path), function, None)
    if not callable(call):
        raise DgemmaError(f"{path}: there is no function {function!r} in this file; the metric {name!r} needs it")

    def score(question: Question, answer: Generation | None) -> Values:
        if answer is None:
            return {}
        try:
            result = call(question, answer)
        except Exception as error:
            raise DgemmaError(f"{_place(error, path)}: the metric {function} failed on the answer to {question.where}: "
                              f"{type(error).__name__}: {error}") from error
        values: Mapping[Any, Any] = result if isinstance(result, Mapping) else {function: result}
        for key, value in values.items():
            # Tensors and None would fail later, and a NaN would hide in a mean.
            if not isinstance(key, str) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise DgemmaError(f"{path}: the metric {function} must return a finite number, or a dictionary of "
                                  f"them; for {question.where} it returned {key!r}: {value!r}")
            if key in RESERVED:
                raise DgemmaError(f"{path}: the metric {function} returns a value named {key!r}, which is measured "
                                  "anyway: call it something else")
        if not values:
            raise DgemmaError(f"{path}: the metric {function} returned no value for {question.where}")
        return {key: float(value) for key, value in values.items()}

    return Metric(name, None, score)


def metric_identity(name: str) -> str:
    """The same for what judges alike: a metric's name, or a function's with the contents of its file, wherever it lies.

    For names that `metric_of` takes.
    """
    if name in METRICS:
        return name
    file, _, function = name.rpartition(":")
    return f"{function} {hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()}"


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise DgemmaError(f"{path}: no such file; a metric of your own is path/to/file.py:function")
    name = f"dgemma_metric_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DgemmaError(f"{_place(error, path)}: the metric's file cannot be loaded: {type(error).__name__}: "
                          f"{error}") from error
    return module


def _place(error: Exception, path: Path) -> str:
    """File and line in the user's file that an error comes from; only the file when it was raised outside."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if lines:
        return f"{path}, line {lines[-1]}"
    return f"{error.filename}, line {error.lineno}" if isinstance(error, SyntaxError) and error.filename else str(path)
