"""Keywords that libraries write every day, beside their neighbours: what is accepted, what is not, and that every text
of the language is valid."""

import json

import pytest

from dgemma.constrain.scalars import dumps
from support.schema_texts import accepts, empty, invalid_text, reader_of

INT, TEXT, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}
DRAFT7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


def obj(**properties):
    return {"type": "object", "properties": properties}


# What it is about: (schema, values that the language has, values that it does not have).
CASES = {
    # Three causes of invalid output.
    "maxItems below prefixItems": ({"type": "array", "prefixItems": [INT, INT], "maxItems": 1}, [[], [1]], [[1, 2]]),
    "maxItems at prefixItems": ({"type": "array", "prefixItems": [INT, INT], "maxItems": 2}, [[1, 2]], [[1, 2, 3]]),
    "maxItems above prefixItems": ({"type": "array", "prefixItems": [INT], "items": TEXT, "maxItems": 2},
                                   [[1, "a"]], [[1, "a", "b"], [1, 2]]),
    "maxItems 0 beside prefixItems": ({"type": "array", "prefixItems": [INT], "maxItems": 0}, [[]], [[1]]),
    "maxItems below a draft-7 tuple": ({**DRAFT7, "type": "array", "items": [INT, INT], "maxItems": 1}, [[1]],
            [[1, 2]]),
    "oneOf by a property, one branch of any type": (
        {"oneOf": [{**obj(a={"const": 1}), "required": ["a"]}, {"properties": {"a": {"const": 2}}, "required": ["a"]}]},
        [{"a": 1}, {"a": 2}], [{"a": 3}, {}]),
    "oneOf by a property, no branch of a type": (
        {"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]},
        [{"a": 1}, {"a": 2}], [{"a": 3}, {}, "text", 7, []]),
    "oneOf of a type and of everything else": ({"oneOf": [INT, {"minimum": 2}]}, [1], [2, 3]),
    "oneOf whose denial is no list of cases": (
        {"oneOf": [{"not": {"additionalProperties": False}}, {"enum": [{"ab": [1]}]}]}, [], [{"ab": [1]}]),
    "0 is not False": ({"allOf": [{"enum": [0, 1, "a"]}, {"enum": [False, 1.0]}]}, [1], [0, False, True]),
    "1 is not True": ({"allOf": [{"const": True}, {"enum": [1, True]}]}, [True], [1]),
    "[0] is not [False]": ({"allOf": [{"enum": [[0], [False]]}, {"const": [False]}]}, [[False]], [[0]]),
    "{a: 1} is not {a: True}": ({"allOf": [{"enum": [{"a": 1}, {"a": True}]}, {"not": {"const": {"a": 1}}}]},
                                [{"a": True}], [{"a": 1}]),
    "an enum of 0 and False is unique": ({"enum": [0, False, 1, True]}, [0, False, 1, True], ["0"]),
    # Refused before, written by libraries.
    "an unknown format": ({"type": "string", "format": "made-up"}, ["anything"], [1]),
    "an unknown format beside a pattern": ({"type": "string", "format": "x", "pattern": "^a$"}, ["a"], ["b"]),
    "a format beside a length": ({"type": "string", "format": "email", "maxLength": 9}, ["a@b.org"],
                                 ["aaaaaaaa@b.org"]),
    "a format that a length leaves nothing of": ({"type": "string", "format": "uuid", "maxLength": 3}, ["abc"],
            ["abcd"]),
    "a format of numbers": ({"type": "integer", "format": "int32"}, [2**31 - 1], [2**31, 1.5]),
    "a draft-7 tuple": ({**DRAFT7, "type": "array", "items": [INT, TEXT], "additionalItems": False},
                        [[1, "a"], [1], []], [["a"], [1, "a", 1]]),
    "a draft-7 tuple with more": ({**DRAFT7, "type": "array", "items": [INT], "additionalItems": TEXT, "minItems": 2},
                                  [[1, "a"], [1, "a", "b"]], [[1], [1, 2]]),

            "a draft-7 tuple without a draft": ({"type": "array", "items": [INT, TEXT], "additionalItems": False,
                    "minItems": 2},
                                        [[1, "a"]], [[1], [1, 2], ["a", "a"]]),
    "additionalItems beside no tuple": ({**DRAFT7, "type": "array", "items": INT, "additionalItems": False}, [[1, 2]],
                                        [["a"]]),
    "propertyNames of an enum": ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INT,
                                  "required": ["a"]}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"b": 1}, {"a": 1, "c": 1}]),
    "propertyNames of an enum, all required": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INT, "required": ["a", "b"]},
        [{"a": 1, "b": 2}], [{"a": 1}]),
    "propertyNames of a pattern": ({"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": INT,
                                    "minProperties": 1}, [{"xa": 1}], [{"a": 1}, {}]),
    "propertyNames of nothing": ({"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
    "not anything, as a property": (obj(a={"not": {}}, b=INT), [{}, {"b": 1}], [{"a": 1}, {"a": None}]),
    "not a type": ({"not": {"type": ["object", "array", "string", "null", "boolean"]}}, [1, 1.5], ["a", None]),
    "not a constant": ({"type": "integer", "not": {"const": 3}}, [2, 4], [3, 2.5]),
    "not an enum of texts": ({"type": "string", "not": {"enum": ["a", "b"]}}, ["c", "ab", ""], ["a", "b"]),
    "not required": ({**obj(a=INT, b=INT), "not": {"required": ["a"]}}, [{"b": 1}, {}], [{"a": 1}]),
    "not a pattern": ({"type": "string", "not": {"pattern": "^a"}}, ["b", ""], ["a", "ab"]),
    "an enum beside a length": ({"enum": ["a", "abc", 7], "minLength": 3}, ["abc", 7], ["a"]),
    "an enum beside a bound": ({"enum": [1, 5, 9], "maximum": 5}, [1, 5], [9]),
    "a constant beside a type": ({"type": "integer", "const": 3}, [3], [4]),
    "an enum beside properties": ({"enum": [{"a": 1}, {"a": "x"}], **obj(a=INT)}, [{"a": 1}], [{"a": "x"}]),
    "multipleOf of whole numbers": ({"type": "integer", "multipleOf": 7, "minimum": 0}, [0, 7, 70007], [1, 8, -7]),
    "multipleOf of cents": ({"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2}, [0, 0.25, 1.5, 2],
                            [0.1, 2.25]),
    "multipleOf with two numbers": ({"allOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}, [0, 6, 12],
                                    [2, 3, 4]),
    "not a multiple": ({"type": "integer", "not": {"multipleOf": 2}}, [1, 3], [0, 2]),
    "uniqueItems of an enum": ({"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
                               [["c", "a"], ["a", "b", "c"], []], [["a", "a"], ["a", "b", "a"]]),
    "uniqueItems of booleans": ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 2},
                                [[True, False], [False, True]], [[True, True], [True]]),
    "uniqueItems of whole numbers": ({"type": "array", "items": INT, "uniqueItems": True, "minItems": 2}, [[1, 2]],
                                     [[1, 1], [1]]),
    "uniqueItems false": ({"type": "array", "items": INT, "uniqueItems": False}, [[1, 1]], [["a"]]),
    "if, then, else by a constant": (
        {**obj(kind={"enum": ["a", "b"]}, n=INT), "required": ["kind"],
         "if": {"properties": {"kind": {"const": "a"}}}, "then": {"required": ["n"]},
                 "else": {"properties": {"n": False}}},
        [{"kind": "a", "n": 1}, {"kind": "b"}], [{"kind": "a"}, {"kind": "b", "n": 1}]),
    "if without else": ({"type": "integer", "if": {"minimum": 10}, "then": {"multipleOf": 10}}, [3, 10, 20], [11]),
    "if without then": ({"type": "integer", "if": {"minimum": 10}, "else": {"const": 3}}, [3, 11], [4]),
    "then without if": ({"type": "integer", "then": {"const": 3}}, [4], ["a"]),
    "dependentRequired": ({**obj(a=INT, b=INT), "dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 1}],
                          [{"a": 1}]),
    "dependentSchemas": ({**obj(a=INT, b=INT), "dependentSchemas": {"a": {"properties": {"b": {"const": 2}}}}},
                         [{"b": 1}, {"a": 1, "b": 2}, {"a": 1}], [{"a": 1, "b": 1}]),
    "dependencies of draft 7": ({**DRAFT7, **obj(a=INT, b=INT), "dependencies": {"a": ["b"]}}, [{"a": 1, "b": 1}],
                                [{"a": 1}]),
    "contains": ({"type": "array", "items": INT, "contains": {"minimum": 5}}, [[5], [1, 7, 2]], [[], [1, 2]]),
    "contains so often": ({"type": "array", "items": {"type": "boolean"}, "contains": {"const": True}, "minContains": 2,
                           "maxContains": 2}, [[True, True], [True, False, True]], [[True], [True, True, True]]),
    "contains none at least": ({"type": "array", "items": INT, "contains": {"const": 1}, "minContains": 0}, [[], [2]],
                               [["a"]]),
    "patternProperties": ({"type": "object", "patternProperties": {"^x_": INT}, "additionalProperties": False},
                          [{}, {"x_a": 1}], [{"a": 1}, {"x_a": "a"}]),
    "patternProperties beside properties": (
        {**obj(x_id=TEXT, name=TEXT), "patternProperties": {"^x_": {"minLength": 2}}},
        [{"x_id": "ab"}, {"name": "a"}], [{"x_id": "a"}]),
    "two patternProperties that meet": (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 5}}}, [{"ac": 1},
                {"ab": 5}],
        [{"ab": 1}, {"ac": "x"}]),
    "minProperties of a map": ({"type": "object", "additionalProperties": INT, "minProperties": 2, "maxProperties": 3},
                               [{"a": 1, "b": 2}], [{"a": 1}, {}]),
    "a reference to an anchor": ({"$ref": "#num", "$defs": {"a": {"$anchor": "num", "type": "integer"}}}, [1], ["a"]),

            "a reference to an identifier": ({"$ref": "http://x.org/num",
                    "$defs": {"a": {"$id": "http://x.org/num", **INT}}}, [1],
                                     ["a"]),
    "a relative reference": ({"$id": "http://x.org/root.json", "$ref": "num.json",
                              "$defs": {"a": {"$id": "num.json", "type": "integer"}}}, [1], ["a"]),
    "an identifier that is an anchor in draft 7": ({**DRAFT7, "allOf": [{"$ref": "#num"}],
                                                    "definitions": {"a": {"$id": "#num", "type": "integer"}}}, [1],
                                                            ["a"]),
    "a reference into an array": ({"allOf": [{"type": "integer"}, {"$ref": "#/allOf/0"}]}, [1], ["a"]),
    "a pattern that looks ahead": ({"type": "string", "pattern": "^(?=.*[0-9])(?=.*[a-z]).{4,8}$"}, ["ab12"],
                                   ["abcd", "1234", "a1"]),
    "a pattern that must not follow": ({"type": "string", "pattern": "^(?!admin)[a-z]+$"}, ["adam"],
            ["admin", "administer"]),
    "a pattern that looks back": ({"type": "string", "pattern": "^[ab]+(?<!b)$"}, ["ba"], ["ab"]),
    "a word's boundary": ({"type": "string", "pattern": r"\bcat\b"}, ["a cat", "cat"], ["cats", "bobcat"]),
    "a property of characters": ({"type": "string", "pattern": r"^\p{Lu}\p{L}*$"}, ["Émile"], ["émile", "A1"]),
    "a named group": ({"type": "string", "pattern": r"^(?<y>\d{4})-(?<m>\d\d)$"}, ["2024-05"], ["24-05"]),
    "case that does not matter": ({"type": "string", "pattern": "(?i)^yes$"}, ["YES", "yEs"], ["no"]),
    "content of JSON": ({"type": "string", "contentMediaType": "application/json"}, ['{"a": 1}'], ["{", 1]),
    "nothing unevaluated": ({"allOf": [obj(a=INT)], "properties": {"b": INT}, "unevaluatedProperties": False,
                             "type": "object"}, [{"b": 1}], [{"c": 1}]),
    "null beside a type": ({"anyOf": [{"type": "string", "maxLength": 3}, NULL]}, ["abc", None], ["abcd", 1]),
}

