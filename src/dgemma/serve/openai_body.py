"""What clients of OpenAI's chat and text completions send, with what vLLM's clients add, and what it means here.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from dgemma.serve.bodies import (
    Body,
    Count,
    Listed,
    LogitBias,
    SamplerFields,
    Stop,
    Temperature,
    TopK,
    TopP,
    refuse_unsupported,
)
from dgemma.serve.calling import ChosenTools, Words, told_tools
from dgemma.serve.errors import ApiError

MAX_CHOICES = 128  # answers to one request
_MEDIA = {"image", "image_url", "input_image", "input_audio", "audio", "audio_url", "video", "video_url", "file",
          "input_file"}

Penalty = Annotated[float, Field(ge=-2, le=2, description="Only 0 can be honoured.")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Prompts = (str | Annotated[Listed[str], Field(min_length=1)] | Annotated[Listed[TokenId], Field(min_length=1)]
           | Annotated[Listed[Annotated[Listed[TokenId], Field(min_length=1)]], Field(min_length=1)])


class StreamOptions(Body):
    """``include_drafts`` adds chunks without choices, each with a draft of the open canvas under ``dgemma``."""

    include_usage: bool | None = None
    include_drafts: bool | None = None
    drafts_per_second: Annotated[float, Field(gt=0, le=100)] = 10.0


class JsonSchema(Body):
    """A named JSON schema."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer; regex and choice are not OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choice: Listed[str] | None = None


class StructuredOutputs(Body):
    """vLLM's spelling of the answer's form."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Listed[str] | None = None
    json_object: bool | None = None


class CompletionFields(SamplerFields):
    """What both kinds of completion take."""

    model: Annotated[str | None, Field(description="A name under which the model is served.")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_tokens: Count | None = None
    logit_bias: LogitBias | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Listed[str] | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises `ApiError` naming a field that contradicts another or cannot be honoured."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported here: leave it out, or send 0", name,
                               "unsupported_parameter")
        refuse_unsupported(self)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")

    @property
    def drafts_per_second(self) -> float:
        options = self.stream_options
        return options.drafts_per_second if options is not None and options.include_drafts else 0.0

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


class Thinking(Body):
    """Anthropic's and DeepSeek's spelling of the switch."""

    type: Literal["enabled", "disabled"]


class ChatBody(CompletionFields):
    """POST /v1/chat/completions."""

    messages: Annotated[Listed[Message], Field(min_length=1)]
    tools: Listed[Tool] | None = None
    tool_choice: Words | ChosenTools | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking: bool | Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        for index, message in enumerate(self.messages):
            for part in message.content if isinstance(message.content, list) else ():
                kind = part.get("type")
                if isinstance(kind, str) and kind in _MEDIA:
                    raise ApiError(400, f"this server reads text only: {kind} parts are not supported yet",
                                   f"messages[{index}].content")

    def conversation(self) -> list[dict[str, Any]]:
        return [message.model_dump(exclude_unset=True) for message in self.messages]

    def declared_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of: none when it must not call any."""
        return told_tools([tool.model_dump(exclude_unset=True) for tool in self.tools or ()], self.tool_choice)

    def length_limit(self) -> tuple[int | None, str]:
        """The most tokens to answer with, and the field that says so."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def wants_thinking(self) -> bool:
        """Whether the model shall think first: any one of the spellings may say so, the plainest wins."""
        if isinstance(self.thinking, bool):
            return self.thinking
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        for name, value in (self.chat_template_kwargs or {}).items():
            if name not in ("enable_thinking", "thinking") or not isinstance(value, bool):
                raise ApiError(400, "chat_template_kwargs takes enable_thinking: true or false, and nothing else",
                               "chat_template_kwargs", "unsupported_parameter")
        if self.chat_template_kwargs:
            return any(self.chat_template_kwargs.values())
        return self.reasoning_effort not in (None, "none", "minimal")


class CompletionBody(CompletionFields):
    """POST /v1/completions: the prompt goes to the model as it is, without a chat template.

    ``add_special_tokens`` puts the vocabulary's first token (<bos>) before a prompt of text that does not begin so.
    """

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "log-probabilities of the prompt are not supported: ask for logprobs or for echo",
                           "echo", "unsupported_parameter")
        if len(self.prompts()) * (self.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"at most {MAX_CHOICES} answers can be made at a time", "prompt")

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def answer_format(body: CompletionFields) -> tuple[dict[str, Any] | None, str]:
    """The form that the answer must have, as `Model.request` knows it, and the field that says so."""
    wanted: list[tuple[dict[str, Any], str]] = []
    if body.response_format is not None and body.response_format.type != "text":
        wanted.append((_response_format(body.response_format), "response_format"))
    for name, value in (("json", body.guided_json), ("regex", body.guided_regex), ("choice", body.guided_choice)):
        if value is not None:
            wanted.append((_guided(name, value, f"guided_{name}"), f"guided_{name}"))
    if (outputs := body.structured_outputs) is not None:
        for name, value in (outputs.model_extra or {}).items():
            if value is None or value is False:
                continue
            raise ApiError(400, f"structured_outputs takes json, regex, choice or json_object, not {name!r}",
                           "structured_outputs", "unsupported_parameter")
        for name, value in (("json", outputs.json_), ("regex", outputs.regex), ("choice", outputs.choice),
                            ("json_object", outputs.json_object or None)):
            if value is not None:
                wanted.append((_guided(name, value, "structured_outputs"), "structured_outputs"))
    if len(wanted) > 1:
        raise ApiError(400, f"the answer can have one form only, and {wanted[0][1]} names another", wanted[1][1])
    return wanted[0] if wanted else (None, "response_format")


def _response_format(asked: ResponseFormat) -> dict[str, Any]:
    form = asked.model_dump(by_alias=True, exclude_none=True)
    if asked.type == "json_object" and "schema" in form:  # llama.cpp's way to say json_schema
        return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    return form


def _guided(name: str, value: Any, param: str) -> dict[str, Any]:
    if name == "json_object":
        return {"type": "json_object"}
    if name != "json":
        return {"type": name, name: value}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the schema is not valid JSON: {error}", param) from error
    if not isinstance(value, dict):
        raise ApiError(400, "a JSON schema is a JSON object", param)
    return {"type": "json_schema", "json_schema": {"schema": value}}
