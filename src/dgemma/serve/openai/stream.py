"""Answers as OpenAI's chat completions and text completions, whole or as the chunks of a stream.

Works on: the pieces of `deltas`. Knows nothing of: HTTP, requests.
"""

from __future__ import annotations

import codecs
import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from dgemma import __version__
from dgemma.serve.deltas import Answer, AnswerUsage, Delta, Done, Draft, Reasoning, Text, ToolCall, put_together
from dgemma.serve.respond import Made, Rendering


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens. The stop token that ends an answer is not counted; thoughts and tool calls are."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    denoising_steps: int


class Completion(BaseModel):
    """What chat completions and text completions have in common; ``seed`` makes the first choice again."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    seed: int
    usage: Usage


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: str
    function: CalledFunction


class AnswerMessage(BaseModel):
    """``reasoning_content`` and ``reasoning`` are the same: clients look for the one or the other."""

    role: str
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """``stop_reason``: the stop string that ended the answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | None


class ChatCompletion(Completion):
    """An answer of POST /v1/chat/completions."""

    choices: list[ChatChoice]


class TextChoice(BaseModel):
    index: int
    text: str
    reasoning: str | None = None
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | None


class TextCompletion(Completion):
    """An answer of POST /v1/completions."""

    choices: list[TextChoice]


