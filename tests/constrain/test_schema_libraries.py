"""Schemas as libraries write them: every type of pydantic's fields, every kind of zod's."""

import datetime
import decimal
import enum
import ipaddress
import json
import pathlib
import re
import uuid
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypeVar, Union

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from support.schema_texts import empty, invalid_text, reader_of, some_texts

T = TypeVar("T")


class Colour(enum.Enum):
    RED, BLUE = "red", "blue"


class Level(enum.IntEnum):
    LOW, HIGH = 1, 2


class Point(NamedTuple):
    x: int
    y: float


class Movie(TypedDict, total=False):
    name: str
    year: int


class Inner(BaseModel):
    a: int
    b: str | None = None


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    loud: bool


class Page(BaseModel, Generic[T]):
    items: list[T]


FIELDS: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "str": str, "bytes": bytes, "None": None, "any": Any,
    "decimal": decimal.Decimal,
    "decimal in bounds": Annotated[decimal.Decimal, Field(ge=0, max_digits=6, decimal_places=2)],
    "uuid": uuid.UUID, "uuid4": pydantic.UUID4, "date": datetime.date, "datetime": datetime.datetime,
    "time": datetime.time,
    "timedelta": datetime.timedelta, "aware": pydantic.AwareDatetime, "past": pydantic.PastDate,
    "positive": pydantic.PositiveInt, "negative": pydantic.NegativeFloat, "not negative": pydantic.NonNegativeInt,
    "strict": pydantic.StrictInt, "finite": pydantic.FiniteFloat, "multiple": Annotated[int, Field(multiple_of=5)],
    "between": Annotated[float, Field(gt=0, lt=1)], "short": Annotated[str, Field(min_length=1, max_length=5)],
    "pattern": Annotated[str, Field(pattern=r"^[a-z]+\d*$")], "stripped": Annotated[
        str, pydantic.StringConstraints(strip_whitespace=True, to_lower=True, max_length=4)],
    "literal": Literal["a", "b", 3, None], "one literal": Literal["only"], "enum": Colour, "int enum": Level,
    "optional": Optional[int], "union": Union[int, str, None],  # noqa: UP007, UP045
    "union of lists": list[int] | list[str],
    "list": list[int], "bare list": list, "some": Annotated[list[str], Field(min_length=1, max_length=3)],
    "set": set[int],
    "frozen set": frozenset[str], "set of few": set[Literal["a", "b"]], "tuple": tuple[int, str],
    "long tuple": tuple[int, ...], "empty tuple": tuple[()], "named tuple": Point, "dict": dict[str, int],
    "bare dict": dict,
    "int keys": dict[int, str], "literal keys": dict[Literal["a", "b"], int],
    "nested dict": dict[str, dict[str, list[int]]],
    "pattern keys": dict[Annotated[str, Field(pattern="^x")], int], "enum keys": dict[Colour, int], "typed dict": Movie,
    "model": Inner, "closed": Closed, "open": Open, "models": list[Inner], "tree": Tree, "generic": Page[Inner],
    "told apart": Annotated[Cat | Dog, Field(discriminator="kind")], "not told apart": Cat | Dog,
    "ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address, "network": ipaddress.IPv4Network,
    "interface": ipaddress.IPv6Interface, "any address": pydantic.IPvAnyAddress, "url": pydantic.AnyUrl,
    "http url": pydantic.HttpUrl, "postgres": pydantic.PostgresDsn, "secret": pydantic.SecretStr,
    "secret bytes": pydantic.SecretBytes, "json": pydantic.Json, "json of": pydantic.Json[list[int]],
    "path": pathlib.Path, "base64": pydantic.Base64Str, "base64 bytes": pydantic.Base64Bytes,
    "pattern itself": re.Pattern,
    "byte size": pydantic.ByteSize, "email-like": Annotated[str, Field(json_schema_extra={"format": "email"})],
    "json value": pydantic.JsonValue, "date of a year": Annotated[datetime.date, Field(ge=datetime.date(2020, 1, 1))],
}


def model_of(name):
    return pydantic.create_model("Model", field=(FIELDS[name], ...))


