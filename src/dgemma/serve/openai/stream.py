"""Answers as OpenAI's chat completions and text completions, whole or as the chunks of a stream.

Works on: the pieces of `deltas`. Knows nothing of: HTTP, requests.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from dgemma import __version__
from dgemma.chat.reply import Thought
from dgemma.serve.deltas import AnswerUsage, Delta, Done, Draft, Text, ToolCall, WholeAnswer, put_together
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
        self._told = [0] * len(seeds)  # characters of each text that were streamed
        self._told_logprobs = [not logprobs] * len(seeds)  # of each choice: whether there is nothing left to tell

    def whole(self, answers: Sequence[Sequence[Delta]]) -> Made:
        choices, counts = [], []
        for index, answer in enumerate(map(put_together, answers)):
            logprobs = self.logprobs(answer.logprobs or []) if self.with_logprobs else None
            choices.append(self._choice(index, self.shown(index, answer), logprobs, answer.done))
            counts.append(answer.done.usage)
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage(counts)}

    def start(self) -> Iterator[Made]:
        for index in range(len(self.prompts)):
            for begun in self.opening(index):
                yield self._chunk(self._choice(index, begun))

    def feed(self, index: int, delta: Delta) -> Iterator[Made]:
        if isinstance(delta, Draft):
            draft = {name: value for name, value in vars(delta).items() if value is not None}
            yield {**self._chunk(), "dgemma": {"draft": {"index": index, **draft}}}
            return
        said, logprobs = self.piece(delta), None
        if isinstance(delta, Text) and delta.logprobs is not None:
            logprobs = self.logprobs(delta.logprobs, self._told[index])
            self._told_logprobs[index] = True
        elif isinstance(delta, Done):
            self._counts[index] = delta.usage
            logprobs = None if self._told_logprobs[index] else self.logprobs([])  # no chunk before it had any
        self._told[index] += len(said.get("text", ""))
        yield self._chunk(self._choice(index, said, logprobs, delta if isinstance(delta, Done) else None))

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
        """What a choice begins with, as `piece`."""
        return [{"delta": {"role": "assistant", "content": ""}}]

    def piece(self, piece: Thought | Text | ToolCall | Done) -> dict[str, Any]:
        """What an entry of a chunk's ``choices`` says of a piece."""
        if isinstance(piece, Thought):
            return {"delta": {"reasoning_content": piece.text, "reasoning": piece.text}}
        if isinstance(piece, ToolCall):
            return {"delta": {"tool_calls": [{"index": piece.index, **_call(piece)}]}}
        return {"delta": {"content": piece.text} if isinstance(piece, Text) else {}}

    def shown(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        """What an entry of ``choices`` says of a whole answer."""
        message: dict[str, Any] = {
            "role": "assistant", "content": answer.text if answer.text or not answer.tool_calls else None,
            "refusal": None, "reasoning_content": answer.reasoning or None, "reasoning": answer.reasoning or None}
        if answer.tool_calls:
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
        return {"message": message}

    def logprobs(self, entries: list[dict[str, Any]], start: int = 0) -> dict[str, Any]:
        """Log-probabilities as a choice shows them, ``start`` characters of its text being told already."""
        return {"content": entries, "refusal": None}

    def reason(self, done: Done) -> str:
        """Why an answer is over."""
        return done.finish_reason

    def _choice(self, index: int, said: dict[str, Any], logprobs: dict[str, Any] | None = None,
                done: Done | None = None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": None}
        return choice if done is None else {
            **choice, "finish_reason": self.reason(done), "stop_reason": done.stop_sequence}

    def _chunk(self, *choices: dict[str, Any]) -> Made:
        chunk = {**self.head, "object": self.chunk_kind, "choices": list(choices)}
        return {**chunk, "usage": None} if self.with_usage else chunk


class TextRendering(ChatRendering):
    """Chunks and whole answers of text completions. What the model thinks stands beside the text."""

    kind, prefix = "text_completion", "cmpl"
    chunk_kind = "text_completion"

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [{"text": self.echo[index]}] if self.echo else []

    def piece(self, piece: Thought | Text | ToolCall | Done) -> dict[str, Any]:
        if isinstance(piece, Thought):
            return {"text": "", "reasoning": piece.text}
        return {"text": piece.text if isinstance(piece, Text) else _call_text(piece)
                if isinstance(piece, ToolCall) else ""}

    def shown(self, index: int, answer: WholeAnswer) -> dict[str, Any]:
        text = (self.echo[index] if self.echo else "") + answer.text + "".join(map(_call_text, answer.tool_calls))
        return {"text": text, "reasoning": answer.reasoning or None}

    def logprobs(self, entries: list[dict[str, Any]], start: int = 0) -> dict[str, Any]:
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

    def reason(self, done: Done) -> str:
        return "stop" if done.finish_reason == "tool_calls" else done.finish_reason


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_text(call: ToolCall) -> str:
    """A call where nothing but text can stand."""
    return f"call:{call.name}{call.arguments}"