class ChatRendering(Rendering):
    """Chunks and whole answers of chat completions.

    ``seeds`` and ``prompts``: of each choice its seed and the index of its prompt. With ``usage`` every chunk has
    that field, and a last one tells it. ``echo``: texts that the choices begin with. ``logprobs``: whether they were
    asked for; an answer without text has an empty list of them.
    """

    kind, prefix = "chat.completion", "chatcmpl"
    chunk_kind = "chat.completion.chunk"
    ending = b"data: [DONE]\n\n"

    def __init__(self, model: str, seeds: Sequence[int], *, prompts: Sequence[int] | None = None,
                 usage: bool = False, echo: Sequence[str] = (), logprobs: bool = False):
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
                     "system_fingerprint": f"dgemma-{__version__}", "seed": seeds[0]}
        self.prompts = list(prompts) if prompts is not None else [0] * len(seeds)
        self.with_usage, self.echo = usage, echo
        self.with_logprobs = logprobs
        self._counts: list[AnswerUsage | None] = [None] * len(seeds)  # of each choice whose stream is complete
        self._told_logprobs = [not logprobs] * len(seeds)  # of each choice: whether there is nothing left to tell

    def whole(self, answers: Sequence[Sequence[Delta]]) -> Made:
        put = [put_together(pieces) for pieces in answers]
        return {**self.head, "object": self.kind,
                "choices": [self.choice(index, answer) for index, answer in enumerate(put)],
                "usage": self.usage([answer.done.usage for answer in put])}

    def start(self) -> Iterator[Made]:
        for index in range(len(self.prompts)):
            for choice in self.opening(index):
                yield self._chunk(choice)

    def feed(self, index: int, delta: Delta) -> Iterator[Made]:
        if isinstance(delta, Draft):
            yield {**self._chunk(), "dgemma": {"draft": {"index": index, **dataclasses.asdict(delta)}}}
            return
        if isinstance(delta, Done):
            self._counts[index] = delta.usage
        yield self._chunk(self.delta(index, delta))

    def end(self) -> Iterator[Made]:
        if self.with_usage:
            yield {**self._chunk(), "usage": self.usage([count for count in self._counts if count is not None])}

    def usage(self, counts: Sequence[AnswerUsage]) -> dict[str, Any]:
        """All choices' counts together; a prompt that several of them share counts once."""
        firsts = [self.prompts.index(prompt) for prompt in sorted(set(self.prompts))]
        prompt_tokens = sum(counts[first].prompt_tokens for first in firsts)
        completion_tokens = sum(count.completion_tokens for count in counts)
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(counts[first].cached_tokens for first in firsts)},
                "completion_tokens_details": {"reasoning_tokens": sum(count.reasoning_tokens for count in counts)},
                "denoising_steps": sum(count.denoising_steps for count in counts)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a choice begins with."""
        return [_delta(index, {"role": "assistant", "content": ""})]

    def delta(self, index: int, piece: Reasoning | Text | ToolCall | Done) -> dict[str, Any]:
        """A piece as an entry of ``choices``."""
        if isinstance(piece, Reasoning):
            return _delta(index, {"reasoning_content": piece.text, "reasoning": piece.text})
        if isinstance(piece, ToolCall):
            return _delta(index, {"tool_calls": [{"index": piece.index, **_call(piece)}]})
        if isinstance(piece, Done):
            return {**_delta(index, {}), "logprobs": self._last_logprobs(index),
                    "finish_reason": piece.finish_reason, "stop_reason": piece.stop_sequence}
        self._told_logprobs[index] = True
        return {**_delta(index, {"content": piece.text}), "logprobs": self.logprobs(piece.logprobs)}

    def logprobs(self, entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Log-probabilities as a choice shows them; of no text an empty list where they were asked for."""
        if entries is None and not self.with_logprobs:
            return None
        return {"content": entries or [], "refusal": None}

    def _last_logprobs(self, index: int) -> dict[str, Any] | None:
        """Those of a stream's last chunk: an empty list if no chunk before it had any."""
        return None if self._told_logprobs[index] else self.logprobs(None)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer as an entry of ``choices``."""
        message: dict[str, Any] = {
            "role": "assistant", "content": answer.text if answer.text or not answer.tool_calls else None,
            "refusal": None, "reasoning_content": answer.reasoning or None, "reasoning": answer.reasoning or None}
        if answer.tool_calls:
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
        return {"index": index, "message": message, "logprobs": self.logprobs(answer.logprobs),
                "finish_reason": answer.done.finish_reason, "stop_reason": answer.done.stop_sequence}

    def _chunk(self, *choices: dict[str, Any]) -> Made:
        chunk = {**self.head, "object": self.chunk_kind, "choices": list(choices)}
        return {**chunk, "usage": None} if self.with_usage else chunk


class TextRendering(ChatRendering):
    """Chunks and whole answers of text completions. What the model thinks stands beside the text."""

    kind, prefix = "text_completion", "cmpl"
    chunk_kind = "text_completion"

    def __init__(self, model: str, seeds: Sequence[int], **options: Any):
        super().__init__(model, seeds, **options)
        self._told = [0] * len(seeds)  # characters of each choice that were streamed

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [_text(index, self.echo[index])] if self.echo else []

    def delta(self, index: int, piece: Reasoning | Text | ToolCall | Done) -> dict[str, Any]:
        if isinstance(piece, Reasoning):
            return {**_text(index, ""), "reasoning": piece.text}
        if isinstance(piece, Done):
            return {**_text(index, ""), "logprobs": self._last_logprobs(index), "finish_reason": _text_reason(piece),
                    "stop_reason": piece.stop_sequence}
        text = _call_text(piece) if isinstance(piece, ToolCall) else piece.text
        entries = None if isinstance(piece, ToolCall) else piece.logprobs
        logprobs = None if entries is None else _text_logprobs(entries, self._told[index])
        self._told_logprobs[index] = self._told_logprobs[index] or logprobs is not None
        self._told[index] += len(text)
        return {**_text(index, text), "logprobs": logprobs}

    def logprobs(self, entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        return None if entries is None and not self.with_logprobs else _text_logprobs(entries or [])

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = (self.echo[index] if self.echo else "") + answer.text + "".join(map(_call_text, answer.tool_calls))
        logprobs = self.logprobs(answer.logprobs)
        return {"index": index, "text": text, "reasoning": answer.reasoning or None, "logprobs": logprobs,
                "finish_reason": _text_reason(answer.done), "stop_reason": answer.done.stop_sequence}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_text(call: ToolCall) -> str:
    """A call where nothing but text can stand."""
    return f"call:{call.name}{call.arguments}"


def _text_reason(done: Done) -> str:
    return "stop" if done.finish_reason == "tool_calls" else done.finish_reason


def _text_logprobs(entries: list[dict[str, Any]], start: int = 0) -> dict[str, Any]:
    """The form that OpenAI's text completions had: lists with one entry per token.

    Offsets count characters of the choice's text, ``start`` of which came before; a character that is spread over
    tokens begins with the first of them.
    """
    offsets, end, decoder = [], start, codecs.getincrementaldecoder("utf-8")("replace")
    for entry in entries:
        offsets.append(end)
        end += len(decoder.decode(bytes(entry["bytes"])))
    return {"tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets}
