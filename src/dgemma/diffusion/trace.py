"""Traces: what happened while a text was denoised, kept in a file that can be watched again without a model.

Works on: events, and the bytes of each token they mention. Knows nothing of: tensors, tokenizers, terminals.

The file is JSON Lines. The first line is a header; each other line is one event: its class, its fields, and the
`pieces` of tokens that were not met before. A piece is its text where that is UTF-8, else `{"hex": "e697"}`; special
tokens are `{"text": "<eos>", "special": true}`. Lists of flags are strings of 0 and 1. Entropies keep four decimals; so
do log-probabilities, each `[token, logprob, [[token, logprob], …]]` with the alternatives last, and candidates,
`[[token, probability], …]` at each place. What was not asked for is left out. docs/traces.md shows a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import MISSING, Field, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from dgemma.diffusion.events import (
    CanvasCommitted,
    CanvasStarted,
    Denoised,
    Event,
    Failed,
    Finished,
    FinishReason,
    Generation,
    TokenLogprob,
)
from dgemma.errors import DgemmaError
from dgemma.fields import is_whole, parse_json, shown
from dgemma.files import atomic_write, json_bytes

FORMAT = "dgemma-trace"
VERSION = 1
DECIMALS = 4  # of entropies and log-probabilities; the sampler's thresholds are around 0.005 nats

# What was read of an event's tokens is not kept: whoever has them can read them again.
_LEFT_OUT = ("logprobs", "candidates", "steps_before")  # where they say nothing
UNKEPT = {CanvasCommitted: ("pieces",), Finished: ("answer",)}
Piece = tuple[bytes, bool]  # a token's bytes, and whether it is special
_CLASSES = {cls.__name__: cls for cls in (CanvasStarted, Denoised, CanvasCommitted, Finished, Failed)}


@dataclass(frozen=True)
class TraceHeader:
    """Where a trace comes from."""

    model: str
    prompt: str
    created: str  # ISO 8601


@dataclass(frozen=True)
class Trace:
    """A trace in memory."""

    header: TraceHeader
    pieces: dict[int, Piece]  # of every token that some event mentions
    events: list[Event]


def read_trace(path: str | Path) -> Trace:
    """The trace in a file. Raises `DgemmaError` when there is none, or it is of another version or damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = _read_header(path, file.readline())
            pieces: dict[int, Piece] = {}
            events: list[Event] = []
            for number, line in enumerate(file, 2):
                try:
                    record = parse_json(line, "it", halves=True)
                    pieces.update(_pieces_from(record.pop("pieces", {})))
                    event = _event_from(record)
                    if (unknown := next((i for i in _tokens(event) if i not in pieces), None)) is not None:
                        raise ValueError(f"no piece for token {unknown}")
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError, DgemmaError) as error:
                    whole = "is damaged" if line.endswith(b"\n") else "is cut off"
                    raise DgemmaError(
                        f"{path}: line {number} {whole} ({error}); the lines before it can be kept as a trace"
                    ) from error
                events.append(event)
    except OSError as error:
        raise DgemmaError(f"{path} cannot be read: {error.strerror or error}") from error
    return Trace(header, pieces, events)


class TraceWriter:
    """Writes events to a trace as they happen; a context manager.

    The file is written beside its place and renamed on exit, so a reader never sees half of one. When generation was
    interrupted the trace so far is kept, up to its last whole line. When nothing had happened yet, or an event could
    not be written, nothing is left behind and an older trace stays.
    """

    def __init__(self, path: str | Path, *, model: str, prompt: str, piece_of: Callable[[int], Piece],
                 created: str | None = None) -> None:
        """`piece_of`: a token's bytes and whether it is special. `created`: now, unless given."""
        self.path = Path(path)
        self._piece_of = piece_of
        self._known: set[int] = set()
        self._events = 0
        self._size = 0  # bytes of whole lines
        self._failed = False
        created = created or datetime.now(UTC).isoformat(timespec="seconds")
        self._header = {"format": FORMAT, "version": VERSION, "model": model, "created": created, "prompt": prompt}

    def __enter__(self) -> TraceWriter:
        with ExitStack() as stack:
            self._file = stack.enter_context(stack.enter_context(atomic_write(self.path)).open("wb"))
            self._line(self._header)
            self._stack = stack.pop_all()
        return self

    def write(self, event: Event) -> None:
        """Add an event. Raises `DgemmaError` when the file cannot be written."""
        new = [i for i in dict.fromkeys(_tokens(event)) if i not in self._known]
        record = {"event": type(event).__name__, **_fields_of(event)}
        if new:
            record["pieces"] = {str(i): _piece_record(*self._piece_of(i)) for i in new}
        self._line(record)
        self._known.update(new)
        self._events += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        keep = not self._failed and (kind is None or self._events > 0)
        try:
            with self._stack:
                if not keep:
                    raise _Discarded
                self._file.truncate(self._size)  # an interruption may have come in the middle of a line
        except _Discarded:
            pass
        except DgemmaError:
            if kind is None:  # else the first error is the one to hear of
                raise

    def _line(self, record: dict[str, Any]) -> None:
        line = json_bytes(record) + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            self._failed = True
            raise DgemmaError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._size += len(line)


class _Discarded(Exception):  # noqa: N818  (nothing went wrong)
    """Ends the writing of a trace that is not to be kept."""


