"""How an answer came to be, step by step: kept while it is made, packed for the disk, sent to a browser in frames.

Works on: the engine's events, and what tokens spell. Knows nothing of: pages, the store, the network.

In a browser's frames an entropy is a byte, `round(255 * sqrt(e / 12.5))` for e nats: 12.5 is a little more than that of
262,144 equal tokens, and the square root keeps the small ones, by which the sampler decides, apart.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event
from dgemma.diffusion.trace import Trace
from dgemma.errors import DgemmaError

PieceOf = Callable[[int], tuple[bytes, bool]]  # a token's bytes, and whether it is special
MOST_ENTROPY = 12.5  # nats, that a byte can tell of
_MAGIC = b"DGR1"


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step. All arrays have an entry for each position of the canvas, [C]."""

    step: int  # from 1
    token_ids: np.ndarray  # int32: the draft
    entropies: np.ndarray  # float16, nats
    accepted: np.ndarray  # bool: what the sampler believed
    changed: np.ndarray  # bool: where the draft is another one than a step before
    temperature: float
    seconds: float  # since the request began

    @property
    def mean_entropy(self) -> float:
        return float(self.entropies.astype(np.float32).mean()) if self.entropies.size else 0.0


@dataclass
class Canvas:
    """A canvas with its steps; ``committed`` is what became text, None while it is open (or if it never did)."""

    index: int  # in the answer; a first canvas that came out empty and was drawn again is there twice
    max_steps: int
    start: np.ndarray  # int32 [C]: noise, and what was given
    pinned: np.ndarray  # bool [C]
    steps: list[Step] = field(default_factory=list)
    committed: list[int] | None = None


@dataclass
class Recording:
    """An answer's canvases; ``texts`` are the spellings of all tokens in them, ``special`` those that are marks."""

    canvases: list[Canvas] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    special: set[int] = field(default_factory=set)

    def apply(self, event: Event, piece_of: PieceOf) -> None:
        """Take in what happened."""
        if isinstance(event, CanvasStarted):
            self._spell(event.token_ids, piece_of)
            self.canvases.append(Canvas(event.canvas, event.max_steps, np.array(event.token_ids, np.int32),
                                        np.array(event.pinned, bool)))
        elif isinstance(event, Denoised) and self.canvases:
            self._spell(event.token_ids, piece_of)
            self.canvases[-1].steps.append(Step(
                event.step, np.array(event.token_ids, np.int32), np.array(event.entropies, np.float16),
                np.array(event.accepted, bool), np.array(event.changed, bool), event.temperature, event.seconds))
        elif isinstance(event, CanvasCommitted) and self.canvases:
            self.canvases[-1].committed = list(event.token_ids)

    def _spell(self, token_ids: Iterable[int], piece_of: PieceOf) -> None:
        for token in set(token_ids) - self.texts.keys():
            data, special = piece_of(token)
            self.texts[token] = data.decode("utf-8", "replace")
            if special:
                self.special.add(token)

    def pack(self) -> bytes:
        """The recording for the disk: what is regular in numpy's bytes, the rest as JSON, all of it deflated."""
        head = {"texts": self.texts, "special": sorted(self.special), "canvases": [
            {"index": canvas.index, "max_steps": canvas.max_steps, "size": len(canvas.start),
             "committed": canvas.committed,
             "steps": [[step.step, round(step.temperature, 4), round(step.seconds, 4)] for step in canvas.steps]}
            for canvas in self.canvases]}
        arrays = []
        for canvas in self.canvases:
            arrays += [canvas.start, np.packbits(canvas.pinned)]
            for step in canvas.steps:
                arrays += [step.token_ids, step.entropies, np.packbits(step.accepted), np.packbits(step.changed)]
        text = json.dumps(head, separators=(",", ":")).encode()
        body = b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
        return _MAGIC + zlib.compress(struct.pack("<I", len(text)) + text + body, 6)

    @staticmethod
    def unpack(data: bytes) -> Recording:
        """What `pack` packed; raises DgemmaError when it is something else."""
        try:
            if data[:4] != _MAGIC:
                raise ValueError("it begins otherwise")
            whole = zlib.decompress(data[4:])
            (length,) = struct.unpack_from("<I", whole)
            head = json.loads(whole[4 : 4 + length])
            reader = _Reader(whole, 4 + length)
            canvases = []
            for one in head["canvases"]:
                size = one["size"]
                canvas = Canvas(one["index"], one["max_steps"], reader.take("<i4", size), reader.flags(size),
                                committed=one["committed"])
                canvas.steps.extend(
                    Step(step, reader.take("<i4", size), reader.take("<f2", size), reader.flags(size),
                         reader.flags(size), temperature, seconds) for step, temperature, seconds in one["steps"])
                canvases.append(canvas)
            return Recording(canvases, {int(token): text for token, text in head["texts"].items()},
                             set(head["special"]))
        except (ValueError, KeyError, TypeError, zlib.error, struct.error) as error:
            raise DgemmaError(f"this recording is damaged ({error})") from error

    @staticmethod
    def of_trace(trace: Trace) -> Recording:
        """The recording that a trace is (`dgemma run --trace`)."""
        made = Recording()
        for event in trace.events:
            made.apply(event, trace.pieces.__getitem__)
        return made

    def for_page(self) -> dict[str, Any]:
        """All of it as JSON, for the browser: every canvas's opening, its frames, and the spellings."""
        return {"texts": self.texts, "special": sorted(self.special), "canvases": [
            {**opening(canvas, number), "frames": [frame(step, before) for before, step in
                                                   zip([None, *canvas.steps], canvas.steps, strict=False)]}
            for number, canvas in enumerate(self.canvases)]}


class _Reader:
    """Arrays one behind another."""

    def __init__(self, data: bytes, start: int):
        self._data, self._at = data, start

    def take(self, kind: str, count: int) -> np.ndarray:
        made = np.frombuffer(self._data, kind, count, self._at)
        self._at += made.nbytes
        return made

    def flags(self, count: int) -> np.ndarray:
        return np.unpackbits(self.take("u1", -(-count // 8)), count=count).astype(bool)


def opening(canvas: Canvas, number: int) -> dict[str, Any]:
    """How a canvas begins, as a browser learns of it; ``number``: its place in the recording."""
    return {"canvas": number, "index": canvas.index, "maxSteps": canvas.max_steps, "ids": canvas.start.tolist(),
            "pinned": np.flatnonzero(canvas.pinned).tolist(),
            "committed": None if canvas.committed is None else len(canvas.committed)}


def frame(step: Step, before: Step | None) -> dict[str, Any]:
    """A step as a browser learns of it: where its draft differs from the one ``before`` (None: everywhere).

    ``e``: entropies, a byte each; ``f``: 1 for an accepted position, 2 for a changed one; both in base64.
    """
    differs = range(len(step.token_ids)) if before is None else np.flatnonzero(
        step.token_ids != before.token_ids).tolist()
    scaled = np.sqrt(np.clip(step.entropies.astype(np.float32), 0, MOST_ENTROPY) / MOST_ENTROPY)
    flags = step.accepted.astype(np.uint8) | (step.changed.astype(np.uint8) << 1)
    return {"step": step.step, "ids": [[place, int(step.token_ids[place])] for place in differs],
            "e": _base64((255 * scaled).round().astype(np.uint8)), "f": _base64(flags),
            "mean": round(step.mean_entropy, 4), "t": round(step.temperature, 3), "seconds": round(step.seconds, 3)}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
