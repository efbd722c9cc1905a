"""What the formats' request bodies have in common: types of fields, the size of a body, files, turns put together.

Which fields there are is `fields`' to say. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dgemma.config import SAMPLER_SETTINGS
from dgemma.fields import shown
from dgemma.serve.errors import ApiError

T = TypeVar("T")


def _whole(value: Any) -> Any:
    """A whole number written as a float is one: JSON knows no difference, and some languages write no other."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Length = Annotated[Annotated[int, Field(ge=1)] | Literal[-1], BeforeValidator(_whole), Field(
    description="Tokens; -1: to the end of the context. More than fits is what fits.")]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False,
                                     description="Scales the temperature that tokens are drawn at; 0 is greedy.")]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="0 is greedy.")]
TopK = Annotated[Whole, Field(ge=-1, le=2**31 - 1, description="0 or -1: all tokens.")]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63, description="Fixes all randomness; drawn and reported when left "
                                                                 "out or -1.")]
CacheSalt = Annotated[str, Field(min_length=1, max_length=1000, description="What this request reads is found again "
                                 "in the prefix cache by requests of the same salt (and key) only.")]
# The first mistake in a list ends its reading: a list of a million mistakes would take a minute, and gigabytes.
Listed = Annotated[list[T], Field(fail_fast=True)]
StopString = Annotated[str, Field(max_length=1000)]
Stop = StopString | Annotated[Listed[StopString | None], Field(max_length=16)]
LogitBias = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]

MAX_DEPTH = 64  # levels of objects and lists in a body
MAX_PARTS = 100_000  # objects and lists in a body, and the objects' members; checking them takes about a second


class Body(BaseModel):
    """A JSON object. Types are those that the schema names: the string "1" is no number."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class RequestBody(Body):
    """The body of a request.

    It is neither nested so deeply that reading, rendering or repeating it would break off, nor of so many parts that
    checking them would keep everybody else waiting.
    """

    @model_validator(mode="before")
    @classmethod
    def _small_enough(cls, body: Any) -> Any:
        level = [body] if isinstance(body, dict) else []
        parts = 0
        for _ in range(MAX_DEPTH):
            parts += sum(1 + (len(outer) if isinstance(outer, dict) else 0) for outer in level)
            if parts > MAX_PARTS:
                raise ValueError(f"more than {MAX_PARTS} objects, lists and members")
            level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                     if isinstance(item, (dict, list))]
            if not level:
                return body
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


class SamplerFields(RequestBody):
    """The checkpoint's sampler settings under their own names, and the seed."""

    seed: Seed | None = None
    max_denoising_steps: Annotated[Whole, Field(ge=1, le=10_000)] | None = None
    entropy_bound: Positive | None = None
    t_min: Positive | None = None
    t_max: Positive | None = None
    stability_threshold: Annotated[Whole, Field(ge=0, le=10_000)] | None = None
    confidence_threshold: Positive | None = None
    redraw_empty: Annotated[bool | None, Field(
        description="Draw an answer that comes out empty at its first canvas once more.")] = None

    def sampler(self) -> dict[str, Any]:
        """The settings that were given, for `Model.request`."""
        given = {name: getattr(self, name) for name in (*SAMPLER_SETTINGS, "redraw_empty")}
        return {name: value for name, value in given.items() if value is not None}


# Kinds of parts that hold no text, by any API's name: what is seen, and what is not understood here.
SEEN = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
        "input_video": "video"}
UNREAD = frozenset(("input_audio", "audio", "audio_url", "container_upload", "computer_screenshot", "browser_state"))
# How large pictures are seen, as OpenAI calls it -> soft tokens.
_DETAILS = {"auto": None, "low": 70, "high": 1120, "original": 1120}
_TEXTS = ("text/", "application/json", "application/xml", "application/yaml", "application/x-yaml")


