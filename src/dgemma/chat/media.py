"""Pictures and films in a conversation: found in its messages, made ready, and given their place in the prompt.

Works on messages and token ids; knows nothing of the network. What a picture file or a film is, `pictures` and `video`
know.
"""

from __future__ import annotations

import base64
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dgemma.chat.pictures import Fitted, Picture, fitted, open_picture, resized, size_of
from dgemma.chat.video import FRAME_BUDGET, read_film
from dgemma.config import BUDGETS, VisionConfig
from dgemma.errors import DgemmaError
from dgemma.fields import shown

# Words of somebody who wants what is written read, in some languages: it may be small.
_READING = re.compile(
    r"\b(read|reads|transcri\w+|ocr|writ(?:ten|ing)|handwrit\w+|text|documents?|scan(?:ned)?|receipts?|invoices?|tables?"
    r"|forms?|small print|screenshots?|formulas?|equations?|code|spreadsheets?|says?|lies|lesen|steht|abschreib\w*"
    r"|rechnung\w*|tabelle\w*|lis|lire|écrit\w*|facture\w*|lee|leer|escrito|factura\w*)\b", re.IGNORECASE)
_LONGEST_PATH = 4096  # Linux' limit; elsewhere it is less

P = TypeVar("P", Picture, Fitted)


@dataclass(frozen=True, eq=False)
class Shown(Generic[P]):
    """A part of a message made ready: a picture, or a film's frames, each with its time (``stamps``).

    Or without pixels, what sizes they will have.
    """

    pictures: tuple[P, ...]
    stamps: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "video" if self.stamps else "image"


def put_first(messages: Sequence[dict], images: Sequence[Any], videos: Sequence[Any] = ()) -> list[dict]:
    """Normalised messages with pictures and films before the words of the user's last one, where the model wants them.

    Raises DgemmaError when there are some and no message is the user's.
    """
    if not images and not videos:
        return list(messages)
    place = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        raise DgemmaError("images belong to a message of the user, and there is none")
    words = messages[place]["content"]
    parts = [{"type": "text", "text": words}] if isinstance(words, str) else words
    first = [*({"type": "image", "image": image} for image in images),
             *({"type": "video", "video": video} for video in videos)]
    return [*messages[:place], {**messages[place], "content": [*first, *parts]}, *messages[place + 1 :]]


def parts_in(messages: Sequence[dict]) -> list[tuple[dict, str]]:
    """The parts of normalised messages that are pictures or films, in order, each with the words of its message.

    Warns of one that stands behind these, but in a tool's result: the model was trained on pictures before words.
    """
    found = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        words = " ".join(part["text"] for part in parts if part["type"] == "text")
        said = False
        for part in parts:
            if part["type"] == "text":
                said = said or bool(part["text"].strip())
                continue
            if said and message["role"] != "tool":
                warnings.warn("a picture stands behind the words of its message: the model expects it before them",
                              stacklevel=2)
            found.append((part, words))
    return found


def show(part: dict, config: VisionConfig, tokens: int | None = None, fps: float | None = None, words: str = "",
         name: str = "the picture") -> Shown[Picture]:
    """A part made ready for the tower.

    It has its picture under "image" (a film: "video") or "path", or as a data URL under "url"; under "tokens" its own
    number of soft tokens, if not ``tokens``; a tower that was trained on fewer gets those. None is automatic:
    `budget_for`, of ``words``. ``fps`` are a film's frames a second; ``name`` is what it is called in errors, unless it
    has a "name". Raises DgemmaError for what is no picture or film, and for a URL that would have to be fetched.
    """
    source, named = _source_of(part, name)
    if part["type"] == "video":
        film = read_film(source, part.get("fps", fps), named)
        budget = config.trained_budget(FRAME_BUDGET)
        frames = tuple(resized(frame, budget, config) for frame in film.frames)
        return Shown(frames, tuple(film.stamps))
    image = open_picture(source, named)
    return Shown((resized(image, _budget(part, tokens, image.size, words, config), config),))


