"""Pictures and films in what is trained on: where they stand in a context, and their pixels when it is their turn.

Works on messages' parts and token ids. Knows nothing of networks and batches. What an example keeps of a picture is its
path or its file's bytes; pixels are made of these when it is read, and kept as far as they are allowed to
(`PreparedPictures`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dgemma.chat.media import Shown, outline, parts_in, place_media, show
from dgemma.chat.messages import normalise_messages
from dgemma.chat.pictures import Fitted, Picture
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import ModelConfig, VisionConfig
from dgemma.errors import DgemmaError

KEPT = 512 << 20  # bytes of pixels: some 250 pictures of 280 soft tokens, or eighteen films of a minute or more


class PreparedPictures:
    """Makes the pictures and films of conversations ready for a tower, whose ``config`` it has.

    Pixels are kept until there are ``kept`` bytes of them, and then those that there are stay: every epoch asks for all
    of them once, so one that made room for the next would be missed before that is asked for again. ``made`` counts
    those that were decoded.
    """

    def __init__(self, config: VisionConfig, kept: int = KEPT):
        self.config, self.kept = config, kept
        self.nbytes = self.made = 0
        self._shown: dict[Hashable, Shown[Picture]] = {}

    @classmethod
    def of(cls, model: ModelConfig) -> PreparedPictures | None:
        """Those of a model; None where it has no tower."""
        return None if model.vision is None else cls(model.vision)

    def show(self, medium: Medium) -> Shown[Picture]:
        """The picture, or the film's frames. Raises DgemmaError for what cannot be read."""
        found = self._shown.get(medium.key)
        if found is None:
            found = show(medium.part, self.config, words=medium.words, name=medium.name)
            self.made += 1
            size = sum(picture.pixels.nbytes for picture in found.pictures)
            if self.nbytes + size <= self.kept:
                self._shown[medium.key] = found
                self.nbytes += size
        return found


@dataclass(frozen=True, eq=False)
class Medium:
    """A picture or film as it stands in a message, whose words may say how large it is seen, and what makes it ready;
    ``name`` and ``where`` (the row) are for errors."""

    part: dict[str, Any]
    words: str
    prepared: PreparedPictures
    name: str
    where: str

    def pictures(self) -> tuple[Picture, ...]:
        """The picture, or the film's frames. Raises DgemmaError for what cannot be read."""
        try:
            return self.prepared.show(self).pictures
        except DgemmaError as error:
            raise DgemmaError(f"{self.where}: {error}") from error

    @property
    def label(self) -> str:
        """What it is called for people: a file's name, or its place among the pictures of the conversation."""
        path = self.part.get("path")
        return self.name if path is None else Path(path).name

    @cached_property
    def source(self) -> str:
        """What it is made of, the same for the same: a path, or a hash of what is there itself."""
        source = next(self.part[key] for key in (self.part["type"], "path", "url") if self.part.get(key) is not None)
        if isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:")):
            return str(source)
        data = source.encode() if isinstance(source, str) else source if isinstance(source, bytes) else (
            repr((source.mode, source.size)).encode() + source.tobytes())
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    @cached_property
    def sizes(self) -> Shown[Fitted]:
        """How large it is seen; of a picture mostly the header is read and no more. Raises DgemmaError as `pictures`,
        but for damage behind the header."""
        if self.part["type"] != "video":
            return Shown((outline(self.part, self.prepared.config, self.words, self.name),))
        film = self.prepared.show(self)
        return Shown(tuple(Fitted(p.pixels.shape[1], p.pixels.shape[0], p.tokens) for p in film.pictures), film.stamps)

    @property
    def key(self) -> Hashable:
        """The same for what has the same pixels."""
        how = self.part.get("fps") if self.part["type"] == "video" else self.sizes.pictures[0]
        return self.part["type"], self.source, how


@dataclass(frozen=True)
class Sight:
    """A picture in a context: which of a medium's, and where its soft tokens start in the context, and how many."""

    medium: Medium
    number: int
    start: int
    tokens: int
    size: tuple[int, int]  # of the picture that the tower sees, width and height in pixels

    @property
    def stop(self) -> int:
        return self.start + self.tokens


def media_of(messages: Sequence[dict[str, Any]], prepared: PreparedPictures | None, where: str) -> list[Medium]:
    """The pictures and films of some messages of a row; raises DgemmaError where there are some, and no tower to see
    them."""
    parts = parts_in(normalise_messages(messages)) if messages else []
    if parts and prepared is None:
        raise DgemmaError("there are pictures in this conversation, and the model sees none: it has no vision tower")
    return [Medium(part, words, prepared, f"{part['type']} {number}", where)
            for number, (part, words) in enumerate(parts, 1) if prepared is not None]


def placed_sights(media: Sequence[Medium], ids: list[int],
                  tokenizer: Tokenizer) -> tuple[list[int], tuple[Sight, ...]]:
    """A rendered prompt with room for the pictures in its messages, and these, of which sizes are read.

    Raises DgemmaError for a picture that cannot be read.
    """
    if not media:
        return ids, ()
    sizes = [medium.sizes for medium in media]
    ids, starts = place_media(ids, sizes, media[0].prepared.config, tokenizer.encode)
    numbered = [(medium, number, size) for medium, shown in zip(media, sizes, strict=True)
                for number, size in enumerate(shown.pictures)]
    return ids, tuple(Sight(medium, number, start, size.tokens, (size.width, size.height))
                      for (medium, number, size), start in zip(numbered, starts, strict=True))


def pictures_of(sights: Sequence[Sight]) -> list[Picture]:
    """The pictures of some sights, each medium read once. Raises DgemmaError for one that cannot be read any more."""
    made: dict[Medium, tuple[Picture, ...]] = {}
    for sight in sights:
        if sight.medium not in made:
            made[sight.medium] = sight.medium.pictures()
        if [picture.tokens for picture in made[sight.medium]][sight.number : sight.number + 1] != [sight.tokens]:
            raise DgemmaError(f"{sight.medium.where}: {sight.medium.label} has another size than when training began")
    return [made[sight.medium][sight.number] for sight in sights]
