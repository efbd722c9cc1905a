"""What reading and writing GGUF files, and finding them, have in common: the signature, types of values, parts' names.

Standard library only: a file is found before torch is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from dgemma.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32  # of every tensor's data, which needs no key (``general.alignment``) when it is this

# ggml's numbers for the types of metadata: numbers with their letters in `struct`, and the two others.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(4, 13)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", UINT64: "Q", INT64: "q",
           FLOAT64: "d"}

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
