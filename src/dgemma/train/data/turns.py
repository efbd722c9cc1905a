"""What the model has to write at each of the assistant's messages, and what stands before it.

Works on: conversations and a checkpoint's own tokenizer and template. Knows nothing of: files, canvases, networks.

Every assistant message is a turn of its own: its context is, token for token, the prompt that the model gets at that
point when it is used (`Model.prompt_ids`), and its response is what the model would have to write there. One
rendering of the whole conversation would not do: templates leave out earlier turns' thoughts, and mark no turn's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dgemma.chat.messages import normalise_messages
from dgemma.chat.reply import inside_thought, read_answer
from dgemma.chat.thoughts import CLOSE, HEADER, OPEN
from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.tokenizer_files import STOPS
from dgemma.train.data.conversations import Conversation, text_of
from dgemma.train.sights import PreparedPictures, Sight, media_of, placed_sights

Thinking = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant's. ``response_ids`` ends with the stop token; ``message`` is its place in the
    conversation of ``row``; ``dropped``: how many messages were left out of the context because it was too long;
    ``sights`` are the pictures in the context, in order."""

    context_ids: list[int]
    response_ids: list[int]
    row: str
    message: int
    thinking: bool = False
    dropped: int = 0
    sights: tuple[Sight, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.row}, message {self.message}"

    def ending(self, most: int) -> Turn:
        """The turn with the end of its context only, about ``most`` tokens: no picture is cut, and the last one that
        there is stays."""
        first = max(len(self.context_ids) - most, 0)
        if self.sights:
            first = min(first, self.sights[-1].start - 1)  # where its begin token is
            first = next((sight.start - 1 for sight in self.sights if sight.start <= first < sight.stop + 1), first)
        kept = tuple(replace(sight, start=sight.start - first) for sight in self.sights if sight.start > first)
        return replace(self, context_ids=self.context_ids[first:], sights=kept)


def turn_of(conversation: Conversation, message: int, tokenizer: Tokenizer, *, thinking: Thinking = "auto",
            stop_ids: Sequence[int] | None = None, first: int = 0, pictures: PreparedPictures | None = None) -> Turn:
    """The turn of the assistant's message with that index. ``first``: earlier messages, but for system messages at the
    beginning, are left out of its context. ``pictures`` makes them ready for the tower of the model, if it has one.
    Raises `DgemmaError` when the template does not show what was written, and for pictures that cannot be read or
    seen."""
    where = f"{conversation.where}, message {message}"
    stops = {token for name in STOPS if (token := tokenizer.token_to_id(name)) is not None}
    stops = set(stop_ids) if stop_ids else stops
    thinks = thinking == "on" or (thinking == "auto" and has_thoughts(conversation))
    messages = conversation.messages if thinking != "off" else [without_thoughts(m) for m in conversation.messages]
    before, written = messages[:message], messages[message]
    head = next((i for i, one in enumerate(before) if one.get("role") not in ("system", "developer")), len(before))
    before = before[:head] + before[max(first, head) :]
    try:
        media = media_of(before, pictures, where)
        context = tokenizer.apply_chat_template(before, thinking=thinks, tools=conversation.tools)
        response = _response(tokenizer, context, before, written, conversation.tools, thinks, stops)
        context, sights = placed_sights(media, context, tokenizer)
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from error
    return Turn(context, response, conversation.where, message, thinks, message - len(before), sights)


def has_thoughts(conversation: Conversation) -> bool:
    """Whether the assistant thinks anywhere in what is to be learnt."""
    return any(_thought(conversation.messages[index]) for index in conversation.trained)


def _response(tokenizer: Tokenizer, context: list[int], before: list[dict[str, Any]], written: dict[str, Any],
              tools: list[dict[str, Any]] | None, thinking: bool, stops: set[int]) -> list[int]:
    """The tokens that ``written`` takes after ``context``, from the thought to the stop token."""
    shown = tokenizer.apply_chat_template([*before, written], thinking=thinking, tools=tools,
                                          add_generation_prompt=False)
    inside = inside_thought(tokenizer, context)
    body, given = _behind(tokenizer, context, shown), []
    if body is None and (place := _given_thought(tokenizer, context)) is not None:
        body, given = _behind(tokenizer, context[:place], shown), context[place:]
    if body is None:
        raise DgemmaError(f"the chat template of {tokenizer.source} shows this message in another way than after its "
                          "own generation prompt, so there is no telling what the model has to write")
    said, stop = _cut_at_stop(tokenizer, body, stops)
    if written.get("tool_calls"):
        until = shown[: len(shown) - len(body) + len(said)]
        stop = _stop_after_calls(tokenizer, before, written, tools, thinking, until, stops) or stop
    if stop is None:
        names = ", ".join(repr(tokenizer.id_to_token(token)) for token in sorted(stops))
        raise DgemmaError(f"the chat template of {tokenizer.source} ends an answer without a stop token ({names})")
    early = next((token for token in said if token in stops), None)
    if early is not None:
        raise DgemmaError(f"the answer holds the stop token {tokenizer.id_to_token(early)!r} before its end")
    thought = _thought(written) if thinking else ""
    if (thought or inside) and said[:1] != [tokenizer.token_to_id(OPEN)]:  # the template does not show thoughts
        said = _thought_ids(tokenizer, thought) + said
    if inside:
        if said[: len(given)] != given:
            raise DgemmaError(f"the chat template of {tokenizer.source} opens a thought in another way than the "
                              f"family's {OPEN + HEADER!r}")
        said = said[len(given) :]
    _read_back(tokenizer, context, said, written, thought)
    return [*said, stop]