def outline(part: dict, config: VisionConfig, words: str = "", name: str = "the picture") -> Fitted:
    """How large `show` would make a picture, for what makes it ready later; mostly its header is read and no more.

    Raises what `show` raises, but for damage behind the header.
    """
    size = size_of(*_source_of(part, name))
    return fitted(*size, _budget(part, None, size, words, config), config)


def _source_of(part: dict, name: str) -> tuple[Any, str | None]:
    """Where the picture or film of a part is, and what it is called in errors (None: by its path)."""
    kind, name = part["type"], part.get("name", name)
    source = next((part[key] for key in (kind, "path") if part.get(key) is not None), None)
    source = _of_url(part.get("url"), kind, name) if source is None else source
    if isinstance(source, str) and len(source) > _LONGEST_PATH:
        raise DgemmaError(f"{name}: {shown(source, 40)} is no path, with its {len(source):,} characters; base64 is "
                          "given as a data URL (data:image/png;base64,…)")
    return source, None if isinstance(source, (str, Path)) else name


def _budget(part: dict, tokens: int | None, size: tuple[int, int], words: str, config: VisionConfig) -> int:
    """The most soft tokens of a part that is a picture: as many as were asked for, or as its words need."""
    tokens = part.get("tokens", tokens)
    if tokens is None:
        return budget_for(*size, words, config)
    return config.trained_budget(tokens) if tokens in BUDGETS else tokens  # which is refused


def budget_for(width: int, height: int, words: str, config: VisionConfig) -> int:
    """The most soft tokens of a picture of this size that these words are about.

    The checkpoint's own number; four times as many where something is to be read, which may be small; in no case more
    than the picture has pixels for, or the tower was trained on.
    """
    own = config.vision_soft_tokens_per_image
    wanted = min(4 * own, BUDGETS[-1]) if _READING.search(words) else own
    side = config.patch_size * config.pooling_kernel_size
    enough = next((budget for budget in BUDGETS if budget * side**2 >= width * height), BUDGETS[-1])
    return config.trained_budget(min(wanted, max(enough, BUDGETS[0])))


def place_media(ids: Sequence[int], media: Sequence[Shown[Any]], config: VisionConfig,
          encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """A prompt with room for its pictures: each image token becomes begin, as many image tokens as it has, end.

    A video token becomes that for each frame, with its time before it ("00:01 "), a blank between frames, and video
    tokens within. ``encode`` gives the ids of text. Returns the ids, and where each picture's soft tokens start. Raises
    DgemmaError when the prompt names others than there are.
    """
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    named = [kinds[token] for token in ids if token in kinds]
    if named != [part.kind for part in media]:
        raise DgemmaError(f"the prompt has places for {_listed(named)}, and there are "
                          f"{_listed([part.kind for part in media])}: a chat template may leave out what a tool's "
                          "result or the assistant shows")
    placed: list[int] = []
    starts = []
    left = iter(media)
    for token in ids:
        if token not in kinds:
            placed.append(token)
            continue
        part = next(left)
        for number, picture in enumerate(part.pictures):
            if part.stamps:
                placed += encode(f"{' ' if number else ''}{part.stamps[number]} ")
            placed.append(config.boi_token_id)
            starts.append(len(placed))
            placed += [token] * picture.tokens
            placed.append(config.eoi_token_id)
    return placed, starts


def _listed(kinds: Sequence[str]) -> str:
    pictures = kinds.count("image")
    videos = len(kinds) - pictures
    return f"{pictures} pictures" + (f" and {videos} videos" if videos else "")


def _of_url(url: Any, kind: str, where: str) -> bytes:
    """The bytes in a data URL."""
    if not isinstance(url, str) or not url:
        raise DgemmaError(f"{where}: an {kind} part needs it as `{kind}`, `path` or a data URL in `url`")
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise DgemmaError(f"{where}: only data URLs in base64 are read (data:image/png;base64,…), not "
                          f"{shown(url, 40)}: nothing is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise DgemmaError(f"{where}: the data URL is not valid base64 ({error})") from error
