"""What reading and writing GGUF files, and finding them, have in common: the signature, types of values, parts' names.

Standard library only: a file is found before torch is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from dgemma.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32  # of every tensor's data, which needs no key (``general.alignment``) when it is this

# The types of metadata that are numbers, by ggml's numbers, with their letters in `struct`; and the two others.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# The name of one of the files that a model was split into; the path before it may have line breaks in it.
PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def part_names(stem: str, count: int) -> list[str]:
    """What the ``count`` files of a split model are called."""
    return [f"{stem}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def is_gguf(path: Path) -> bool:
    """Whether an existing file is a GGUF file, by its name or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
