"""An answer read canvas by canvas: what the model thinks, says and calls, as soon as it is sure.

The one reader of replies, for the library and every API. Works on token ids, where a control token and the same
characters typed as text are different things. Knows nothing of: the engine, wire formats.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgemma.chat import thoughts, tools
from dgemma.chat.repair import read_calls, weigh_calls
from dgemma.chat.speech import Said, Speech, Spelt
from dgemma.chat.thoughts import Channel
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import Called, Tool, tools_of

_MARKS = (thoughts.OPEN, thoughts.CLOSE, tools.OPEN, tools.CLOSE, tools.QUOTE)
_DECLARED = re.compile(r"\s*declaration:\s*([^{]*[^\s{])\s*\{")
_NAME_TOKENS = 200  # tokens in which a declaration's name is sure to stand
_MOST_ENDS = 8  # closing marks in one call, of which only the last closes it

DeclaredTools = Iterable[str | Tool | Mapping[str, Any]]


@dataclass(frozen=True)
class Thought:
    """A stretch of what the model thought; never empty."""

    text: str


Piece = Thought | Said | Called


def declared_tools(tokenizer: Tokenizer, prompt_ids: list[int]) -> list[str]:
    """The names of the tools that a prompt declares."""
    opening = tokenizer.token_to_id("<|tool>")
    places = [place for place, token in enumerate(prompt_ids) if token == opening]
    texts = [tokenizer.decode(prompt_ids[place + 1 : place + 1 + _NAME_TOKENS]) for place in places]
    return [name.group(1) for name in map(_DECLARED.match, texts) if name]


@dataclass(frozen=True)
class Answer:
    """A whole answer: ``text`` is what a user reads; ``reasoning`` is None when there was none."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]  # {"name": str, "arguments": dict} each
    stopped: str | None = None  # the stop string that it ended before
    thought_tokens: int = 0  # of its tokens, those of thoughts, their marks included
    rest: list[Piece] = field(default_factory=list, compare=False)  # the last of its pieces, which were held back


