"""What a client of Anthropic's Messages API sends, and the conversation it stands for.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dgemma.serve.bodies import Body, Count, Listed, RequestBody, SamplerFields, StopString, Temperature, TopK, TopP
from dgemma.serve.calling import told_tools
from dgemma.serve.errors import ApiError
from dgemma.serve.turns import Turns


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """What the model thought in an earlier reply; it is shown again only within the turn it belongs to."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """Accepted and left out: nobody here can read it."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    """``input`` is an object; whatever else it is, the conversation goes on."""

    type: Literal["tool_use"]
    id: str
    name: Annotated[str, Field(min_length=1)]
    input: Any = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Listed[TextBlock] | None = None
    is_error: bool | None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock,
                           Field(discriminator="type")]


class UserMessage(Body):
    role: Literal["user"]
    content: str | Listed[UserBlock]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | Listed[AssistantBlock] | None = None


class SystemMessage(Body):
    role: Literal["system"]
    content: str | Listed[TextBlock]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class CustomTool(Body):
    """A tool that the client runs. Anthropic's own server tools do not exist here.

    With ``strict`` the input of every call satisfies ``input_schema``.
    """

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingEnabled(Body):
    """``budget_tokens``: the most tokens to think, marks included; a thought that would have more is closed there."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Body):
    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Body):
    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """``effort`` is accepted and changes nothing."""

    format: OutputFormat | None = None


class Metadata(Body):
    user_id: str | None = None


class CountBody(RequestBody):
    """What a prompt is made of."""

    model: str
    messages: Annotated[Listed[Message], Field(min_length=1)]
    system: str | Listed[TextBlock] | None = None
    tools: Listed[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody, SamplerFields):
    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[Listed[StopString], Field(max_length=16)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: Metadata | None = None
    output_config: OutputConfig | None = None


def conversation(body: CountBody) -> list[dict[str, Any]]:
    """The messages as chat templates know them: thoughts and tool calls beside what was said, results by themselves.

    Neighbours of the same role become one message. Raises `ApiError` naming the field that cannot be read.
    """
    turns = Turns()
    if body.system:
        turns.say("system", _texts(body.system))
    for message in body.messages:
        if message.content is None or isinstance(message.content, str):
            turns.say(message.role, [message.content or ""])
            continue
        for block in message.content:
            if isinstance(block, TextBlock):
                turns.say(message.role, [block.text])
            elif isinstance(block, ThinkingBlock):
                turns.think(block.thinking)
            elif isinstance(block, ToolUseBlock):
                turns.call(block.id, block.name, block.input)
            elif isinstance(block, ToolResultBlock):
                turns.answer(block.tool_use_id, _result(block))
    if body.messages[-1].role == "assistant":
        raise _refusal(f"messages[{len(body.messages) - 1}].role",
                       "the last message must be the user's: the beginning of an answer cannot be given")
    return turns.messages


def declared_tools(body: CountBody) -> list[dict[str, Any]] | None:
    """The tools that the model is told of: none when it must not call any."""
    return told_tools([{"type": "function", "function": {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}}
        for tool in body.tools or ()], body.tool_choice)


def _refusal(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field}: {why}", field)  # Anthropic's errors name the field in the message only


def _texts(content: str | list[TextBlock] | None) -> list[str]:
    return [content] if isinstance(content, str) else [block.text for block in content or ()]


def _result(block: ToolResultBlock) -> str | dict[str, str]:
    text = "\n".join(_texts(block.content))
    return {"error": text} if block.is_error else text
