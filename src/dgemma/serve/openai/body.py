"""What clients of OpenAI's chat and text completions send, with what vLLM's clients add, and what it means here.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Field

from dgemma.serve.bodies import SEEN, Body, Listed, Whole, media_part, named_file, refuse_media
from dgemma.serve.errors import ApiError
from dgemma.serve.fields import AnswerFields, ProbabilityFields
from dgemma.serve.settings import Settings

MAX_CHOICES = 128  # answers to one request
MIDDLE = 16  # tokens between a prompt and its suffix where max_tokens does not say: OpenAI's default

TokenId = Annotated[Whole, Field(ge=0, lt=2**31)]
Prompts = (str | Annotated[Listed[str], Field(min_length=1)] | Annotated[Listed[TokenId], Field(min_length=1)]
           | Annotated[Listed[Annotated[Listed[TokenId], Field(min_length=1)]], Field(min_length=1)])


class StreamOptions(Body):
    """``include_drafts`` adds chunks without choices, each with a draft of the open canvas under ``dgemma``.

    ``candidates``: drafts tell so many of the most probable tokens at every place.
    """

    include_usage: bool | None = None
    include_drafts: bool | None = None
    drafts_per_second: Annotated[float, Field(gt=0, le=100)] = 10.0
    candidates: Annotated[Whole, Field(ge=0, le=20)] = 0


class CompletionFields(AnswerFields):
    """What both kinds of completion take."""

    model: Annotated[str | None, Field(description="A name under which the model is served.")] = None
    stream_options: StreamOptions | None = None

    @property
    def drafts_per_second(self) -> float:
        options = self.stream_options
        return options.drafts_per_second if options is not None and options.include_drafts else 0.0

    def ask_options(self) -> dict[str, Any]:
        wanted = self.stream_options.candidates if self.stream_options is not None and self.drafts_per_second else 0
        return {**super().ask_options(), "candidates": wanted}

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Message(Body):
    """A message of the conversation; other fields, such as reasoning_content, are passed on to the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Listed[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """With ``strict`` the arguments of every call satisfy ``parameters``."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class ChatBody(CompletionFields, ProbabilityFields):
    """POST /v1/chat/completions."""

    messages: Annotated[Listed[Message], Field(min_length=1)]
    tools: Listed[Tool] | None = None
    canvas: Annotated[str | Listed[Any] | None, Field(
        description="What the answer starts from: parts (text that stays, {text, pinned: false}, {blank: tokens}, "
                    "{end: true}), or token ids and nulls.")] = None
    pinned: Annotated[Listed[bool] | None, Field(description="Which of the canvas' token ids stay.")] = None
    prefix: Annotated[str | Listed[TokenId] | None, Field(
        description="What the answer has said before the canvas; it is not told again.")] = None
    from_step: Annotated[Whole | None, Field(ge=0, description="Denoising steps that the canvas has behind it.")] = None

    def ask_options(self) -> dict[str, Any]:
        return {**super().ask_options(), "canvas": self.canvas, "pinned": self.pinned, "prefix": self.prefix,
                "from_step": self.from_step or 0}

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages as the library reads them. Raises `ApiError` for a part that cannot be read."""
        messages = []
        for index, message in enumerate(self.messages or ()):
            said = message.model_dump(exclude_unset=True)
            if isinstance(message.content, list):
                where = f"messages[{index}].content"
                refuse_media(message.content, where, seen=message.role in ("user", "tool"))
                said["content"] = [_part(part, f"{where}[{place}]") for place, part in enumerate(message.content)]
            messages.append(said)
        return messages

    def declared_tools(self) -> list[dict[str, Any]] | None:
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()] or None


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    """A part of a message as the library reads it, a file of text as text. Raises `ApiError`."""
    kind = part.get("type")
    if not isinstance(kind, str):
        return part
    if kind in SEEN:
        return media_part(part, where)
    if kind in ("file", "input_file"):
        file = part.get("file") if isinstance(part.get("file"), dict) else part
        assert isinstance(file, dict)
        return {"type": "text", "text": named_file(file.get("filename"), file.get("file_data"), where)}
    return part


class TokenizeBody(ChatBody):
    """Either ``prompt`` or ``messages``. ``add_special_tokens`` is about the first, the rest about the second."""

    is_known = False

    messages: Annotated[Listed[Message], Field(min_length=1)] | None = None  # pyright: ignore
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class CompletionBody(CompletionFields):
    """POST /v1/completions: the prompt goes to the model as it is, without a chat template.

    ``add_special_tokens`` puts the vocabulary's first token (<bos>) before a prompt of text that does not begin so.
    With ``suffix`` the answer is what stands between it and the prompt.
    """

    prompt_param = "prompt"

    prompt: Prompts
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True

    def check(self, http: HttpRequest, settings: Settings) -> None:
        super().check(http, settings)
        thinking, param = self.thinking_switch()
        if thinking:
            raise ApiError(400, f"{param} needs a chat template, and a prompt is taken as it is: ask "
                           "/v1/chat/completions", param, "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "log-probabilities of the prompt are not supported: ask for logprobs or for echo",
                           "echo", "unsupported_parameter")
        if len(self.prompts()) * (self.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"at most {MAX_CHOICES} answers can be made at a time", "prompt")

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def ask_options(self) -> dict[str, Any]:
        return {**super().ask_options(), "tools": []}  # nothing that is said is a call

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
