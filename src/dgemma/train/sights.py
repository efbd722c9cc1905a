"""Pictures and films in what is trained on: where they stand in a context, and their pixels when it is their turn.

Works on messages' parts and token ids. Knows nothing of networks and batches. What an example keeps of a picture is its
path or its file's bytes; pixels are made of these whenever it is read, so that memory stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.chat.media import outline, parts_in, place_media, show
from dgemma.chat.messages import normalise_messages
from dgemma.chat.pictures import Picture
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import VisionConfig
from dgemma.errors import DgemmaError


@dataclass(frozen=True, eq=False)
class Medium:
    """A picture or film as it stands in a message, whose words may say how large it is seen; ``name`` and ``where``
    (the row) are for errors."""

    part: dict[str, Any]
    words: str
    config: VisionConfig
    name: str
    where: str

    def pictures(self) -> tuple[Picture, ...]:
        """The picture, or the film's frames. Raises DgemmaError for what cannot be read."""
        try:
            return show(self.part, self.config, words=self.words, name=self.name).pictures
        except DgemmaError as error:
            raise DgemmaError(f"{self.where}: {error}") from error

    @property
    def label(self) -> str:
        """What it is called for people: a file's name, or its place among the pictures of the conversation."""
        path = self.part.get("path")
        return self.name if path is None else Path(path).name

    @property
    def source(self) -> str:
        """What it is made of, the same for the same: a path, or a hash of what is there itself."""
        source = next(self.part[key] for key in (self.part["type"], "path", "url") if self.part.get(key) is not None)
        if isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:")):
            return str(source)
        data = source.encode() if isinstance(source, str) else source if isinstance(source, bytes) else source.tobytes()
        return hashlib.blake2b(data, digest_size=16).hexdigest()


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


def media_of(messages: Sequence[dict[str, Any]], vision: VisionConfig | None, where: str) -> list[Medium]:
    """The pictures and films of some messages of a row; raises DgemmaError where there are some, and no tower to see
    them."""
    parts = parts_in(normalise_messages(messages)) if messages else []
    if parts and vision is None:
        raise DgemmaError("there are pictures in this conversation, and the model sees none: it has no vision tower")
    return [Medium(part, words, vision, f"{part['type']} {number}", where)
            for number, (part, words) in enumerate(parts, 1) if vision is not None]


def placed_sights(media: Sequence[Medium], ids: list[int],
                  tokenizer: Tokenizer) -> tuple[list[int], tuple[Sight, ...]]:
    """A rendered prompt with room for the pictures in its messages, and these, of which only sizes are read.

    Raises DgemmaError for a picture that cannot be read.
    """
    if not media:
        return ids, ()
    sizes = [outline(medium.part, medium.config, words=medium.words, name=medium.name) for medium in media]
    ids, starts = place_media(ids, sizes, media[0].config, tokenizer.encode)
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