# What pydantic demands beyond its own schema, or reads otherwise.
LAX = {"decimal", "json of", "secret bytes", "base64", "base64 bytes", "past", "pattern itself", "byte size",
        "int keys", "postgres",
       "decimal in bounds", "date of a year", "network", "interface", "path", "bytes", "frozen set", "set"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_type_of_pydantics_fields_is_kept_and_what_is_written_read(name):
    model = model_of(name)
    schema = model.model_json_schema()
    reader = reader_of(schema)
    assert not empty(reader)
    assert invalid_text(schema, reader, "draft2020-12", count=12) is None
    if name not in LAX:
        for text in some_texts(reader, seed=3, count=8, longest=60):
            model.model_validate_json(text)


def test_one_model_of_all_fields_at_once_is_kept():
    few = [name for name in FIELDS if name not in ("pattern itself", "timedelta", "url", "http url", "ipv6")]
    model = pydantic.create_model("Model", **{re.sub(r"\W", "_", f"f_{name}"): (FIELDS[name],
            ...) for name in few[:40]})
    assert not empty(reader_of(model.model_json_schema()))


SAFE = {"minimum": -9007199254740991, "maximum": 9007199254740991}
TEXT, NUMBER, NULL = {"type": "string"}, {"type": "number"}, {"type": "null"}
PERSON = {"type": "object", "properties": {"name": TEXT, "age": NUMBER}, "required": ["name", "age"],
          "additionalProperties": False}
PATTERNS = {
    "email": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    "uuid": r"^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}|"
            r"00000000-0000-0000-0000-000000000000|ffffffff-ffff-ffff-ffff-ffffffffffff)$",
    "date": r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|"
            r"\d{4}-(?:(?:0[13578]|"
            r"1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))$",
    "time": r"^(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?$",
    "ipv4": r"^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\.){3}"
            r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])$",
    "duration": r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$",
    "base64": r"^$|^(?:[0-9a-zA-Z+/]{4})*(?:(?:[0-9a-zA-Z+/]{2}==)|(?:[0-9a-zA-Z+/]{3}=))?$",
    "base64url": r"^[A-Za-z0-9_-]*$", "jwt": r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*$",
    "e164": r"^\+[1-9]\d{6,14}$", "nanoid": r"^[a-zA-Z0-9_-]{21}$", "cuid": r"^[cC][^\s-]{8,}$",
    "cuid2": r"^[0-9a-z]+$",
    "ulid": r"^[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}$", "xid": r"^[0-9a-vA-V]{20}$", "ksuid": r"^[A-Za-z0-9]{27}$",
    "cidrv4": r"^((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\.){3}"
              r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\/([0-9]|[1-2][0-9]|3[0-2])$",
    "emoji": r"^(\p{Extended_Pictographic}|\p{Emoji_Component})+$",
}
ZOD = {
    "string": TEXT, "number": NUMBER, "boolean": {"type": "boolean"}, "null": NULL, "any": {}, "unknown": {},
    "int": {"type": "integer", **SAFE}, "int32": {"type": "integer", "minimum": -2147483648, "maximum": 2147483647},
    "uint32": {"type": "integer", "minimum": 0, "maximum": 4294967295}, "float32": {
        "type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
    "positive": {"type": "number", "exclusiveMinimum": 0}, "multiple of": {"type": "number", "multipleOf": 0.5},
    "integer step": {"type": "integer", "multipleOf": 5, **SAFE}, "min max": {**TEXT, "minLength": 2, "maxLength": 9},
    "regex": {**TEXT, "pattern": "^[A-Z]{3}$"}, "includes": {**TEXT, "pattern": "needle"},
    "starts with": {**TEXT, "pattern": "^abc.*"}, "ends with": {**TEXT, "pattern": ".*xyz$"},
    "upper case": {**TEXT, "pattern": "^[^a-z]*$"}, "two patterns": {
        **TEXT, "allOf": [{"pattern": "^a"}, {"pattern": "b$"}]},
    **{name: {**TEXT, "format": name, "pattern": pattern} for name, pattern in PATTERNS.items()},
    "guid": {**TEXT, "format": "uuid", "pattern": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-"
                                                  "[0-9a-fA-F]{12})$"},
    "url": {**TEXT, "format": "uri"}, "iso datetime": {**TEXT, "format": "date-time"}, "ipv6": {**TEXT,
            "format": "ipv6"},
    "enum": {**TEXT, "enum": ["a", "b"]}, "native enum": {"type": "number", "enum": [0, 1]},
    "literal": {**TEXT, "const": "tuna"}, "literals": {"enum": ["a", 1, None]}, "nullable": {"anyOf": [TEXT, NULL]},
    "optional": {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
    "default": {**TEXT, "default": "x"}, "catch": {**NUMBER, "default": 1}, "readonly": {**TEXT, "readOnly": True},
    "object": PERSON, "strict object": PERSON, "loose object": {**PERSON, "additionalProperties": {}},
    "catchall": {**PERSON, "additionalProperties": TEXT}, "array": {"type": "array", "items": TEXT},
    "array of some": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3}, "tuple": {
        "type": "array", "prefixItems": [TEXT, NUMBER]}, "tuple and rest": {
        "type": "array", "prefixItems": [TEXT], "items": NUMBER}, "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [TEXT, NUMBER]},
    "record": {"type": "object", "propertyNames": TEXT, "additionalProperties": NUMBER}, "record of an enum": {
        "type": "object", "propertyNames": {**TEXT, "enum": ["a", "b"]}, "additionalProperties": NUMBER,
        "required": ["a", "b"]},
    "partial record": {"type": "object", "propertyNames": {**TEXT, "enum": ["a", "b"]}, "additionalProperties": NUMBER},
    "union": {"anyOf": [TEXT, NUMBER]}, "discriminated union": {"oneOf": [
        {"type": "object", "properties": {"type": {**TEXT, "const": kind}, "v": value}, "required": ["type", "v"],
         "additionalProperties": False} for kind, value in (("a", TEXT), ("b", NUMBER))]},
    "intersection": {"allOf": [{**PERSON, "additionalProperties": {}}, {
        "type": "object", "properties": {"b": TEXT}, "required": ["b"]}]},
    "lazy": {"type": "object", "properties": {"name": TEXT, "children": {"type": "array", "items": {"$ref": "#"}}},
             "required": ["name", "children"], "additionalProperties": False},
    "getter": {"$ref": "#/$defs/__schema0", "$defs": {"__schema0": {
        "type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/__schema0"}, NULL]}},
        "required": ["next"],
        "additionalProperties": False}}},
    "json": {"$ref": "#/$defs/__schema0", "$defs": {"__schema0": {"anyOf": [
        TEXT, NUMBER, {"type": "boolean"}, NULL, {"type": "array", "items": {"$ref": "#/$defs/__schema0"}},
        {"type": "object", "propertyNames": TEXT, "additionalProperties": {"$ref": "#/$defs/__schema0"}}]}}},
    "stringbool": TEXT, "file": {**TEXT, "format": "binary", "contentEncoding": "binary", "minLength": 1},
    "template literal": {**TEXT, "pattern": r"^hello, [\s\S]{0,}$"}, "never": {
        "type": "object", "properties": {"a": {"not": {}}}}, "described": {**TEXT, "description": "d", "title": "t",
        "id": "x"},
}


@pytest.mark.parametrize("name", ZOD)
def test_every_kind_of_zods_is_kept(name):
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ZOD[name]}
    reader = reader_of(schema)
    assert not empty(reader)
    if name != "emoji":  # `jsonschema` cannot read its pattern
        draft = "draft7" if "draft-07" in schema["$schema"] else "draft2020-12"
        assert invalid_text(schema, reader, draft, count=8) is None


def test_all_kinds_of_zods_are_kept_inside_an_object():
    for name, schema in ZOD.items():
        if "$ref" in json.dumps(schema):
            continue
        outer = {"type": "object", "properties": {"a": schema, "b": {"type": "array", "items": schema}},
                 "required": ["a", "b"], "additionalProperties": False}
        assert not empty(reader_of(outer)), name
