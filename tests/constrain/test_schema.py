"""JSON schemas as languages: what they accept, `json` reads and `jsonschema` finds valid."""

import functools
import json
import random
from decimal import Decimal

import jsonschema
import pytest

from dgemma.constrain.automaton import TooLarge, compile_language
from dgemma.constrain.scalars import FORMATS, dumps, integer, number
from dgemma.constrain.schema import schema_language
from dgemma.errors import DgemmaError
from support.schema_texts import empty, reader_of

VALUES = [None, True, False, 0, -1, 7, 150, 2.5, -0.25, "", "a", "ab", "AB12", "x\n\"é", [], [1], [1, 2, 3], ["a"],
          ["a", 1], {}, {"a": "x"}, {"a": "x", "b": 1}, {"b": 1}, {"a": 1}, {"c": 3}, {"a": "x", "c": 3},
          {"a": None}, "2024-02-28", "2023-02-30", "a@b.org", [[1], [2]], [{"a": "x"}]]


def accepts(automaton, text):
    state = 0
    for byte in text.encode():
        state = automaton.next_byte(state, byte)
        if state < 0:
            return False
    return bool(automaton.accepts[state])


def compiled(schema):
    language, rules = schema_language(schema)
    assert not rules
    return compile_language(language)


def some_texts(automaton, seed, count=150, longest=120):
    """Texts of a language: random walks through its automaton that reach an end."""
    rng = random.Random(seed)

    @functools.cache
    def ways(state):
        return [(byte, target) for byte in range(256) if (target := automaton.next_byte(state, byte)) >= 0]

    for _ in range(count):
        state, text = 0, bytearray()
        while ways(state) and len(text) < longest and not (automaton.accepts[state] and rng.random() < 0.5):
            byte, state = rng.choice(ways(state))
            text.append(byte)
        if automaton.accepts[state]:
            yield text.decode()


SCHEMAS = {
    "string": {"type": "string"},
    "lengths": {"type": "string", "minLength": 1, "maxLength": 2},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}\d+$", "maxLength": 5},
    "loose pattern": {"pattern": "a"},
    "integer": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
    "number": {"type": "number", "minimum": -1, "exclusiveMinimum": -1, "maximum": 7},
    "types": {"type": ["null", "boolean"]},
    "enum": {"enum": ["a", 7, None, {"a": "x"}, [1]]},
    "typed enum": {"type": "string", "enum": ["a", 7]},
    "const": {"const": {"a": "x", "b": 1}},
    "array": {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 1, "maxItems": 2},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2, "items": False},
    "loose tuple": {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}, "maxItems": 3},
    "object": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]},
    "optional": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"},
                                                  "c": {"type": "integer"}}, "additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    "named map": {"type": "object", "propertyNames": {"pattern": "^[ab]$"},
                  "additionalProperties": {"type": "integer"}},
    "open": {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "array", "items": {"const": 1}}}]},
    "all of": {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"maximum": 1, "type": "integer"}}},
                         {"required": ["b"]}],
               "$defs": {"a": {"type": "object", "properties": {"a": {"type": "string"}}}}},
    "closed all of": {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}},
                                 "additionalProperties": False},
                                {"properties": {"b": {"type": "integer"}}}]},
    "ref": {"type": "array", "items": {"$ref": "#/definitions/x~1y"}, "definitions": {"x/y": {"const": 1}}},
    "ref beside": {"$ref": "#/$defs/a", "maximum": 7, "$defs": {"a": {"type": "integer", "minimum": 0}}},
    "branches": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"const": 1}},
                 "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "one of": {"oneOf": [{"type": "string"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
                         {"type": "object", "properties": {"a": {"enum": ["x", None]}, "b": {"type": "integer"}}}]},
    "one of by chance": {"oneOf": [{"properties": {"a": {"const": "x"}}}, {"properties": {"a": {"const": 1}}}],
                         "type": "object"},
    "absent": {"type": "object", "properties": {"a": False}, "additionalProperties": {"type": "integer"}},
    "nothing else": {"type": "object", "unevaluatedProperties": False},
    "nothing else in all": {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}],
                            "properties": {"b": {"type": "integer"}}, "unevaluatedProperties": False},
    "unseen by a part": {"allOf": [{"properties": {"a": {"type": "string"}}, "unevaluatedProperties": False},
                                   {"type": "object", "properties": {"b": {"type": "integer"}}}]},
    "named by a pattern": {"type": "object", "patternProperties": {"^[ab]$": {"type": "integer"}}},
    "all optional": {"type": "object", "properties": {name: {"type": "integer"} for name in "abc"},
                     "additionalProperties": {"type": "null"}},
    "fractions": {"type": "number", "minimum": -0.25, "exclusiveMaximum": 2.55},
}