def _tokens(event: Event) -> Iterable[int]:
    if isinstance(event, Failed):
        return []
    if isinstance(event, Denoised):
        likely = [token for place in event.candidates or [] for token, _ in place]
        return [*event.token_ids, *event.canvas_ids, *likely]
    if isinstance(event, CanvasStarted):
        return event.token_ids
    said = event.generation if isinstance(event, Finished) else event
    stop = said.stop_token_id if isinstance(said, Generation) else None
    asked = [token for place in said.logprobs or [] for token in (place.token_id, *(token for token, _ in place.top))]
    return [*said.token_ids, *([] if stop is None else [stop]), *asked]


def _piece_record(data: bytes, special: bool) -> Any:
    try:
        record: dict[str, Any] = {"text": data.decode()}
    except UnicodeDecodeError:
        record = {"hex": data.hex()}
    if special:
        return {**record, "special": True}
    return record.get("text", record)


def _pieces_from(record: dict[str, Any]) -> dict[int, Piece]:
    pieces = {}
    for key, value in record.items():
        value = {"text": value} if isinstance(value, str) else value
        data = bytes.fromhex(value["hex"]) if "hex" in value else value["text"].encode()
        pieces[int(key)] = (data, value.get("special", False) is True)
    return pieces


def _kept(cls: type) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.name not in UNKEPT.get(cls, ())]


def _fields_of(event: Event | Generation) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for field in _kept(type(event)):
        value = getattr(event, field.name)
        if field.name in _LEFT_OUT and value == field.default:
            continue  # not asked for, as nearly always
        if isinstance(value, Generation):
            value = _fields_of(value)
        elif field.type == "list[bool]":
            value = "".join("01"[bool(flag)] for flag in value)
        elif field.name == "entropies":
            value = [round(entropy, DECIMALS) for entropy in value]
        elif field.name == "candidates":
            value = [_rounded(place) for place in value]
        elif field.name == "logprobs":
            value = [_logprob_record(place) for place in value]
        record[field.name] = value
    return record


def _logprob_record(place: TokenLogprob) -> list[Any]:
    return [place.token_id, round(place.logprob, DECIMALS), _rounded(place.top)]


def _rounded(place: list[tuple[int, float]]) -> list[list[Any]]:
    return [[token, round(value, DECIMALS)] for token, value in place]


def _logprob_from(record: Any) -> TokenLogprob:
    token_id, logprob, top = record
    pairs = [_value("an alternative", "tuple[int, float]", pair) for pair in top]
    return TokenLogprob(_value("a token", "int", token_id), _value("a logprob", "float", logprob), pairs)


def _event_from(record: dict[str, Any]) -> Event:
    name = record.pop("event")
    if name not in _CLASSES:
        raise ValueError(f"unknown event {name!r}")
    if name == "Finished":
        record["generation"] = _checked(Generation, record["generation"])
    event = _checked(_CLASSES[name], record)
    lists = [getattr(event, field.name) for field in fields(event) if field.type.startswith("list")]
    if len({len(values) for values in lists if values is not None}) > 1:
        raise ValueError(f"lists of different lengths in {name}")
    return event


def _checked(cls: type, record: dict[str, Any]) -> Any:
    """An instance of `cls`, every field of the type that it declares."""
    kinds = {field.name: str(field.type) for field in _kept(cls)}
    needed = {field.name for field in _kept(cls) if field.default is MISSING}
    if missing := needed - record.keys():
        raise ValueError(f"{cls.__name__} without {', '.join(sorted(missing))}")
    if unknown := record.keys() - kinds.keys():
        raise ValueError(f"{cls.__name__} with {', '.join(sorted(unknown))}")
    return cls(**{name: _value(name, kinds[name], value) for name, value in record.items()})


def _value(name: str, kind: str, value: Any) -> Any:
    """`value`, as a field annotated `kind` holds it."""
    if kind.endswith("| None"):
        return None if value is None else _value(name, kind.removesuffix(" | None"), value)
    if kind == "list[bool]":
        if isinstance(value, str) and set(value) <= {"0", "1"}:
            return [flag == "1" for flag in value]
    elif kind.startswith("list["):
        if isinstance(value, list):
            inner = kind[len("list[") : -1]
            return [_value(name, inner, item) for item in value]
    elif kind == "tuple[int, float]":
        token, number = value
        return _value(name, "int", token), _value(name, "float", number)
    elif kind == "TokenLogprob":
        return _logprob_from(value)
    elif (
        (kind == "int" and is_whole(value))
        or (kind == "float" and (is_whole(value) or isinstance(value, float)))
        or (kind == "str" and isinstance(value, str))
        or (kind.startswith("dict") and isinstance(value, dict))
        or (kind == "FinishReason" and value in get_args(FinishReason))
        or (kind == "Generation" and isinstance(value, Generation))
    ):
        return float(value) if kind == "float" and isinstance(value, (int, float)) else value
    raise ValueError(f"{name} is not {kind}")


def _read_header(path: Path, line: bytes) -> TraceHeader:
    try:
        header = parse_json(line, str(path), halves=True)
    except DgemmaError:
        header = {}
    if header.get("format") != FORMAT:
        raise DgemmaError(f"{path} is not a trace: its first line must be a {FORMAT} header")
    if header.get("version") != VERSION:
        raise DgemmaError(
            f"{path} is a trace of version {shown(header.get('version'))}; this dgemma reads version {VERSION}: "
            "record it again, or use the dgemma that wrote it"
        )
    if not all(isinstance(header.get(field.name), str) for field in fields(TraceHeader)):
        raise DgemmaError(f"{path}: line 1 is damaged: the header needs model, prompt and created")
    return TraceHeader(header["model"], header["prompt"], header["created"])
