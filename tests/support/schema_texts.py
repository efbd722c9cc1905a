"""Texts of a schema's language, drawn at random and the shortest; whether a text is in it; what `jsonschema` says."""

import json
import random

import jsonschema
import numpy as np

from dgemma.constrain import _compiled
from dgemma.constrain.automaton import FAR
from dgemma.constrain.reading import TableReader
from dgemma.constrain.stacks import StackReader
from dgemma.constrain.vocabulary import Vocabulary

BYTES = Vocabulary({byte: bytes([byte]) for byte in range(256)})
DRAFTS = {"draft7": jsonschema.Draft7Validator, "draft2019-09": jsonschema.Draft201909Validator,
          "draft2020-12": jsonschema.Draft202012Validator}


def reader_of(schema):
    """The language's reader, byte by byte; raises DgemmaError."""
    automaton, rules, deepest = _compiled({"type": "json_schema", "schema": schema}, None, False)
    return StackReader(automaton, rules, BYTES, (), deepest) if rules else TableReader(automaton, BYTES, ())


def empty(reader):
    return reader.distance(0) >= FAR


def accepts(reader, text):
    state = 0
    for byte in text.encode():
        state = reader.step(state, byte)
        if state < 0:
            return False
    return reader.accepts(state)


def some_texts(reader, seed, count=20, longest=80):
    """Random ways through the language, a shortest one first; none is much longer than it must be."""
    rng = random.Random(seed)
    for index in range(count):
        state, text = 0, bytearray()
        budget = 0 if index == 0 else rng.randrange(longest)
        while not (reader.accepts(state) and (len(text) >= budget or rng.random() < 0.3)):
            moves = [(target, classes) for target, classes in reader.moves(state) if reader.distance(target) < FAR]
            if len(text) >= budget:
                near = [move for move in moves if reader.distance(move[0]) < reader.distance(state)]
                moves = near or moves
            if not moves:
                break
            state, classes = rng.choice(moves)
            token = int(rng.choice(classes))
            tokens = reader.classes.tokens[reader.classes.starts[token] :][: int(reader.classes.counts[token])]
            text.append(int(rng.choice(np.asarray(tokens))))
            assert len(text) < 5000
        if reader.accepts(state):
            yield text.decode()


def invalid_text(schema, reader, draft, seed=0, count=20):
    """A text of the language that the schema does not accept; None if none is found."""
    valid = DRAFTS[draft](schema)
    for text in some_texts(reader, seed, count):
        if not valid.is_valid(json.loads(text)):
            return text
    return None
