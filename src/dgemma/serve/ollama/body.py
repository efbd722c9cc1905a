"""What clients of Ollama's API send, and what it means here.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Field, model_validator

from dgemma.serve.bodies import Body, Listed, RequestBody, Whole, media
from dgemma.serve.errors import ApiError
from dgemma.serve.fields import AnswerFields, ProbabilityFields
from dgemma.serve.openai.body import Function
from dgemma.serve.settings import Settings

Number = Annotated[float, Field(allow_inf_nan=False)]


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any] | str | None = None


class ToolCall(Body):
    """A call that the model made earlier."""

    function: CalledFunction
    id: str | None = None


class Message(Body):
    """A message; the answer of a tool says whose it is by ``tool_name``, or by the ``tool_call_id`` of the call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Listed[str] | None = None
    tool_calls: Listed[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaBody(ProbabilityFields):
    """What chat and generate have in common. ``stream`` is on unless it is false.

    ``options`` may say what the body itself may: sampling, length, stop strings, the checkpoint's sampler settings.
    """

    is_known = False

    model: str
    options: dict[str, Any] | None = None
    num_predict: Annotated[Whole, Field(ge=-(2**63), description="Tokens; below 1: no limit.")] | None = None
    keep_alive: Number | str | None = None  # how long an idle model stays in memory; here it always does

    @model_validator(mode="before")
    @classmethod
    def _with_options(cls, body: Any) -> Any:
        options = body.get("options") if isinstance(body, dict) else None
        if not isinstance(options, dict):
            return body
        own = body.keys() - AnswerFields.model_fields.keys()
        return body | {name: value for name, value in options.items() if name not in own}

    def declared_tools(self) -> list[dict[str, Any]] | None:
        return None

    @property
    def unloads(self) -> bool:
        """Whether a request without a prompt asks for the model to be let go rather than made ready."""
        return self.keep_alive in (0, "0", "0s", "0m")


class ChatBody(OllamaBody):
    """POST /api/chat."""

    messages: Listed[Message] | None = None
    tools: Listed[Tool] | None = None

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them: calls get names of their own, by which their answers find them."""
        messages: list[dict[str, Any]] = []
        unanswered: list[tuple[str, str]] = []  # ids and names of calls
        for index, message in enumerate(self.messages or ()):
            said: dict[str, Any] = {"role": message.role, "content": _content(
                message.content, message.images, f"messages[{index}].images")}
            if message.thinking:
                said["reasoning"] = message.thinking
            if message.tool_calls:
                calls = [(call.id or f"call_{index}_{place}", call.function)
                         for place, call in enumerate(message.tool_calls)]
                unanswered = [(name, function.name) for name, function in calls]
                said["tool_calls"] = [{"id": name, "type": "function", "function": {
                    "name": function.name, "arguments": {} if function.arguments is None else function.arguments}}
                    for name, function in calls]
            if message.role == "tool":
                call = _answered(message, unanswered)
                if call in unanswered:
                    unanswered.remove(call)
                said |= {"tool_call_id": call[0], "name": call[1]}
            messages.append(said)
        return messages

    def declared_tools(self) -> list[dict[str, Any]] | None:
        kept = {"name", "description", "parameters", "strict"}
        return [{"type": "function", "function": tool.function.model_dump(include=kept, exclude_none=True)}
                for tool in self.tools or ()] or None


def _answered(message: Message, unanswered: list[tuple[str, str]]) -> tuple[str, str]:
    """The call (id, name of the tool) that a tool's answer belongs to: the one it names, or else the first open one."""
    for place, wanted in ((0, message.tool_call_id), (1, message.tool_name)):
        for call in unanswered:
            if wanted and call[place] == wanted:
                return call
    if unanswered and not message.tool_name:
        return unanswered[0]
    return message.tool_call_id or "call", message.tool_name or "tool"


class GenerateBody(OllamaBody):
    """POST /api/generate: a prompt through the chat template, or with ``raw`` as it is."""

    prompt_param = "prompt"

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: Listed[int] | None = None
    images: Listed[str] | None = None

    def check(self, http: HttpRequest, settings: Settings) -> None:
        super().check(http, settings)
        for name, instead in (("suffix", "ask /v1/completions for text between two others"),
                              ("template", "the checkpoint's own template is used; for none at all set raw: true"),
                              ("context", "use /api/chat and send the conversation")):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported here: {instead}", name, "unsupported_parameter")
        if self.raw:
            thinks, param = self.thinking_switch()
            for name in (*(["system"] if self.system else ()), *(["images"] if self.images else ()),
                         *([param] if thinks else ())):
                raise ApiError(400, f"{name} needs a chat template, and raw: true takes the prompt as it is", name)

    def prompt_messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": _content(self.prompt, self.images, "images")}]


class ShowBody(RequestBody):
    """POST /api/show; ``name`` is what older clients call ``model``."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def _content(text: str | None, images: list[str] | None, field: str) -> str | list[dict[str, Any]]:
    """What a message says, behind the pictures it shows; these are base64."""
    shown = [media("image", image if image.startswith("data:") else f"data:;base64,{image}", f"{field}[{place}]")
             for place, image in enumerate(images or ())]
    return [*shown, {"type": "text", "text": text or ""}] if shown else text or ""
