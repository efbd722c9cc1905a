"""Automata over tokens: classes, moves and distances against reading every token byte by byte."""

import json
import random

import numpy as np
import pytest

from dgemma.constrain.automaton import FAR, compile_language
from dgemma.constrain.language import parse_regex
from dgemma.constrain.reading import TableReader
from dgemma.constrain.schema import schema_language
from dgemma.constrain.stacks import DEEPEST, StackReader
from dgemma.constrain.vocabulary import Vocabulary
from dgemma.errors import DgemmaError

TREE = {"$ref": "#/$defs/tree",
        "$defs": {"tree": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}}]}}}


# Two recursive definitions that begin in the same way: which one it is shows later.
FORK = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}],
        "$defs": {"a": {"type": "array", "prefixItems": [{"const": "a"}, {"$ref": "#/$defs/a"}], "items": False},
                  "b": {"type": "array", "prefixItems": [{"enum": ["a", "b"]}, {"$ref": "#/$defs/b"}, {"const": 1}],
                        "items": False}}}


def vocabulary(seed=0, count=300):
    rng = random.Random(seed)
    pieces = {bytes([byte]) for byte in range(256)}
    while len(pieces) < 256 + count:
        pieces.add("".join(rng.choice('ab1{}[]": ,\\né日tru') for _ in range(rng.randint(2, 6))).encode())
    return Vocabulary(dict(enumerate(sorted(pieces), start=5)))


def table_reader(pattern, words):
    return TableReader(compile_language(parse_regex(pattern)), words, ())


def stack_reader(language, rules, words):
    return StackReader(compile_language(language), {name: compile_language(rule) for name, rule in rules.items()},
                       words, ())


def moves_by_token(reader, state):
    """token -> next state, as the reader says"""
    ends = np.append(reader.classes.starts, len(reader.classes.tokens))
    return {int(token): target for target, classes in reader.moves(state) for one in classes
            for token in reader.classes.tokens[ends[one] : ends[one + 1]]}


def moves_by_bytes(reader, state, words):
    reached = {int(token): reader.read(state, words.bytes_of(token)) for token in words.ids}
    return {token: target for token, target in reached.items() if target is not None}


@pytest.mark.parametrize("pattern", ["a*b|1{2,40}", '"[^"]*"(, "[^"]*")*', r"[^a]+", "(é|日)+a?", "tru?"])
def test_a_table_reads_every_token_as_its_bytes(pattern):
    words = vocabulary()
    reader = table_reader(pattern, words)
    for state in range(len(reader.automaton.table)):
        assert moves_by_token(reader, state) == moves_by_bytes(reader, state, words)


@pytest.mark.parametrize("schema", [TREE, FORK, None], ids=["tree", "fork", "json_object"])
def test_stacks_read_every_token_as_its_bytes(schema):
    words = vocabulary(1)
    language, rules = schema_language(schema) if schema else schema_language({"type": "object"})
    reader = stack_reader(language, rules, words)
    rng, state, seen = random.Random(0), 0, set()
    for _ in range(60):
        assert moves_by_token(reader, state) == moves_by_bytes(reader, state, words)
        seen.add(state)
        targets = sorted(set(moves_by_token(reader, state).values()))
        state = rng.choice(targets) if targets else 0
    assert len(seen) > 20


@pytest.mark.parametrize("make", [
    lambda words: table_reader('(abc|"[^"]{3,8}")(, (11|222))*', words),
    lambda words: stack_reader(*schema_language({"type": "object"}), words),
    lambda words: stack_reader(*schema_language(TREE), words),
], ids=["table", "json_object", "tree"])
def test_there_is_always_a_token_that_is_nearer_to_the_end(make):
    words = vocabulary(2)
    reader, rng = make(words), random.Random(0)
    state = 0
    for _ in range(200):
        distance = reader.distance(state)
        targets = sorted(set(moves_by_token(reader, state).values()))
        assert (distance == 0) == reader.accepts(state)
        assert distance == 0 or any(reader.distance(target) < distance for target in targets)
        state = rng.choice(targets) if targets else 0


def test_a_tables_distance_is_the_least():
    words = Vocabulary({1: b"a", 2: b"aaa", 3: b"b"})
    reader = table_reader("a{7}b?", words)
    assert reader.distance(0) == 3  # aaa aaa a


def test_nesting_ends_of_itself():
    words = Vocabulary({byte: bytes([byte]) for byte in range(256)})
    reader = stack_reader(*schema_language(TREE), words)
    state, depth = 0, 0
    while depth < 200 and (deeper := reader.step(state, ord("["))) >= 0:
        state, depth = deeper, depth + 1
        assert reader.distance(state) == depth
    assert 0 < depth <= DEEPEST + 1


def test_text_that_must_follow_is_known():
    words = vocabulary()
    schema = {"type": "object", "required": ["name", "é"],
              "properties": {"name": {"type": "string"}, "é": {"const": [1, 2]}}}
    language, _ = schema_language(schema)
    reader = TableReader(compile_language(language), words, ())
    assert reader.forced(0) == b'{"name": "'
    state = reader.read(0, b'{"name": "x"')
    assert reader.forced(state).decode() == ', "é": [1, 2]}'


def test_what_the_vocabulary_cannot_spell_has_no_end():
    words = Vocabulary({1: b"a", 2: b"b"})
    assert table_reader("abc", words).distance(0) == FAR
    assert stack_reader(*schema_language({"type": "object"}), words).distance(0) == FAR


@pytest.mark.parametrize("schema", [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
], ids=["itself", "in a ring"])
def test_a_definition_that_is_only_itself_is_refused(schema):
    with pytest.raises(DgemmaError, match="itself"):
        stack_reader(*schema_language(schema), vocabulary())


def test_a_recursive_value_that_cannot_end_is_found_out():
    endless = {"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
               "$ref": "#/$defs/a"}
    assert stack_reader(*schema_language(endless), vocabulary()).distance(0) == FAR


def test_any_json_object_can_be_read():
    words = vocabulary()
    reader = stack_reader(*schema_language({"type": "object"}), words)
    value = {"a": [1, -2.5e3, True, None, {"é\n\"\\": []}], "": {"b": {"c": "日本"}}, "x": 1e-7, "y": [[], [[0]]]}
    text = json.dumps(value, ensure_ascii=False).encode()
    assert reader.accepts(reader.read(0, text))
    assert reader.read(0, text[:-1] + b"]") is None
    assert reader.read(0, b"[") is None
