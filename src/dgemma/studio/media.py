"""Pictures, films and other files of conversations: kept in a folder, each once, by the hash of what is in it.

Works on: bytes; pictures and films as `dgemma.chat` opens them. Knows nothing of: conversations, pages.

A page never shows such a file itself, which may be anything: it shows a preview, made here anew of the pixels alone.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.chat.pictures import open_picture
from dgemma.chat.video import first_frame
from dgemma.errors import DgemmaError
from dgemma.fields import shown
from dgemma.files import atomic_write, make_folder
from dgemma.formats import size_text

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = {"image": 32 << 20, "video": 128 << 20, "file": 16 << 20}  # bytes
KINDS = tuple(LARGEST)
PREVIEW_TYPE = "image/webp"
_SIDE = 1600  # pixels of a preview at most
_NAME = re.compile(r"[0-9a-f]{64}")
_LONGEST = 120  # characters of a file's own name

Part = dict[str, Any]  # of a message: {"type": of KINDS, "media": the hash, "name": the file's own name}


class MediaFolder:
    """The folder; it is made when something is put into it."""

    def __init__(self, folder: Path, largest: Mapping[str, int] = LARGEST):
        self.folder, self._largest = folder, largest

    def put_seen(self, data: bytes, name: str) -> Part:
        """Keep a picture or a film that somebody shows: the part of a message that it is. Raises DgemmaError."""
        guessed = (mimetypes.guess_type(name)[0] or "").startswith("video/")
        failure = None
        for kind in ("video", "image") if guessed else ("image", "video"):
            try:
                return self._put(data, name, kind, _looked_at(data, name, kind))
            except DgemmaError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def put_made(self, data: bytes, name: str) -> Part:
        """Keep a file that a tool made, as a picture if it is one. Raises DgemmaError for one that is too large."""
        try:
            return self._put(data, name, "image", _looked_at(data, name, "image"))
        except DgemmaError:
            return self._put(data, name, "file", None)  # whatever it is: it is handed out, never shown

    def _put(self, data: bytes, name: str, kind: str, image: Image | None) -> Part:
        name = Path(name).name[-_LONGEST:] or kind
        if len(data) > self._largest[kind]:
            raise DgemmaError(f"{name}: {size_text(len(data))} are too much: at most {size_text(self._largest[kind])}")
        digest = hashlib.sha256(data).hexdigest()
        make_folder(self.folder)
        self.folder.chmod(0o700)  # what people show is theirs alone
        if not self.path(digest).exists():
            with atomic_write(self.path(digest)) as beside:
                beside.write_bytes(data)
        if image is not None:
            image.thumbnail((_SIDE, _SIDE))
            with atomic_write(self.preview(digest)) as beside:
                image.save(beside, "WEBP", quality=88)
        return {"type": kind, "media": digest, "name": name}

    def path(self, digest: str) -> Path:
        """Where a file is, or would be. Raises DgemmaError for what is no hash."""
        if not _NAME.fullmatch(digest):
            raise DgemmaError(f"{shown(digest, 40)} is no file of a conversation")
        return self.folder / digest

    def preview(self, digest: str) -> Path:
        return self.path(digest).with_suffix(".webp")

    def read(self, part: Part) -> bytes:
        """The file of a part. Raises DgemmaError when it is gone."""
        try:
            return self.path(part["media"]).read_bytes()
        except OSError as error:
            raise DgemmaError(f"{part.get('name', 'a file')}: this file is not there any more") from error

    def names(self) -> set[str]:
        """The hashes of all files."""
        try:
            return {path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)}
        except FileNotFoundError:
            return set()

    def remove(self, digest: str) -> None:
        for path in (self.path(digest), self.preview(digest)):
            path.unlink(missing_ok=True)


def is_kept(part: Any) -> bool:
    """Whether a part of a message is a file of this folder."""
    return isinstance(part, dict) and part.get("type") in KINDS and isinstance(part.get("media"), str)


def kept_parts(content: Any) -> list[Part]:
    """The files in a message's content."""
    return [part for part in content if is_kept(part)] if isinstance(content, list) else []


def data_url(part: Part, data: bytes) -> str:
    """A file as a URL that has it in itself."""
    kind = mimetypes.guess_type(part.get("name", ""))[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _looked_at(data: bytes, name: str, kind: str) -> Image:
    """What a file looks like; of a film its first frame. Raises DgemmaError."""
    return first_frame(data, name) if kind == "video" else open_picture(data, name)
