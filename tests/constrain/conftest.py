"""The vocabularies that constraints are tried on."""

import pytest

from dgemma.train.data.tokenizer import SPECIAL_IDS, vocabulary
from support.constrain_helpers import byte_level, spelling

PIECES = ['{"', '": ', '": "', '", "', '"}', "}", "[]", "{}", "]}", ", ", "true", "tr", "null", "name", "na", "me",
          "12", "00", "the", " the", "é", "日本", "日", '\\"', "\\", '"a', 'a"', '"], "', "1, ", "e1", "-1", ".5"]


@pytest.fixture(scope="session")
def byte_tokenizer():
    """The bundled models' vocabulary."""
    return byte_level(vocabulary(), SPECIAL_IDS)


@pytest.fixture(scope="session")
def piece_tokenizer():
    """The bytes and many longer tokens, so that a text has many spellings."""
    known = vocabulary()
    for piece in PIECES:
        known.setdefault(spelling(piece), len(known))
    return byte_level(known, SPECIAL_IDS)
