"""What a client of Anthropic's Messages API sends, and the conversation it stands for.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Field, model_validator

from dgemma.serve.bodies import Body, Length, Listed, Turns, file_text, media, refuse_media, titled
from dgemma.serve.errors import ApiError
from dgemma.serve.fields import ConversationFields, function_tool
from dgemma.serve.settings import Settings


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


class DocumentBlock(Body):
    """A document of plain text: ``source`` is {"type": "text", "data": …}, {"type": "content", "content": …} or
    {"type": "base64", "media_type": "text/plain", "data": …}.
    """

    type: Literal["document"]
    source: dict[str, Any]
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Body):
    """What a search found."""

    type: Literal["search_result"]
    source: str
    title: str
    content: Listed[TextBlock]


class ImageBlock(Body):
    """A picture: ``source`` is {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}."""

    type: Literal["image"]
    source: dict[str, Any]


ReadBlock = TextBlock | DocumentBlock | SearchResultBlock
ResultBlock = Annotated[ReadBlock | ImageBlock, Field(discriminator="type")]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Listed[ResultBlock] | None = None
    is_error: bool | None = None


UserBlock = Annotated[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolResultBlock,
                      Field(discriminator="type")]
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


class Metadata(Body):
    user_id: str | None = None


class MessagesBody(ConversationFields):
    """POST /v1/messages."""

    model: str
    messages: Annotated[Listed[Message], Field(min_length=1)]
    system: str | Listed[TextBlock] | None = None
    tools: Listed[CustomTool] | None = None
    max_tokens: Length  # pyright: ignore[reportGeneralTypeIssues]  # elsewhere it may be left out
    metadata: Metadata | None = None
    thread: Annotated[Any, Field(description="Conversations are not stored here; clients send them whole then.")] = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, body: Any) -> Any:
        messages = body.get("messages") if isinstance(body, dict) else None
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict):
                refuse_media(message.get("content"), f"messages[{index}].content", seen=message.get("role") == "user",
                             within=True)
        return body

    def check(self, http: HttpRequest, settings: Settings) -> None:
        super().check(http, settings)
        if self.thread:
            # In these words its SDK reads that it must send the whole conversation, and does.
            raise ApiError(400, "thread: conversations are not stored here: send the whole conversation without it",
                           "thread", details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]})
        self.one_answer()
        if self.messages[-1].role == "assistant":
            field = f"messages[{len(self.messages) - 1}].role"
            raise ApiError(400, f"{field}: the last message must be the user's: the beginning of an answer cannot be "
                           "given", field)

    def named_user(self) -> str | None:
        return (self.metadata and self.metadata.user_id) or super().named_user()

    def declared_tools(self) -> list[dict[str, Any]] | None:
        return [function_tool(tool.name, tool.description, tool.input_schema, tool.strict)
                for tool in self.tools or () if isinstance(tool, CustomTool)] or None

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them: thoughts and calls beside what was said, results by themselves.

        Neighbours of the same role become one message. Raises `ApiError` naming the field that cannot be read.
        """
        turns = Turns()
        if self.system:
            turns.say("system", _texts(self.system))
        for index, message in enumerate(self.messages):
            if message.content is None or isinstance(message.content, str):
                turns.say(message.role, [message.content or ""])
                continue
            for place, block in enumerate(message.content):
                if isinstance(block, TextBlock):
                    turns.say(message.role, [block.text])
                elif isinstance(block, ImageBlock):
                    turns.show(message.role, _picture(block, f"messages[{index}].content[{place}]"))
                elif isinstance(block, ThinkingBlock):
                    turns.think(block.thinking)
                elif isinstance(block, ToolUseBlock):
                    turns.call(block.id, block.name, block.input)
                elif isinstance(block, DocumentBlock | SearchResultBlock):
                    turns.say(message.role, [_read(block, f"messages[{index}].content[{place}]")])
                elif isinstance(block, ToolResultBlock):
                    turns.answer(block.tool_use_id, _result(block, f"messages[{index}].content[{place}].content"))
        return turns.messages


class CountBody(MessagesBody):
    """POST /v1/messages/count_tokens: nothing is made, so nothing is refused for what cannot be made.

    Of tools that a client does not run itself the model would not be told: they count nothing.
    """

    is_known = False

    max_tokens: Length | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    tools: Listed[CustomTool | dict[str, Any]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


def _texts(content: str | list[TextBlock] | None) -> list[str]:
    return [content] if isinstance(content, str) else [block.text for block in content or ()]


def _picture(block: ImageBlock, where: str) -> dict[str, Any]:
    source, where = block.source, f"{where}.source"
    if source.get("type") == "base64" and isinstance(source.get("data"), str):
        return media("image", f"data:;base64,{source['data']}", where)
    if source.get("type") == "url" and isinstance(source.get("url"), str):
        return media("image", source["url"], where)
    raise ApiError(400, f"{where}: a picture must be {{'type': 'base64', 'media_type': 'image/png', 'data': …}} or "
                   "{'type': 'url', 'url': …}; files are not stored here", where)


def _result(block: ToolResultBlock, where: str) -> str | dict[str, str] | list[dict[str, Any]]:
    content = [TextBlock(type="text", text=block.content)] if isinstance(block.content, str) else block.content or ()
    if any(isinstance(part, ImageBlock) for part in content):
        said = [{"type": "text", "text": "error"}] if block.is_error else []
        return said + [_picture(part, f"{where}[{place}]") if isinstance(part, ImageBlock)
                       else {"type": "text", "text": _read(part, f"{where}[{place}]")}
                       for place, part in enumerate(content)]
    text = "\n".join(_read(part, f"{where}[{place}]") for place, part in enumerate(content)
                     if not isinstance(part, ImageBlock))
    return {"error": text} if block.is_error else text


def _read(block: ReadBlock, where: str) -> str:
    """The text of a block that is there to be read."""
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, SearchResultBlock):
        return titled(f"{block.title} ({block.source})", "\n".join(_texts(block.content)))
    source, where = block.source, f"{where}.source"
    kind, data, content = source.get("type"), source.get("data"), source.get("content")
    if kind == "text" and isinstance(data, str):
        text = data
    elif kind == "base64" and isinstance(data, str) and isinstance(source.get("media_type"), str):
        text = file_text(data, source["media_type"], where)
    elif kind == "content" and isinstance(content, str):
        text = content
    elif kind == "content" and isinstance(content, list):
        refuse_media(content, f"{where}.content", within=True)
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        text = "\n".join(part for part in texts if isinstance(part, str))
    else:
        raise ApiError(400, f"{where}: a document must be plain text: {{'type': 'text', 'media_type': 'text/plain', "
                       "'data': …}; files and addresses are not fetched here", where)
    return titled("\n".join(filter(None, [block.title, block.context])), text)
