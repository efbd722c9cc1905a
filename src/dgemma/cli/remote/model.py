"""A model on a server, with as much of `dgemma.Model`'s face as `run` and `chat` look at.

Works on: chunks of OpenAI's chat completions, which become the events of `diffusion.events`. A server of ours shows its
drafts (`"dgemma": {"draft": …}` in a chunk), so that the live canvas is the same as with a model on this machine;
any other shows text. Knows nothing of: HTTP, how events are shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from dgemma.chat.thoughts import CLOSE, HEADER, OPEN
from dgemma.cli.media import sent
from dgemma.cli.remote.client import ChatStream, NotListedError, OpenAIServer, chunk_error
from dgemma.config import SAMPLER_SETTINGS, GenerationConfig
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished, FinishReason, Generation
from dgemma.errors import DgemmaError

OWNER = "dgemma"  # what a server of ours says in the `owned_by` of its models
DRAFTS_PER_SECOND = 50  # every step of all but the fastest; a draft of 256 tokens is about 10 kB
_MARKS = {"<eos>", "<bos>", "<pad>", "<unk>", "<mask>"}  # the other special tokens have a bar in their names
_UNKNOWN_SEED = -1


def refuse_with_url(**options: Any) -> None:
    """Raises DgemmaError if one of these options, which a server decides for itself, was given."""
    given = [f"--{option.replace('_', '-')}" for option, value in options.items() if value is not None]
    if given:
        raise DgemmaError(f"{given[0]} is for a model on this machine and cannot be used with --url")


def connect(url: str, api_key: str | None, name: str | None, *, drafts: bool) -> RemoteModel:
    """The model of that name on a server, its first one if there is no name. Raises DgemmaError."""
    server = OpenAIServer(url, api_key)
    try:
        models = server.models()
    except NotListedError:
        if name is None:
            raise
        models = []
    if name is None:
        if not models:
            raise DgemmaError(f"{server.url} serves no model")
        name = str(models[0]["id"])
    ours = any(model.get("owned_by") == OWNER for model in models)
    return RemoteModel(server, name, drafts=ours and drafts)


class ServerDefaults:
    """Stands for a `GenerationConfig` that only the server knows: what is not set is its own affair."""

    _UNSET = "(the server's default)"

    def replace(self, **changes: Any) -> SimpleNamespace:
        """The settings with ``changes`` applied; raises ValueError on one that no server can take."""
        GenerationConfig(t_min=1e-300, t_max=1e300).replace(**changes)  # either may be given without the other
        names = ("max_tokens", *SAMPLER_SETTINGS)
        return SimpleNamespace(**{name: changes.get(name, self._UNSET) for name in names})


class Vocabulary:
    """The tokens that a server has named. Text that came without token ids gets ids of its own, below 0."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[bytes, bool]] = {}

    def learn(self, token_ids: list[int], tokens: list[str]) -> None:
        """Take in what a draft calls its tokens."""
        for token_id, token in zip(token_ids, tokens, strict=True):
            if token_id not in self._pieces:
                special = token in _MARKS or (token[:1] + token[-1:] == "<>" and "|" in token)
                self._pieces[token_id] = (token.encode(), special)

    def add(self, text: str, special: bool = False) -> int:
        """The id of a stretch of text, as if it were one token."""
        token_id = -len(self._pieces) - 1
        self._pieces[token_id] = (text.encode(errors="replace"), special)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id][0]

    def is_special(self, token_id: int) -> bool:
        return self._pieces[token_id][1]


