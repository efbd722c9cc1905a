"""What clients of Ollama's API send, and what it means here.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dgemma.serve.bodies import Listed, RequestBody, SamplerFields, Seed, Stop, Temperature, TopK, TopP, Whole
from dgemma.serve.errors import ApiError

Number = Annotated[float, Field(allow_inf_nan=False)]


class Options(SamplerFields):
    """What is drawn and for how long; the checkpoint's sampler settings go here, too.

    Options of Ollama's runners (num_ctx, num_gpu, …) are accepted and change nothing; other samplers' are told of.
    """

    seed: Seed | None = None  # below 0: any
    num_predict: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    stop: Stop | None = None

    @property
    def max_tokens(self) -> int | None:
        """The most tokens to answer with; None, here any number below 1: as many as there is room for."""
        return self.num_predict if self.num_predict is not None and self.num_predict > 0 else None

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))


class Function(RequestBody):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(RequestBody):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class CalledFunction(RequestBody):
    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any] | str | None = None


class ToolCall(RequestBody):
    """A call that the model made earlier."""

    function: CalledFunction
    id: str | None = None


class Message(RequestBody):
    """A message; the answer of a tool says whose it is by ``tool_name``, or by the ``tool_call_id`` of the call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Listed[Any] | None = None
    tool_calls: Listed[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaBody(RequestBody):
    """What chat and generate have in common. ``stream`` is on unless it is false."""

    model: str
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | str | None = None
    keep_alive: Number | str | None = None  # how long an idle model stays in memory; here it always does
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    def form(self) -> dict[str, Any] | None:
        """The form of the answer, as `Model.request` knows it."""
        if self.format is None or self.format == "":
            return None
        if self.format == "json":
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"schema": self.format}}

    def thinks(self) -> bool:
        """Whether the model shall think first: true, or a level such as "low"."""
        if isinstance(self.think, str):
            return self.think.lower() not in ("", "false", "none", "off")
        return bool(self.think)

    def wanted_logprobs(self) -> int | None:
        """How many alternatives beside each token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def unloads(self) -> bool:
        """Whether a request without a prompt asks for the model to be let go rather than made ready."""
        return self.keep_alive in (0, "0", "0s", "0m")


class ChatBody(OllamaBody):
    """POST /api/chat."""

    messages: Listed[Message] | None = None
    tools: Listed[Tool] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them: calls get names of their own, by which their answers find them."""
        messages: list[dict[str, Any]] = []
        unanswered: list[tuple[str, str]] = []  # ids and names of calls
        for index, message in enumerate(self.messages or ()):
            refuse_images(message.images, f"messages[{index}].images")
            said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
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
        return [{"type": "function", "function": tool.function.model_dump(include={"name", "description", "parameters"},
                                                                          exclude_none=True)}
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

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: Listed[int] | None = None
    images: Listed[Any] | None = None

    def check(self) -> None:
        """Raises `ApiError` naming a field that would change the answer and cannot be honoured."""
        refuse_images(self.images, "images")
        for name, instead in (("suffix", "text cannot be filled in between two others here"),
                              ("template", "the checkpoint's own template is used; for none at all set raw: true"),
                              ("context", "use /api/chat and send the conversation")):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported here: {instead}", name, "unsupported_parameter")

    def conversation(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt or ""}]


class ShowBody(RequestBody):
    """POST /api/show; ``name`` is what older clients call ``model``."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def refuse_images(images: list[Any] | None, field: str) -> None:
    if images:
        raise ApiError(400, "this server reads text only: images are not supported yet", field)

