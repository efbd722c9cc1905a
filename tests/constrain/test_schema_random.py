"""Random combinations of what schemas are made of: every text of a language is valid."""

import json
import random

import pytest

from dgemma.constrain.scalars import dumps
from dgemma.errors import DgemmaError
from support.random_schemas import VALUES, random_schema
from support.schema_texts import DRAFTS, accepts, empty, reader_of, some_texts


def is_kept(seed):
    """Whether a random schema has a language; fails where that holds what `jsonschema` finds invalid."""
    schema = random_schema(random.Random(seed))
    draft = "draft7" if isinstance(schema, dict) and "$schema" in schema else "draft2020-12"
    valid = DRAFTS[draft](schema)
    try:
        reader = reader_of(schema)
    except DgemmaError:
        return False
    if empty(reader):
        return False
    for text in [text for value in VALUES if accepts(reader, text := dumps(value))] + list(some_texts(reader, seed,
            12)):
        assert valid.is_valid(json.loads(text)), (seed, text, json.dumps(schema))
    return True


def test_random_schemas_have_valid_texts_only():
    kept = sum(is_kept(seed) for seed in range(20))
    assert kept > 8  # most of what is left has no valid value at all


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", range(10_000, 13_000, 500))
def test_thousands_of_random_schemas_have_valid_texts_only(start, request):
    if "slow" not in request.config.option.markexpr:
        pytest.skip("takes minutes: run it with -m slow")
    assert sum(is_kept(seed) for seed in range(start, start + 500)) > 250
