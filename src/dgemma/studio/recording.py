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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished, Generation
from dgemma.diffusion.trace import Trace
from dgemma.errors import DgemmaError
from dgemma.formats import count_text

PieceOf = Callable[[int], tuple[bytes, bool]]  # a token's bytes, and whether it is special
MOST_ENTROPY = 12.5  # nats, that a byte can tell of
_MAGIC = b"DGR2"


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step. Arrays have an entry for each position of the canvas, [C]; candidates n, [C, n]."""

    step: int  # from 1
    token_ids: np.ndarray  # int32: the draft
    canvas_ids: np.ndarray  # int32: what the next step starts from
    entropies: np.ndarray  # float16, nats
    accepted: np.ndarray  # bool: what the sampler believed
    changed: np.ndarray  # bool: where the draft is another one than a step before
    temperature: float
    seconds: float  # since the request began
    candidates: tuple[np.ndarray, np.ndarray] | None = None  # int32: tokens, best first; float16: their probabilities

    @property
    def mean_entropy(self) -> float:
        return float(self.entropies.astype(np.float32).mean()) if self.entropies.size else 0.0

    @property
    def number_of_candidates(self) -> int:
        return 0 if self.candidates is None else self.candidates[0].shape[1]


@dataclass
class Canvas:
    """A canvas with its steps; ``committed`` is what became text, None while it is open (or if it never did)."""

    index: int  # in the answer; a first canvas that came out empty and was drawn again is there twice
    max_steps: int
    start: np.ndarray  # int32 [C]: noise, and what was given
    pinned: np.ndarray  # bool [C]
    context_tokens: int = 0
    steps_before: int = 0
    steps: list[Step] = field(default_factory=list)
    committed: list[int] | None = None
    seconds: float = 0.0  # when it was committed, since the request began


@dataclass
class Recording:
    """An answer's canvases; ``texts`` are the spellings of all tokens that are shown, ``special`` those that are marks.

    ``pieces`` are the bytes of tokens that no text tells: of the noise between steps, of parts of characters. The first
    ``given`` canvases are another answer's, which this one goes on from. ``generation`` is what it ended with.
    """

    canvases: list[Canvas] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    special: set[int] = field(default_factory=set)
    pieces: dict[int, bytes] = field(default_factory=dict)
    given: int = 0
    generation: Generation | None = None

    def apply(self, event: Event, piece_of: PieceOf) -> None:
        """Take in what happened."""
        if isinstance(event, CanvasStarted):
            self._spell(event.token_ids, piece_of)
            self.canvases.append(Canvas(self.given + event.canvas, event.max_steps, np.array(event.token_ids, np.int32),
                                        np.array(event.pinned, bool), event.context_tokens, event.steps_before))
        elif isinstance(event, Denoised) and self.canvases:
            candidates = None
            if event.candidates is not None:
                pairs = np.array(event.candidates, np.float64)  # exact for ids, too
                candidates = pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float16)
                self._spell(candidates[0].ravel().tolist(), piece_of)
            self._spell(event.token_ids, piece_of)
            self._spell(event.canvas_ids, piece_of, shown=False)
            self.canvases[-1].steps.append(Step(
                event.step, np.array(event.token_ids, np.int32), np.array(event.canvas_ids, np.int32),
                np.array(event.entropies, np.float16), np.array(event.accepted, bool), np.array(event.changed, bool),
                event.temperature, event.seconds, candidates))
        elif isinstance(event, CanvasCommitted) and self.canvases:
            self._spell(event.token_ids, piece_of)
            self.canvases[-1].committed, self.canvases[-1].seconds = list(event.token_ids), event.seconds
        elif isinstance(event, Finished):
            stop = event.generation.stop_token_id
            self._spell([] if stop is None else [stop], piece_of)
            self.generation = replace(event.generation, logprobs=None)

    def _spell(self, token_ids: Iterable[int], piece_of: PieceOf, shown: bool = True) -> None:
        for token in set(token_ids) - self.texts.keys():
            if not shown and token in self.pieces:
                continue
            data, special = piece_of(token)
            text = data.decode("utf-8", "replace")
            if special:
                self.special.add(token)
            if not shown or text.encode() != data:
                self.pieces[token] = data
            if shown:
                self.texts[token] = text

    def piece(self, token: int) -> tuple[bytes, bool]:
        """A token's bytes, and whether it is special."""
        data = self.pieces.get(token)
        return self.texts[token].encode() if data is None else data, token in self.special

    def before(self, number: int) -> Recording:
        """What there was before a canvas of it was opened: for an answer that writes that canvas again."""
        kept = [canvas for canvas in self.canvases[:number] if canvas.committed is not None]
        return Recording(kept, dict(self.texts), set(self.special), dict(self.pieces), given=len(kept))

    @property
    def count(self) -> str:
        """How many canvases and steps it has, in words."""
        steps = count_text(sum(len(canvas.steps) for canvas in self.canvases), "step")
        return steps if len(self.canvases) == 1 else f"{count_text(len(self.canvases), 'canvas', 'es')}, {steps}"

    def pack(self) -> bytes:
        """The recording for the disk: what is regular in numpy's bytes, the rest as JSON, all of it deflated."""
        head = {"texts": self.texts, "special": sorted(self.special), "given": self.given,
                "pieces": {token: data.hex() for token, data in self.pieces.items()},
                "generation": None if self.generation is None else asdict(self.generation), "canvases": [
            {"index": canvas.index, "max_steps": canvas.max_steps, "size": len(canvas.start),
             "context_tokens": canvas.context_tokens, "steps_before": canvas.steps_before,
             "committed": canvas.committed, "seconds": canvas.seconds,
             "steps": [[step.step, round(step.temperature, 4), round(step.seconds, 4), step.number_of_candidates]
                       for step in canvas.steps]}
            for canvas in self.canvases]}
        arrays = []
        for canvas in self.canvases:
            arrays += [canvas.start, np.packbits(canvas.pinned)]
            for step in canvas.steps:
                arrays += [step.token_ids, step.canvas_ids, step.entropies, np.packbits(step.accepted),
                           np.packbits(step.changed), *(step.candidates or ())]
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
                                one["context_tokens"], one["steps_before"], committed=one["committed"],
                                seconds=one["seconds"])
                canvas.steps.extend(
                    Step(step, reader.take("<i4", size), reader.take("<i4", size), reader.take("<f2", size),
                         reader.flags(size), reader.flags(size), temperature, seconds, reader.candidates(size, count))
                    for step, temperature, seconds, count in one["steps"])
                canvases.append(canvas)
            made = head["generation"]
            return Recording(canvases, {int(token): text for token, text in head["texts"].items()},
                             set(head["special"]),
                             {int(token): bytes.fromhex(data) for token, data in head["pieces"].items()},
                             head["given"], None if made is None else Generation(**made))
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
            {**opening(canvas, number), "frames": [{**frame(step, before), **candidates(step)} for before, step in
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

    def candidates(self, places: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        if not count:
            return None
        shape = (places, count)
        return self.take("<i4", places * count).reshape(shape), self.take("<f2", places * count).reshape(shape)


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


def candidates(step: Step) -> dict[str, Any]:
    """A step's candidates as a browser learns of them, if it has some: ``n`` for each place, ids as 4 bytes each,
    probabilities as one, `round(255 * p)`; both in base64."""
    if step.candidates is None:
        return {}
    tokens, probabilities = step.candidates
    return {"c": {"n": step.number_of_candidates, "ids": _base64(tokens.astype("<i4")),
                  "p": _base64((255 * probabilities.astype(np.float32)).round().astype(np.uint8))}}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