NOT_FOR_PYTHON = ("a property of characters", "a named group")  # `jsonschema` cannot read these patterns


@pytest.mark.parametrize("name", CASES)
def test_a_keyword_keeps_what_it_says(name):
    schema, inside, outside = CASES[name]
    reader = reader_of(schema)
    assert not empty(reader)
    for value in inside:
        assert accepts(reader, dumps(value)), value
    for value in outside:
        assert not accepts(reader, dumps(value)), value
    draft = "draft7" if "$schema" in schema else "draft2020-12"
    if "additionalItems" in schema:
        draft = "draft7"
    if name not in NOT_FOR_PYTHON:
        assert invalid_text(schema, reader, draft, seed=1) is None


@pytest.mark.parametrize("schema", [
    {"not": {}}, False, {"allOf": [INT, TEXT]}, {"enum": []}, {"anyOf": []},
            {"type": "integer", "minimum": 2, "maximum": 1},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 3},
            {"enum": ["a"], "minLength": 2},
    {"type": "string", "pattern": "^a$", "not": {"pattern": "a"}}, {**obj(a=False), "required": ["a"]},
    {"type": "array", "contains": INT, "maxItems": 0}, {"type": "object", "maxProperties": 0, "required": ["a"]},
])
def test_a_schema_that_nothing_satisfies_has_no_text(schema):
    assert empty(reader_of(schema))


def test_a_type_that_nobody_names_is_written_where_no_other_can_be():
    reader = reader_of({"minLength": 3, "pattern": "^.{2}$", "maxLength": 5})  # no text, and nothing is said of others
    assert accepts(reader, "1") and accepts(reader, "[]") and not accepts(reader, '"ab"')


def test_what_escapes_in_json_is_counted_as_it_is_read():
    reader = reader_of({"type": "string", "pattern": '^["\\\\\\n]{2}$'})
    for value in ('"\\', "\n\n", '""'):
        assert accepts(reader, dumps(value))
        assert json.loads(dumps(value)) == value
    assert not accepts(reader, dumps('"'))