def refuse_media(parts: Any, where: str, seen: bool = False, within: bool = False) -> None:
    """Raises `ApiError` for a part of a message that holds no text, unless it can be ``seen``.

    ``within``: for one in a tool's result, too.
    """
    for place, part in enumerate(parts if isinstance(parts, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and (kind in UNREAD or (kind in SEEN and not seen)):
            what = "is not read here" if kind in UNREAD else ("is read in messages of the user and in tools' results "
                                                              "only")
            raise ApiError(400, f"{where}[{place}]: {kind} {what}", f"{where}[{place}]")
        if within and kind == "tool_result":
            refuse_media(part.get("content"), f"{where}[{place}].content", seen=seen)


def media_part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A picture or film of OpenAI's APIs, of a type of `SEEN`, as `serve.media` reads it. Raises `ApiError`."""
    given = next((part[name] for name in (part["type"], "image_url", "video_url") if part.get(name) is not None), None)
    source = given if isinstance(given, Mapping) else {"url": given}
    url, detail = source.get("url"), source.get("detail", part.get("detail"))
    if not isinstance(url, str) or not url:
        raise ApiError(400, f"{where}: this part ({part['type']}) needs the picture, as a data: URL: nothing is stored "
                       "here under an id", where)
    if detail is None:
        return media(SEEN[part["type"]], url, where)
    if not isinstance(detail, str) or detail not in _DETAILS:
        raise ApiError(400, f"{where}: detail must be one of {', '.join(_DETAILS)}, got {shown(detail)}", where)
    return media(SEEN[part["type"]], url, where, _DETAILS[detail])


def media(kind: str, url: str, where: str, tokens: int | None = None) -> dict[str, Any]:
    """A part that shows something; ``where`` names the field that it came in, for errors."""
    return {"type": kind, "url": url, "name": where} | ({} if tokens is None else {"tokens": tokens})


def named_file(name: Any, data: Any, where: str) -> str:
    """A file of text as a prompt shows it: a data URL, or nothing that is here. Raises `ApiError`."""
    if not isinstance(data, str):
        raise ApiError(400, f"{where}: files are not stored here: send the text itself, or file_data", where)
    return titled(name if isinstance(name, str) else None, file_text(data, None, where))


def file_text(data: str, media_type: str | None, where: str) -> str:
    """The text of a file that came as base64, or as a data URL of it. Raises `ApiError` for what is no text."""
    if data.startswith("data:"):
        head, _, data = data.partition(",")
        media_type = head.removeprefix("data:").split(";")[0]
    if not (media_type or "").startswith(_TEXTS):
        raise ApiError(400, f"{where}: this server reads text only: a file must be text/plain, not "
                       f"{media_type or 'of an unknown type'}", where)
    try:
        return base64.b64decode(data, validate=True).decode("utf-8-sig")
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: the file is not base64 of text in UTF-8: {error}", where) from error


def titled(title: str | None, text: str) -> str:
    """A document as a prompt shows it."""
    return f"{title}\n\n{text}" if title else text


class Turns:
    """A conversation while it is put together out of a format's smaller pieces.

    ``messages`` are as `dgemma.chat` reads them. What one role adds in a row is one message.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def say(self, role: str, texts: Iterable[str] = ()) -> dict[str, Any]:
        """Adds text to the last message if it is this role's, to a new one if not; returns the message."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": []})
        self.messages[-1]["content"] += [{"type": "text", "text": text} for text in texts]
        return self.messages[-1]

    def show(self, role: str, part: dict[str, Any]) -> None:
        """Adds a picture or film to this role's message."""
        self.say(role)["content"].append(part)

    def think(self, text: str) -> None:
        """Adds a thought to the assistant's present message."""
        message = self.say("assistant")
        message["reasoning"] = "\n\n".join(filter(None, [message.get("reasoning"), text]))

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        """Adds a tool call to the assistant's present message; the arguments may be broken."""
        calls = self.say("assistant").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def answer(self, call_id: str, content: str | dict[str, str] | list[dict[str, Any]]) -> None:
        """Adds a tool's answer, of parts where it shows something; its call may have been trimmed."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
