"""What a client of OpenAI's Responses API sends, and the conversation it stands for.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Discriminator, Field, Tag, model_validator

from dgemma.serve.bodies import Body, Listed, Turns, Whole, media_part, named_file, refuse_media
from dgemma.serve.errors import ApiError
from dgemma.serve.fields import ConversationFields, function_tool
from dgemma.serve.forms import Form
from dgemma.serve.openai.body import Function
from dgemma.serve.settings import Settings


class InputText(Body):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str


class InputFile(Body):
    """A file of plain text: a data URL in ``file_data``."""

    type: Literal["input_file"]
    file_data: str | None = None
    filename: str | None = None


class InputImage(Body):
    """A picture: a data URL, or an address that the server may fetch from. ``detail`` is low, high or auto."""

    type: Literal["input_image"]
    image_url: str | None = None
    detail: str | None = None


Part = Annotated[InputText | Refusal | InputFile | InputImage, Field(discriminator="type")]


class MessageItem(Body):
    """A message; its type may be left out, and the assistant may have said nothing."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Listed[Part] | None = None


class FunctionCallItem(Body):
    """``arguments`` are JSON text; whatever else they are, the conversation goes on."""

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: Any = None


class FunctionCallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Listed[Part] | None = None


class ReasoningItem(Body):
    """What the model thought in an earlier answer; it is shown again only within the turn it belongs to."""

    type: Literal["reasoning"]
    summary: Listed[InputText] | None = None
    content: Listed[InputText] | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")] | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind)]


class FunctionTool(Function):
    """A function that the client runs. OpenAI's own tools do not exist here.

    With ``strict`` the arguments of every call satisfy ``parameters``.
    """

    type: Literal["function"]


class ResponsesBody(ConversationFields):
    """POST /v1/responses."""

    prompt_param = "input"

    model: str
    input: str | Listed[Item]
    instructions: str | None = None
    tools: Listed[FunctionTool] | None = None
    logprobs: bool | Annotated[Whole, Field(ge=0, le=20)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    include: Listed[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, body: Any) -> Any:
        items = body.get("input") if isinstance(body, dict) else None
        for index, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict):
                refuse_media(item.get("content"), f"input[{index}].content", seen=item.get("role") == "user")
                refuse_media(item.get("output"), f"input[{index}].output", seen=True)
        return body

    def declared_tools(self) -> list[dict[str, Any]] | None:
        return [function_tool(tool.name, tool.description, tool.parameters, tool.strict)
                for tool in self.tools or ()] or None

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None:
            return self.top_logprobs
        if isinstance(self.logprobs, bool) or self.logprobs is None:
            return 0 if self.logprobs or _LOGPROBS in (self.include or ()) else None
        return self.logprobs

    def check(self, http: HttpRequest, settings: Settings) -> None:
        super().check(http, settings)
        unkept = "answers are not stored here: send the whole conversation as input"
        for name, reason in (("previous_response_id", unkept), ("conversation", unkept),
                             ("prompt", "prompt templates are not stored here: send instructions and input"),
                             ("background", "answers are not stored here, so none can be made in the background")):
            if getattr(self, name):
                raise ApiError(400, reason, name)
        self.one_answer()

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The input as chat templates know it: all that the assistant said in a row is one message.

        Raises `ApiError` naming the field that cannot be read.
        """
        turns = Turns()
        if self.instructions:
            turns.say("system", [self.instructions])
        if isinstance(self.input, str):
            turns.say("user", [self.input])
            return turns.messages
        for index, item in enumerate(self.input):
            if isinstance(item, MessageItem):
                if item.content is None and item.role != "assistant":
                    raise ApiError(400, "content is missing", f"input[{index}].content")
                role = "system" if item.role == "developer" else item.role
                turns.say(role)
                for part in _parts(item.content, f"input[{index}].content"):
                    turns.show(role, part)
            elif isinstance(item, ReasoningItem):
                turns.think("\n\n".join(part.text for part in item.content or item.summary or ()))
            elif isinstance(item, FunctionCallItem):
                turns.call(item.call_id, item.name, item.arguments)
            else:
                turns.answer(item.call_id, _parts(item.output, f"input[{index}].output"))
        if not turns.messages:
            raise ApiError(400, "there is nothing to answer", "input")
        return turns.messages


_LOGPROBS = "message.output_text.logprobs"  # what `include` calls them


def response_format(form: Form | None) -> dict[str, Any]:
    """A form as this API writes it under ``text.format``."""
    if form is None:
        return {"type": "text"}
    if form["type"] != "json_schema":
        return dict(form)
    return {"type": "json_schema", "name": "response", "strict": True, "schema": form["json_schema"]["schema"]}


def _parts(content: str | list[Part] | None, where: str) -> list[dict[str, Any]]:
    """What is said or shown, as the library reads it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(part, f"{where}[{place}]") for place, part in enumerate(content or ())]


def _part(part: Part, where: str) -> dict[str, Any]:
    if isinstance(part, InputImage):
        return media_part(part.model_dump(), where)
    if isinstance(part, InputText):
        return {"type": "text", "text": part.text}
    return {"type": "text", "text": part.refusal if isinstance(part, Refusal) else named_file(
        part.filename, part.file_data, where)}