@functools.cache
def compiled_of(name):
    return compiled(SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_the_language_satisfies_the_schema(name):
    found = set(some_texts(compiled_of(name), seed=1))
    assert found
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    for text in found:
        validator.validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_value_is_in_the_language_if_it_satisfies_the_schema_and_has_no_extras(name):
    schema, automaton = SCHEMAS[name], compiled_of(name)
    # What these schemas leave open and the language leaves out: types beside the one in mind, undeclared properties.
    left_out = {"loose pattern": lambda v: not isinstance(v, str), "loose tuple": lambda v: not isinstance(v, list),
                "object": lambda v: "c" in v, "all of": lambda v: not isinstance(v, dict) or "c" in v,
                "named map": lambda v: False, "branches": lambda v: "c" in v,
                "one of": lambda v: isinstance(v, dict) and "c" in v,
                "one of by chance": lambda v: v != {"a": "x"} and v != {"a": 1},
                "nothing else in all": lambda v: v == {"a": "x", "b": 1},  # it has b before a
                 "unseen by a part": lambda v: False,
                "named by a pattern": lambda v: "c" in v}.get(name, lambda v: False)
    valid = jsonschema.Draft202012Validator(schema)
    accepted = 0
    for value in VALUES:
        wanted = valid.is_valid(value) and not left_out(value)
        assert accepts(automaton, dumps(value)) == wanted, value
        accepted += wanted
    assert accepted or name == "named map"


@pytest.mark.parametrize("text", ["17.000000000000001", "-16.999999999999999", "5e0"])
def test_a_number_beside_a_bound_is_not_rounded_onto_it(text):
    automaton = compile_language(number(-17, None, above=True))
    upper = compile_language(number(17, None, above=True))
    assert not accepts(automaton, text) or float(text) > -17
    assert not accepts(upper, text) or float(text) > 17


def test_bounds_of_numbers_may_have_fractions():
    rng = random.Random(1)
    for _ in range(60):
        low = Decimal(rng.randint(-3000, 3000)).scaleb(-rng.randint(0, 3))
        high = low + Decimal(rng.randint(0, 3000)).scaleb(-rng.randint(0, 3))
        above, below = rng.random() < 0.5, rng.random() < 0.5
        automaton = compile_language(number(low, high, above, below))
        for _ in range(60):
            near = rng.uniform(float(low) - 1, float(high) + 1)
            value = rng.choice([low, high, Decimal(round(near, rng.randint(0, 4)))])
            value = value.quantize(Decimal("0.0001")).normalize()
            wanted = (low < value or (low == value and not above)) and (value < high or (value == high and not below))
            assert accepts(automaton, f"{value:f}") == wanted, (low, high, above, below, value)


def test_lengths_are_cut_only_where_they_may_be():
    def most(schema, longest):
        language, _ = schema_language(schema, longest)
        return max(len(json.loads(text)) for text in some_texts(compile_language(language), seed=3, count=150))

    assert most({"type": "string", "maxLength": 9, "pattern": "^[a-z]*$"}, 3) <= 3
    assert most({"type": "string", "minLength": 7, "maxLength": 9}, 3) == 7
    assert most({"type": "string"}, 3) > 3


def test_a_schema_that_explodes_is_an_error_and_not_a_wait():
    def doubling(part, last):
        defs = {f"a{i}": part({"$ref": f"#/$defs/a{i + 1}"}) for i in range(17)}
        return {"$ref": "#/$defs/a0", "$defs": {**defs, "a17": last}}

    text = {"type": "string"}
    with pytest.raises(TooLarge, match="too large"):
        reader_of(doubling(lambda ref: {"properties": {name: {**ref, "type": "object"} for name in "abc"}},
                           {"type": "object"}))
    with pytest.raises(TooLarge, match="too many"):
        reader_of({"allOf": [{"anyOf": [{"required": [f"{row}-{column}"]} for column in range(5)]}
                             for row in range(6)]})
    # What only seems to explode is worked out once for each part.
    assert not empty(reader_of(doubling(lambda ref: {"anyOf": [ref, ref], "minLength": 0}, text)))
    defs = {f"{name}{i}": {"allOf": [{"$ref": f"#/$defs/{part}{i + 1}"} for part in order]}
            for i in range(17) for name, order in (("a", "ab"), ("b", "ba"))}
    assert not empty(reader_of({"$ref": "#/$defs/a0", "$defs": {**defs, "a17": text, "b17": {**text, "maxLength": 9}}}))


def test_many_properties_that_may_be_absent_do_not_multiply():
    item = {"type": "string", "pattern": "^[a-z]*$", "maxLength": 20}
    automaton = compiled({"type": "object", "properties": {f"name{i}": item for i in range(150)}})
    assert accepts(automaton, '{"name3": "x", "name149": ""}')
    assert not accepts(automaton, '{"name4": "x", "name3": ""}')
    assert not accepts(automaton, '{"name3": "x", }')


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_what_others_take_it_for(name):
    schema = {"type": "string", "format": name}
    checker = jsonschema.FormatChecker()
    for text in some_texts(compiled(schema), seed=2, count=60):
        value = json.loads(text)
        if name == "date-time":
            checker.check(value[:10], "date")
        elif name == "time":
            assert 0 <= int(value[:2]) < 24
        else:
            checker.check(value, name)


def test_ranges_of_integers_are_exact():
    rng = random.Random(0)
    for _ in range(60):
        low = rng.choice([None, rng.randint(-150, 150)])
        high = rng.choice([None, (low or 0) + rng.randint(0, 250)])
        automaton = compile_language(integer(low, high))
        for value in range(-420, 420, 7):
            wanted = (low is None or value >= low) and (high is None or value <= high)
            assert accepts(automaton, str(value)) == wanted, (low, high, value)


def test_ranges_of_numbers_hold():
    rng = random.Random(0)
    for _ in range(60):
        low = rng.randint(-20, 20)
        high, above, below = low + rng.randint(1, 30), rng.random() < 0.5, rng.random() < 0.5
        automaton = compile_language(number(low, high, above, below))
        for _ in range(60):
            value = rng.choice([float(low), float(high), low + 0.01, high - 0.01, round(rng.uniform(-60, 60), 2)])
            text = str(int(value)) if value == int(value) else str(value)
            wanted = (low < value or (low == value and not above)) and (value < high or (value == high and not below))
            assert accepts(automaton, text) == wanted, (low, high, above, below, text)


@pytest.mark.parametrize(("schema", "named"), [
    ({"type": "number", "minimum": "0.5"}, r"minimum is '0\.5'"), ({"minimum": float("inf")}, "minimum is inf"),
    ({"minimum": True}, "minimum is True"), ({"multipleOf": 0}, "multipleOf is 0"), ({"multipleOf": "a"}, "multipleOf"),
    ({"minLength": float("inf")}, "minLength"), ({"minLength": -1}, "minLength"), ({"minLength": 1.5}, "minLength"),
    ({"maxItems": "3"}, "maxItems"), ({"contains": {}, "minContains": -1}, "minContains"),
    ({"maxProperties": []}, "maxProperties"),
    ({"enum": "ab"}, "enum must be a list"), ({"required": "ab"}, "required must be a list"),
    ({"required": [3]}, "required must list names"), ({"anyOf": 3}, "anyOf must be a list"),
    ({"allOf": {}}, "allOf must be a list"), ({"prefixItems": {}}, "prefixItems must be a list"),
    ({"properties": []}, "properties must be an object"), ({"patternProperties": []}, "patternProperties must be an"),
    ({"dependentRequired": 3}, "dependentRequired must be an"), ({"dependencies": {"a": 3}}, r"dependencies\.a must"),
    ({"type": "strin"}, "type is 'strin'"), ({"type": 3}, "type is 3"), ({"type": ["string", "a"]}, "type is 'a'"),
    ({"$ref": "other.json"}, "other.json"), ({"$ref": "#/$defs/none"}, "nothing"), ({"$ref": "#none"}, "nothing"),
    ({"$ref": 3}, "must be text"), ({"$ref": "#"}, "without end"), ({"not": {"$ref": "#"}}, "without end"),
    ({"anyOf": [{"$ref": "#"}]}, "without end"),
    ({"pattern": r"(a)\1"}, "pattern.*back reference"), ({"pattern": 3}, "pattern must be"),
    ({"patternProperties": {"(": {}}}, r"patternProperties.*unterminated"), ({"items": [3]}, r"items\[0\] must be"),
    ({"patternProperties": {"a": 3}}, r"patternProperties\.a must be"), ([], "must be an obj"), (3, "must be an obj"),
    ({"properties": {"a": {"type": "array", "items": 3}}}, r"a\.items must be"), ({"anyOf": [3]}, r"anyOf\[0\] must"),
    ({"contains": 3}, "contains must be"), ({"propertyNames": 3}, "propertyNames must be"), ({"not": 3}, "not must be"),
    ({"if": 3, "then": {}}, "if must be"), ({"unevaluatedItems": 3}, "unevaluatedItems must be"),
    ({"oneOf": [True, {}]}, "oneOf: its branches"), ({"const": float("nan")}, "valid"),
    ({"contentEncoding": "base64", "contentMediaType": "application/json"}, "contentMediaType"),
    ({"type": "number", "not": {"type": "integer"}, "multipleOf": 0.5}, "multipleOf"),
    ({"enum": ["\ud800"]}, "surrogate"),
])
def test_what_is_not_understood_is_refused_by_name(schema, named):
    with pytest.raises(DgemmaError, match=named):
        reader_of(schema)


def test_recursion_becomes_rules():
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    _, rules = schema_language({"$defs": {"node": node}, "$ref": "#/$defs/node"})
    assert list(rules) == ["#/$defs/node"]
