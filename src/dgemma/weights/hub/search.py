"""Looking for models on the Hugging Face hub by words of their names.

Works on the hub's own library; what a repository that was found holds is for `repository` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from dgemma.weights.hub.repository import explanation


@dataclass(frozen=True)
class Found:
    """A repository of the hub; ``gated`` ones want their terms accepted. What the hub does not tell is None."""

    repo: str
    downloads: int | None
    likes: int | None
    updated: datetime | None
    gated: bool


def search_hub(words: str, most: int = 20) -> tuple[Found, ...]:
    """Repositories that have these words in their names, those fetched most often first.

    Whether dgemma runs what is in them only their files tell. Raises CheckpointError when the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        found = list(HfApi().list_models(search=words.strip() or None, sort="downloads", limit=most,
                                         expand=["downloads", "likes", "lastModified", "gated"]))
    except Exception as error:
        raise explanation("the hub", error) from error
    return tuple(Found(info.id, info.downloads, info.likes, info.last_modified, bool(info.gated)) for info in found)
