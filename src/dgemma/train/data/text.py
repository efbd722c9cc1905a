"""Training examples from plain text files: so many bytes of context, and the canvas that follows on them.

Made for pretraining a small base model on what every machine has: the sources of Python's own library. Works on files
and token ids; knows nothing of networks, chat templates or noise.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.train.data.conversations import Conversation
from dgemma.train.data.examples import Example
from dgemma.train.data.turns import Turn

PYTHON = "python"  # the name of the sources of Python's library
HELD_OUT = 20  # one file of so many is kept for validation
# Folders of the library that are not the library itself
_NOT_PYTHONS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


def read_texts(paths: Sequence[str], suffix: str = ".py") -> tuple[list[bytes], list[bytes]]:
    """Files, and all with ``suffix`` below folders, in order -> what to train on and what to validate on.

    ``"python"`` means the library of the Python that runs, without its tests and what is installed beside it; of a
    folder that the user names nothing is left out, whatever the folders above and below it are called. Raises
    DgemmaError naming a path that cannot be read, and when there are not two files.
    """
    found: list[Path] = []
    for name in paths:
        place = Path(sysconfig.get_paths()["stdlib"]) if name == PYTHON else Path(name)
        if place.is_dir():
            left_out = _NOT_PYTHONS if name == PYTHON else frozenset()
            found += sorted(file for file in place.rglob(f"*{suffix}")
                            if file.is_file() and not left_out & set(file.relative_to(place).parts))
        else:
            found.append(place)
    try:
        texts = [text for file in found if (text := file.read_bytes())]
    except OSError as error:
        raise DgemmaError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if len(texts) < 2:
        raise DgemmaError(f"{', '.join(map(str, paths))}: at least two files of text are needed, one of them for "
                          f"validation; found {len(texts)}")
    step = min(HELD_OUT, len(texts))
    return [t for i, t in enumerate(texts) if i % step], [t for i, t in enumerate(texts) if i % step == 0]


class TextSource:
    """An endless, seeded stream of examples from texts; a step's examples depend on (seed, step) only.

    All contexts of a step have one length, drawn from ``context``: <bos> and so many bytes. The texts are joined with
    <eos> between them, so an example may run over a text's end.
    """

    def __init__(self, texts: Sequence[bytes], held_out: Sequence[bytes], tokenizer: Tokenizer, canvas_length: int,
                 batch_size: int, seed: int, context: tuple[int, int] = (16, 128)):
        if not 1 <= context[0] <= context[1]:
            raise DgemmaError(f"context must be two numbers of tokens, the smaller first, got {list(context)}")
        self.canvas_length, self.batch_size, self.seed, self.context = canvas_length, batch_size, seed, context
        bos, end = tokenizer.bos_id, tokenizer.end_of_text_id
        if bos is None or end is None:
            lacking = "<bos>" if bos is None else "<eos>"
            raise DgemmaError(f"{tokenizer.source} has no {lacking} token, which training on plain text takes")
        self._bos, self._eos = bos, end
        self._train, self._held_out = (self._joined(those, tokenizer) for those in (texts, held_out))
        for tokens in (self._train, self._held_out):
            if len(tokens) < context[1] + canvas_length:
                raise DgemmaError(f"a text of {len(tokens)} tokens has no room for a context of {context[1]} and a "
                                  f"canvas of {canvas_length}: give more text")

    def batch(self, step: int) -> list[Example]:
        """The examples of a training step."""
        return self._draw(self._train, np.random.default_rng([self.seed, 3, step]), self.batch_size)

    def held_out(self, count: int) -> list[Example]:
        """Examples of texts that are never trained on, always the same."""
        return self._draw(self._held_out, np.random.default_rng([self.seed, 4]), count)

    def questions(self, count: int) -> list[Conversation]:
        """None: there is nothing to ask about plain text."""
        return []

    def _joined(self, texts: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
        tokens = (tokenizer.encode(text.decode("utf-8", "replace"), specials=False) for text in texts)
        return np.concatenate([np.array([*those, self._eos]) for those in tokens])

    def _draw(self, tokens: np.ndarray, rng: np.random.Generator, count: int) -> list[Example]:
        length = int(rng.integers(self.context[0], self.context[1] + 1))
        starts = rng.integers(0, len(tokens) - length - self.canvas_length + 1, size=count)
        examples = []
        for start in starts.tolist():
            context = [self._bos, *tokens[start : start + length].tolist()]
            canvas = tokens[start + length : start + length + self.canvas_length].tolist()
            examples.append(Example(Turn(context, canvas, f"text at {start}", 1), 0, canvas, [1.0] * len(canvas)))
        return examples