class ReplyReader:
    """Reads an answer's tokens as they are committed: `feed` each canvas, then `finish`, once.

    The pieces of an answer, those of a kind put together, do not depend on how it was cut into canvases. A call is
    given when it is closed; a character when its last byte is there. A call that cannot be read is text, marks and
    all; one within a thought is thought, unless the answer ends with it and the thought was never closed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], tools: DeclaredTools | None = None,
                 stop: Sequence[str] = (), form: bool = False, held: bool = False):
        """The prompt tells whether a thought was already open, and which tools there are unless ``tools`` does, as
        names or as declarations in OpenAI's form. Where there are any, a call is of one of them; where ``tools`` is
        empty, nothing is a call.

        ``stop``: nothing from any of these strings on is said. ``form``: the answer has to have a form, which may look
        like a call; only what stands between marks is one then. ``held``: a constraint made the calls.
        """
        self._tokenizer, self._held = tokenizer, held
        self._marks = {tokenizer.token_to_id(mark): mark for mark in _MARKS}
        self._tools = tools_of(declared_tools(tokenizer, prompt_ids) if tools is None else tools)
        self._calling = tools is None or bool(self._tools)
        self._channel = Channel(inside_thought(tokenizer, prompt_ids))
        self._speech = Speech({} if form else self._tools, stop)
        self._call: list[Spelt] | None = None  # an open call, from its opening mark on
        self._in_thought: list[Spelt] | None = None  # what follows such a mark in a thought that is still open
        self._run: list[Spelt] = []  # text since the last mark that was not passed on yet
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._half: tuple[int, int] | None = None  # the tokens of a character that is not complete
        self._count = 0  # tokens read
        self._thought_tokens = 0  # of these, those of thoughts that are over
        self._thought_start = 0  # where one that is open began
        self._pieces: list[Piece] = []
        self._given: list[Piece] = []  # all that was passed on

    @property
    def stopped(self) -> str | None:
        """The stop string that was met: nothing comes after it."""
        return self._speech.stopped

    @property
    def stop_place(self) -> int | None:
        """How many of the tokens it took to complete that stop string."""
        return self._speech.stop_place

    def feed(self, token_ids: Sequence[int]) -> list[Piece]:
        """What is sure after a committed canvas; its stop token does not belong to it."""
        for token in token_ids:
            if self.stopped is not None:
                break
            mark, place = self._marks.get(token), self._count
            self._count += 1
            if mark is not None:
                self._pass_run(final=True)
                self._mark(Spelt(mark, [(place, place + 1)] * len(mark), [True] * len(mark)))
            elif not self._tokenizer.is_special(token):  # fill and the like mean nothing here
                self._spell(self._tokenizer.token_bytes(token), place)
        self._pass_run(final=False)
        return self._taken()

    def finish(self) -> Answer:
        """All of it, now that nothing follows."""
        self._pass_run(final=True)
        if self._channel.open and self.stopped is None:
            self._thought_tokens += self._count - self._thought_start
        self._end_thought()
        self._end_call(final=True)
        self._pieces += self._speech.pause()
        rest, pieces = self._taken(), self._given
        return Answer(
            "".join(piece.text for piece in pieces if isinstance(piece, Said)),
            "".join(piece.text for piece in pieces if isinstance(piece, Thought)) or None,
            [{"name": piece.name, "arguments": piece.arguments} for piece in pieces if isinstance(piece, Called)],
            self.stopped, self._thought_tokens, rest)

    def _spell(self, data: bytes, place: int) -> None:
        text = self._bytes.decode(data)
        start = self._half[0] if self._half else place
        if text:
            places = [(start, place + 1), *[(place, place + 1)] * (len(text) - 1)]
            self._run.append(Spelt(text, places, [False] * len(text)))
            start = place
        self._half = (start, place + 1) if self._bytes.getstate()[0] else None

    def _pass_run(self, final: bool) -> None:
        """Pass text on; ``final``: no more bytes of its last character can come."""
        if final and self._half:
            broken = self._bytes.decode(b"", True)
            self._run.append(Spelt(broken, [self._half] * len(broken), [False] * len(broken)))
            self._half = None
        run, self._run = self._run, []
        if run:
            self._text(Spelt.joined(run))

    def _text(self, text: Spelt) -> None:
        if self._channel.open and self._in_thought is not None:
            self._in_thought.append(text)
        elif self._channel.open:
            self._think(text.text)
        elif self._call is not None:
            self._call.append(text)
        else:
            self._pieces += self._speech.add(text)

    def _think(self, text: str) -> None:
        if thought := self._channel.thought(text):
            self._pieces.append(Thought(thought))

    def _mark(self, mark: Spelt) -> None:
        if mark.text == thoughts.OPEN:
            self._release_thought()
            self._end_call(final=True)
            self._pieces += self._speech.pause()
            self._thought_start = self._thought_start if self._channel.open else self._count - 1
            self._channel.enter()
        elif mark.text == thoughts.CLOSE and self._channel.open:
            self._release_thought()
            self._thought_tokens += self._count - self._thought_start
            self._channel.leave()
            self._speech.begin_afresh()
        elif mark.text == thoughts.CLOSE and self._call is not None:
            self._text(mark)
        elif mark.text == thoughts.CLOSE:
            pass  # it closes nothing
        elif mark.text == tools.OPEN and not self._calling:
            self._text(mark)
        elif mark.text == tools.OPEN and self._channel.open:
            self._in_thought = self._in_thought or []
            self._in_thought.append(mark)
        elif mark.text == tools.OPEN:
            self._end_call(final=True)
            self._pieces += self._speech.pause()
            self._call = [mark]
        else:
            self._text(mark)
            if mark.text == tools.CLOSE:
                self._end_call(final=False)

    def _end_call(self, final: bool) -> None:
        """At a closing mark, or where (``final``) nothing more of the call can come."""
        if self._call is None or (found := self._read_call(self._call, final)) is None:
            return
        calls, rest = found
        self._call = None
        self._pieces += calls
        if calls:
            self._speech.begin_afresh()
        if rest:
            self._pieces += self._speech.add(Spelt.joined(rest))

    def _read_call(self, parts: list[Spelt], final: bool) -> tuple[list[Called], list[Spelt]] | None:
        """The calls in what follows an opening mark, and what behind them is none of theirs; None if more must be seen.

        Where it ends without an end to a string or a bracket, a closing mark may belong to the string.
        """
        ends = [place for place, part in enumerate(parts) if part.text == tools.CLOSE and part.marks[0]]
        closed = bool(ends) and ends[-1] == len(parts) - 1
        whole = Spelt.joined(parts[1 : -1 if closed else None]).guarded(self._tools)
        reading = weigh_calls(whole.source, closed, whole.tools, self._held)
        if not final and reading is not None and reading.open and len(ends) < _MOST_ENDS:
            return None
        if reading is not None and reading.calls:
            return whole.restored(reading.calls), []
        # What was missing is missing: the first closing mark is the call's.
        end = ends[0] if ends else len(parts)
        first = Spelt.joined(parts[1:end]).guarded(self._tools)
        calls = first.restored(read_calls(first.source, bool(ends), first.tools.values()))
        return (calls, parts[end + 1 :]) if calls else ([], parts)

    def _end_thought(self) -> None:
        """The answer is over: calls that end it are calls, though the thought before them was never closed."""
        held, self._in_thought = self._in_thought or [], None
        calls: list[Called] = []
        starts = [place for place, part in enumerate(held) if part.text == tools.OPEN and part.marks[0]]
        for start in reversed(starts):
            found, rest = self._read_call(held[start:], final=True) or ([], [])
            if not found or Spelt.joined(rest).text.strip():
                break
            calls, held = [*found, *calls], held[:start]
        for part in held:
            self._think(part.text)
        self._pieces += calls

    def _release_thought(self) -> None:
        """What was held back in a thought is thought."""
        held, self._in_thought = self._in_thought, None
        for part in held or ():
            self._think(part.text)

    def _taken(self) -> list[Piece]:
        """The pieces so far, neighbours of a kind joined."""
        pieces, self._pieces = self._pieces, []
        joined: list[Piece] = []
        for piece in pieces:
            last = joined[-1] if joined else None
            if isinstance(piece, Said) and isinstance(last, Said):
                joined[-1] = Said(last.text + piece.text, (last.tokens[0], piece.tokens[1]))
            elif isinstance(piece, Thought) and isinstance(last, Thought):
                joined[-1] = Thought(last.text + piece.text)
            else:
                joined.append(piece)
        self._given += joined
        return joined


def inside_thought(tokenizer: Tokenizer, prompt_ids: list[int]) -> bool:
    """Whether the prompt leaves a thought open for the model to go on with (some templates do)."""
    opened, closed = tokenizer.token_to_id(thoughts.OPEN), tokenizer.token_to_id(thoughts.CLOSE)
    last = next((token for token in reversed(prompt_ids) if token in (opened, closed)), None)
    return last is not None and last == opened


def read_answer(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int], tools: DeclaredTools | None = None,
                **options: Any) -> Answer:
    """Read all of an answer's tokens (without the stop token); the arguments are those of `ReplyReader`."""
    reader = ReplyReader(tokenizer, prompt_ids, tools, **options)
    reader.feed(token_ids)
    return reader.finish()
