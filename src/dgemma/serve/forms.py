"""The form that an answer must have, under every name that clients know for it, on every route.

Works on: the fields of a body. Knows nothing of: HTTP, how a form is kept.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dgemma.serve.errors import ApiError, shown

Form = dict[str, Any]  # as `Model.request` knows it

_TYPES = "text, json_object, json_schema, regex or choice"
_GRAMMARS = ("grammar", "ebnf", "lark", "gbnf", "structural_tag")


def answer_form(body: BaseModel) -> tuple[Form | None, str]:
    """The form that the answer must have and the field that says so, whatever its name.

    None, under the name of the route's own field, where none is asked for. Two fields may say the same. Raises
    `ApiError` for two that contradict each other, and for one that says nothing that could be kept.
    """
    found: list[tuple[Form, str]] = []
    for name, read in _FIELDS.items():
        value = getattr(body, name, None)
        if value is not None:
            found += [(form, param) for form, param in read(_plain(value), name) if form["type"] != "text"]
    if not found:
        return None, "response_format"
    chosen = found[0]
    for other in found[1:]:
        if _spelt(other[0]) == _spelt(chosen[0]) or _says_more(chosen[0], other[0]):
            continue
        if not _says_more(other[0], chosen[0]):
            raise ApiError(400, f"the answer can have one form only, and {chosen[1]} names another", other[1])
        chosen = other
    return chosen


def _spelt(form: Form) -> str:
    """As text: to Python 1 and true are the same."""
    return json.dumps(form, sort_keys=True)


def _says_more(one: Form, other: Form) -> bool:
    """Whether a form is a schema of an object where the other one asks for any JSON object."""
    if (one["type"], other["type"]) != ("json_schema", "json_object"):
        return False
    return one["json_schema"]["schema"].get("type", "object") == "object"


# ---- the fields: what each yields is forms, and what to call the field in errors -------------------

Read = Callable[[Any, str], Iterator[tuple[Form, str]]]


def _typed(value: Any, where: str) -> Iterator[tuple[Form, str]]:
    """{"type": …}, as OpenAI's two APIs, Anthropic's, vLLM, llama.cpp and TGI write it."""
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise ApiError(400, f"{where} must be an object whose type is {_TYPES}, not {shown(value)}", where)
    kind = value["type"]
    nested = value.get("schema") is not None or value.get("json_schema") is not None
    if kind in ("json_schema", "json") or (kind == "json_object" and nested):
        inner = value.get("json_schema")
        # OpenAI nests the schema, llama.cpp and the Responses API do not, TGI calls it value.
        holder = inner if isinstance(inner, Mapping) else value
        schema = holder.get("schema", value.get("value"))
        if schema is None:
            place = f"{where}.json_schema.schema" if kind == "json_schema" else f"{where}.schema"
            raise ApiError(400, f"{place} is missing: the schema itself", where)
        yield _schema(schema, where), where
    elif kind == "regex":
        yield {"type": "regex", "regex": _first(value, "regex", "pattern", "value")}, where
    elif kind == "choice":
        yield {"type": "choice", "choice": _first(value, "choice", "choices", "value")}, where
    elif kind in ("text", "json_object"):
        yield {"type": kind}, where
    else:
        hint = ": write the grammar as a JSON schema or a regular expression" if kind in _GRAMMARS else ""
        raise ApiError(400, f"{where}.type must be {_TYPES}, not {shown(kind)}{hint}", f"{where}.type")


def _first(value: Mapping[str, Any], *names: str) -> Any:
    return next((value[name] for name in names if name in value), None)


def _schema(value: Any, where: str) -> Form:
    """A schema, as an object or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{where}: the schema is not valid JSON: {error}", where) from error
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{where}: a JSON schema is a JSON object, not {shown(value)}", where)
    return {"type": "json_schema", "json_schema": {"schema": dict(value)}}


def _nested(value: Mapping[str, Any], where: str) -> Iterator[tuple[Form, str]]:
    """{"format": {"type": …}}: OpenAI's text, Anthropic's output_config."""
    if value.get("format") is not None:
        yield from _typed(value["format"], f"{where}.format")


def _ollama(value: Any, where: str) -> Iterator[tuple[Form, str]]:
    """"json", or a schema; a form with a type, too."""
    if isinstance(value, Mapping):
        if value.get("type") in ("json_schema", "json_object", "text", "regex", "choice", *_GRAMMARS):
            yield from _typed(value, where)
        elif value:
            yield _schema(value, where), where
    elif value == "json":
        yield {"type": "json_object"}, where
    elif value not in ("", "text"):
        raise ApiError(400, f'{where} must be "json" or a JSON schema, not {shown(value)}', where)


def _named_schema(value: Any, where: str) -> Iterator[tuple[Form, str]]:
    """llama.cpp's and SGLang's json_schema: the schema, as text too, or in OpenAI's wrapping."""
    form = _schema(value, where)
    schema = form["json_schema"]["schema"]
    wrapped = isinstance(schema.get("schema"), Mapping) and schema.keys() <= {"name", "schema", "strict", "description"}
    yield (_schema(schema["schema"], where) if wrapped else form), where


def _guided(kind: str, value: Any, where: str) -> Iterator[tuple[Form, str]]:
    """vLLM's earlier spelling."""
    if kind == "json":
        yield _schema(value, where), where
    elif kind != "json_object":
        yield {"type": kind, kind: value}, where
    elif value:
        yield {"type": kind}, where


def _structured_outputs(value: Mapping[str, Any], where: str) -> Iterator[tuple[Form, str]]:
    """vLLM's later spelling."""
    for name, form in value.items():
        if form is None or form is False or name in _ASIDE:
            continue
        if name not in ("json", "regex", "choice", "json_object"):
            raise ApiError(400, f"{where} takes json, regex, choice or json_object, not {shown(name)}", where,
                           "unsupported_parameter")
        yield from _guided(name, form, where)


# What vLLM is told of how it shall keep a form: here forms are kept in one way, without white space.
_ASIDE = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern",
          "backend", "_backend")


def _regex(value: Any, where: str) -> Iterator[tuple[Form, str]]:
    if value:  # SGLang's
        yield {"type": "regex", "regex": value}, where


_FIELDS: dict[str, Read] = {
    "response_format": _typed, "text": _nested, "output_config": _nested, "output_format": _typed, "format": _ollama,
    "json_schema": _named_schema,
    **{f"guided_{kind}": functools.partial(_guided, kind) for kind in ("json", "regex", "choice", "json_object")},
    "response_schema": functools.partial(_guided, "json"),
    "structured_outputs": _structured_outputs, "guided_decoding": _structured_outputs, "regex": _regex,
}


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_unset=True) if isinstance(value, BaseModel) else value