def _read_back(tokenizer: Tokenizer, context: list[int], said: list[int], written: dict[str, Any],
               thought: str) -> None:
    """Raises unless who reads the model's answers would read this one as it was written: templates leave out what they
    do not know of."""
    message = normalise_messages([written])[0]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    answer = read_answer(tokenizer, context, said, tools=[call["name"] for call in calls], form=True)
    wrong = None
    if _letters(answer.text) != _letters(message["content"]):
        wrong = f"the text {answer.text[:60]!r}"
    elif _letters(answer.reasoning or "") != _letters(thought):
        wrong = f"the thought {(answer.reasoning or '')[:60]!r}"
    elif answer.tool_calls != calls:
        wrong = f"the tool calls {answer.tool_calls!r}"
    if wrong:
        raise DgemmaError(f"in the chat template of {tokenizer.source} this message reads back with {wrong}, which is "
                          "not what it says")


def _letters(content: Any) -> str:
    """What a content says, without white space, which templates trim."""
    return "".join(text_of(content).split())


def _given_thought(tokenizer: Tokenizer, context: list[int]) -> int | None:
    """Where a thought begins that the generation prompt itself ends with, still open or closed (some templates close
    an empty one to switch thinking off). It stands in no finished message, and so not where the answer is shown."""
    opened, closed = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
    if opened is None or opened not in context:
        return None
    place = len(context) - 1 - context[::-1].index(opened)
    if closed not in context[place:]:
        return place
    behind = context[context.index(closed, place) + 1 :]
    return None if tokenizer.decode(behind).strip() else place


def _behind(tokenizer: Tokenizer, context: list[int], shown: list[int]) -> list[int] | None:
    """What stands in ``shown`` behind ``context``; None when it does not begin with it.

    A token that reaches over the border (two line breaks in one) counts as text: the model has read the first half
    already, and writes the second.
    """
    if shown[: len(context)] == context:
        return shown[len(context) :]
    same = next((i for i, (a, b) in enumerate(zip(context, shown, strict=False)) if a != b), len(shown))
    rest = b"".join(tokenizer.token_bytes(token) for token in context[same:])
    if any(tokenizer.is_special(token) for token in context[same:]):
        return None
    reached = b""
    for end in range(same, len(shown)):
        if tokenizer.is_special(shown[end]):
            return None
        reached += tokenizer.token_bytes(shown[end])
        if len(reached) < len(rest):
            continue
        if not reached.startswith(rest):
            return None
        try:
            text = reached[len(rest) :].decode()
        except UnicodeDecodeError:  # in the middle of a character
            continue
        return tokenizer.encode(text, specials=False) + shown[end + 1 :]
    return None


def _cut_at_stop(tokenizer: Tokenizer, body: list[int], stops: set[int]) -> tuple[list[int], int | None]:
    """A rendered answer up to its stop token, behind which templates put white space only, and that token."""
    last = next((i for i in range(len(body) - 1, -1, -1) if body[i] in stops), None)
    if last is None or tokenizer.decode(body[last + 1 :]).strip():
        return body, None
    return body[:last], body[last]


def _stop_after_calls(tokenizer: Tokenizer, before: list[dict[str, Any]], written: dict[str, Any],
                      tools: list[dict[str, Any]] | None, thinking: bool, until: list[int],
                      stops: set[int]) -> int | None:
    """The stop token that the template goes on with behind ``until`` when a called tool answers, if it is one."""
    call = normalise_messages([written])[0]["tool_calls"][0]
    named = {"name": call["function"]["name"], **({"tool_call_id": call["id"]} if "id" in call else {})}
    answered = [*before, written, {"role": "tool", "content": "-", **named}]
    try:
        following = tokenizer.apply_chat_template(answered, thinking=thinking, tools=tools)
    except DgemmaError:  # a template without tool messages: then the turn ends as any other
        return None
    if following[: len(until)] != until or following[len(until)] not in stops:
        return None
    return following[len(until)]


def _thought_ids(tokenizer: Tokenizer, thought: str) -> list[int]:
    """A thought as the family writes it before an answer."""
    opened, closed = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
    if opened is None or closed is None:
        raise DgemmaError(f"{tokenizer.source} has no tokens {OPEN} and {CLOSE} to think between: switch thinking off")
    text = f"{thought}\n" if thought else ""
    return [opened, *tokenizer.encode(HEADER + text, specials=False), closed]


def _thought(message: dict[str, Any]) -> str:
    return normalise_messages([message])[0].get("reasoning", "").strip()


def without_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message normalised and without what was thought; any other as it is."""
    if message.get("role") not in ("assistant", "model"):
        return message
    plain = normalise_messages([message])[0]
    return {key: value for key, value in plain.items() if key not in ("reasoning", "reasoning_content")}
