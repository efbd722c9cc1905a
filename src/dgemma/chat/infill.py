"""The canvas that an answer starts from, as a user writes it: text that stays, text that may change, blanks.

Works on: parts and a tokenizer. Knows nothing of: the network, HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.fields import is_whole, shown

TURN_END = "<turn|>"
_KINDS = 'a part is text, {"text": …, "pinned": true or false}, {"blank": tokens} or {"end": true}'


@dataclass(frozen=True)
class StartCanvas:
    """A request's ``canvas`` and ``pinned``."""

    token_ids: list[int | None]  # None: noise
    pinned: list[bool]


def is_parts(canvas: Any) -> bool:
    """Whether a canvas is written as parts, rather than as token ids."""
    return isinstance(canvas, str) or (
        isinstance(canvas, Sequence) and any(isinstance(part, (str, Mapping)) for part in canvas))


def read_canvas(parts: str | Sequence[Any], tokenizer: Tokenizer, length: int, stops: Collection[int]) -> StartCanvas:
    """The canvas of ``length`` tokens that parts describe, from its start.

    A part is a string or {"text": …}, which stays as it is, or with "pinned": false is where denoising starts and may
    change; {"blank": n}: n tokens to be filled in; or, last, {"end": true}: the answer ends here, and all that is left
    of the canvas is fill. Without it what is left is open: the answer goes on as the model likes. What is spelt like a
    special token in a text is ordinary text. Raises DgemmaError naming the part at fault.
    """
    token_ids: list[int | None] = []
    pinned: list[bool] = []
    parts = [parts] if isinstance(parts, str) else list(parts)
    for number, given in enumerate(parts):
        where = f"canvas[{number}]"
        part = {"text": given} if isinstance(given, str) else given
        if not isinstance(part, Mapping) or len(kinds := part.keys() & {"text", "blank", "end"}) != 1:
            raise DgemmaError(f"{where} is {shown(given)}: {_KINDS}")
        (kind,) = kinds
        if unknown := part.keys() - {kind, *(("pinned",) if kind == "text" else ())}:
            raise DgemmaError(f"{where} has {shown(min(unknown, key=str))}: {_KINDS}")
        if kind == "text":
            stays = part.get("pinned", True)
            if not isinstance(part["text"], str) or not isinstance(stays, bool):
                raise DgemmaError(f"{where} is {shown(given)}: {_KINDS}")
            ids = tokenizer.encode(part["text"], specials=False)
            token_ids += ids
            pinned += [stays] * len(ids)
        elif kind == "blank":
            if not is_whole(part["blank"]) or not 0 <= part["blank"] <= length:
                raise DgemmaError(f"{where} is {shown(given)}: blank must be a number of tokens from 0 to the canvas' "
                                  f"{length}")
            token_ids += [None] * part["blank"]
            pinned += [False] * part["blank"]
        elif part["end"] is not True or number + 1 < len(parts):
            raise DgemmaError(f"{where} is {shown(given)}: the end is {{\"end\": true}}, and nothing stands behind it")
        else:
            token_ids.append(_turn_end(tokenizer, stops))
            pinned.append(True)
            _fill(token_ids, pinned, tokenizer, length)
        if len(token_ids) > length:
            raise DgemmaError(f"canvas has {len(token_ids)} tokens or more with {where}, the model's canvas {length}: "
                              "give what is said before it as prefix")
    return StartCanvas(token_ids, pinned)


def middle_canvas(suffix: str, count: int, tokenizer: Tokenizer, length: int) -> tuple[int, StartCanvas]:
    """The canvas of a text between a prompt and a ``suffix``, and how many tokens that text has.

    It has ``count`` tokens, or what fits: at least half of a canvas is the suffix's, if it is so long. Of a longer one
    the beginning is seen; where all of it fits, the text ends behind it.
    """
    ids = tokenizer.encode(suffix, specials=False)
    end = tokenizer.end_of_text_id
    count = min(count, length - min(len(ids) + (end is not None), length // 2))
    token_ids = [*([None] * count), *ids][:length]
    pinned = [token is not None for token in token_ids]
    if len(token_ids) < length and end is not None:
        token_ids.append(end)
        pinned.append(True)
        _fill(token_ids, pinned, tokenizer, length)
    return count, StartCanvas(token_ids, pinned)


def _turn_end(tokenizer: Tokenizer, stops: Collection[int]) -> int:
    """The token that ends an answer; raises DgemmaError where there is none."""
    end = tokenizer.token_to_id(TURN_END)
    if end is not None and end in stops:
        return end
    if not stops:
        raise DgemmaError('canvas has {"end": true}, but this model has no stop token')
    return next(iter(stops))


def _fill(token_ids: list[int | None], pinned: list[bool], tokenizer: Tokenizer, length: int) -> None:
    """What stands behind the end, as the model was taught it."""
    if (fill := tokenizer.end_of_text_id) is None:
        return  # it is free, and never shown
    left = max(length - len(token_ids), 0)
    token_ids += [fill] * left
    pinned += [True] * left