class RemoteModel:
    """What `load` gives, as far as a command that only generates looks. ``has_drafts``: there is a canvas to show."""

    def __init__(self, server: OpenAIServer, name: str, drafts: bool):
        self.name, self.has_drafts = name, drafts
        self.tokenizer = Vocabulary()
        self.generation_config = ServerDefaults()
        self.prefixes: dict[str, Any] = {}  # what was read is in the server's cache, not here
        self._server = server
        self._stream: ChatStream | None = None

    def stream(self, prompt: str | list[dict[str, Any]], *, system: str | None = None, thinking: bool = False,
               seed: int | None = None, tools: list[dict[str, Any]] | None = None,
               **settings: Any) -> Iterator[Event]:
        """The events of an answer, as `Model.stream` gives them. Raises DgemmaError when the server cannot."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        options: dict[str, Any] = {"include_usage": True}
        if self.has_drafts:
            options |= {"include_drafts": True, "drafts_per_second": DRAFTS_PER_SECOND}
        body = {"model": self.name, "messages": list(map(_with_calls, sent(messages))), "stream": True,
                "stream_options": options}
        body |= {name: value for name, value in {"seed": seed, "tools": tools, **settings}.items() if value is not None}
        if thinking:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        # It is known before the first event is asked for, so that a cancel can never come too early.
        self._stream = ChatStream(self._server, body)
        return self._events(self._stream, StreamReader(self.tokenizer, self.has_drafts, seed))

    def cancel(self) -> None:
        """Stop what runs; may be called from a signal handler."""
        if self._stream is not None:
            self._stream.stop()

    def _events(self, stream: ChatStream, reader: StreamReader) -> Iterator[Event]:
        for chunk in stream:
            if error := chunk_error(chunk, self._server.url):
                raise error
            yield from self._understood(reader.feed, chunk)
        if not stream.stopped and reader.finish_reason is None:
            raise DgemmaError(f"the connection to {self._server.url} ended in the middle of the answer")
        yield from self._understood(reader.finish, stream.stopped)

    def _understood(self, read: Callable[[Any], list[Event]], what: Any) -> list[Event]:
        """What the reader makes of it; what a server may not send is an error that names the server."""
        try:
            return read(what)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise DgemmaError(f"{self._server.url} sent a chunk that makes no sense "
                              f"({type(error).__name__}: {error})") from error


class StreamReader:
    """The events that an answer's chunks amount to.

    A server of ours sends drafts of a canvas and then the text it was committed with, without token ids. The canvas
    counts as committed once drafts of the next one come, or the answer ends: until then more of its text may follow.
    """

    def __init__(self, vocabulary: Vocabulary, drafts: bool, seed: int | None):
        self.finish_reason: FinishReason | None = None
        self._vocabulary, self._drafts = vocabulary, drafts
        self._seed = _UNKNOWN_SEED if seed is None else seed
        self._began = time.perf_counter()
        self._text, self._reasoning = "", ""
        self._thinking = False
        self._calls: dict[int, dict[str, str]] = {}
        self._usage: dict[str, Any] = {}
        self._pieces: list[int] = []  # what was said since the last commit
        self._shown: Denoised | None = None  # the last draft of the open canvas
        self._committed = 0  # tokens
        self._steps: list[int] = []

    def feed(self, chunk: dict[str, Any]) -> list[Event]:
        """Take in a chunk."""
        events: list[Event] = []
        self._usage = chunk.get("usage") or self._usage
        self._seed = chunk.get("seed", self._seed)
        if self._drafts and (draft := (chunk.get("dgemma") or {}).get("draft")):
            events += self._draft(draft)
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            self._say(delta.get("reasoning_content") or delta.get("reasoning") or "", thinking=True)
            self._say(delta.get("content") or "", thinking=False)
            for call in delta.get("tool_calls") or []:
                self._call(call.get("index", 0), call.get("function") or {})
            if reason := choice.get("finish_reason"):
                self.finish_reason = reason if reason in ("length", "cancelled") else "stop"
        if not self._drafts and self._pieces:
            events.append(self._commit())
        return events

    def finish(self, stopped: bool) -> list[Event]:
        """The end of the answer; ``stopped``: by the user."""
        events: list[Event] = []
        usage = self._usage
        completion = usage.get("completion_tokens") or 0
        steps = usage.get("denoising_steps") or 0
        if self._pieces or self._shown:
            events.append(self._commit(completion, steps))
        generation = Generation(
            text=self._text, reasoning=self._reasoning or None,
            tool_calls=[{"name": call["name"], "arguments": _arguments(call["arguments"])}
                        for _, call in sorted(self._calls.items())],
            token_ids=[], finish_reason="cancelled" if stopped else self.finish_reason or "stop", steps=self._steps,
            tokens_per_forward=completion / steps if steps else 0.0, prompt_tokens=usage.get("prompt_tokens") or 0,
            seconds=self._seconds(), seed=self._seed,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        return [*events, Finished(0, generation)]

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _draft(self, draft: dict[str, Any]) -> list[Event]:
        canvas, step, max_steps = (int(draft[name]) for name in ("canvas", "step", "max_steps"))
        token_ids, tokens, accepted = draft["token_ids"], draft["tokens"], draft["accepted"]
        entropies = [float(entropy) for entropy in draft["entropies"]]
        pinned = draft.get("pinned") or [False] * len(token_ids)
        if not token_ids or not len(token_ids) == len(tokens) == len(entropies) == len(accepted) == len(pinned):
            raise ValueError("a draft whose lists differ in length")
        self._vocabulary.learn(token_ids, tokens)
        events: list[Event] = []
        before = self._shown
        if before is None or before.canvas != canvas or step < before.step:
            if before is not None and before.canvas != canvas:
                events.append(self._commit(self._committed + len(before.token_ids)))
            before = None  # or it is drawn once more
            events.append(CanvasStarted(0, canvas, token_ids, pinned, 0, max_steps))  # its context is not told
        changed = [before is None or token != before.token_ids[i] for i, token in enumerate(token_ids)]
        # Nobody who looks on asks for the canvas that the next step starts from (its tokens are not named) or the
        # temperature.
        self._shown = Denoised(0, canvas, step, token_ids, token_ids, entropies, accepted, changed, math.nan,
                               self._seconds())
        return [*events, self._shown]

    def _say(self, text: str, thinking: bool) -> None:
        if not text:
            return
        if thinking:
            self._reasoning += text
        else:
            self._text += text
        if thinking != self._thinking:
            self._pieces.append(self._vocabulary.add(OPEN if thinking else CLOSE, special=True))
            text = HEADER + text if thinking else text
        self._thinking = thinking
        self._pieces.append(self._vocabulary.add(text))

    def _call(self, index: int, function: dict[str, str]) -> None:
        call = self._calls.setdefault(index, {"name": "", "arguments": ""})
        for part in call:
            call[part] += function.get(part) or ""

    def _commit(self, tokens: int = 0, steps: int = 0) -> CanvasCommitted:
        """Close the canvas with what was said.

        ``tokens`` and ``steps`` are those of the answer so far, as far as known: the text's pieces are made up to as
        many tokens with empty ones, so that whoever counts them counts right.
        """
        pieces, shown = self._pieces, self._shown
        pieces += [self._vocabulary.add("")] * (tokens - self._committed - len(pieces))
        last = max(shown.step if shown else 0, steps - sum(self._steps))
        if last:
            self._steps.append(last)
        self._committed += len(pieces)
        self._pieces, self._shown = [], None
        return CanvasCommitted(0, shown.canvas if shown else 0, pieces, last, self._seconds())


def known(generation: Generation) -> dict[str, Any]:
    """A remote model's answer as a dictionary; None is what its server did not say."""
    fields = dataclasses.asdict(generation)
    for name in ("token_ids", "steps", "tokens_per_forward", "prompt_tokens"):
        fields[name] = fields[name] or None
    if generation.seed == _UNKNOWN_SEED:
        fields["seed"] = None
    return fields


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's API has it: the arguments of its calls are text, thoughts have the name servers know."""
    message = {"reasoning_content" if name == "reasoning" else name: value for name, value in message.items()}
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            if not isinstance(call["function"]["arguments"], str) else call for call in message["tool_calls"]]
    return message


def _arguments(text: str) -> Any:
    """A tool call's arguments, as they are if they are no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
