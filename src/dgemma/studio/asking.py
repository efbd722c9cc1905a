"""What is asked of the model: a branch of messages, the settings of a conversation, its files.

Works on: a store's messages, options. Knows nothing of: how an answer is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgemma.config import SAMPLER_SETTINGS
from dgemma.errors import DgemmaError
from dgemma.serve.ask import Ask, Caller
from dgemma.studio.automatic import chosen_for
from dgemma.studio.media import MediaFolder, is_kept
from dgemma.studio.store import Message, Store, text_of
from dgemma.tools.loop import STOPPED

_CALLER = Caller("studio", "", "studio")
_PLAIN = ("max_tokens", "seed", "temperature", "top_k", "top_p")  # what an `Ask` has a field for
_OTHERS = ("thinking", "reasoning_budget", "stop", "image_tokens", "candidates", *SAMPLER_SETTINGS)
OPTIONS = (*_PLAIN, *_OTHERS, "adapter")  # the last: one of the backend's, by its name


def ask_of(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any],
           tools: Sequence[Mapping[str, Any]] = ()) -> Ask:
    """What is asked of the model; options that are None are left to it. Raises DgemmaError for unknown ones.

    An adapter is not looked up here: only what serves knows it.
    """
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise DgemmaError(f"there is no setting {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    plain: dict[str, Any] = {name: options.get(name) for name in _PLAIN}
    others = {name: options[name] for name in _OTHERS if options.get(name) is not None}
    if tools:
        others["tools"] = [dict(tool) for tool in tools]
    return Ask(prompt=[dict(message) for message in messages], client=_CALLER, options=others, **plain)


def settings_of(options: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an answer is made with, of `OPTIONS`: a conversation's options, and for what they leave open, the rules."""
    asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    return {**chosen_for(text_of(asked)), **{name: value for name, value in options.items() if name != "tools"}}


def prompt_of(store: Store, system: str, last: Message) -> list[dict[str, Any]]:
    """The messages of a branch up to ``last``, as a chat template wants them."""
    known = {message.id: message for message in store.messages(last.conversation)}
    path: list[Message] = []
    at: Message | None = last
    while at is not None:
        path.append(at)
        at = known.get(at.parent or "")
    said = [{"role": "system", "content": system}] if system.strip() else []
    return _answered([*said, *map(_said, path[::-1])])


def _said(message: Message) -> dict[str, Any]:
    """A message with what it has beside its content: an assistant's thoughts and calls, a tool's name."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        if message.reasoning:
            said["reasoning"] = message.reasoning  # it is sent back within a turn only
        if calls := message.info.get("tool_calls"):
            said["tool_calls"] = [{"type": "function", "id": f"{message.id}-{number}", "function": call}
                                  for number, call in enumerate(calls)]
    elif message.role == "tool":
        said |= {name: message.info[name] for name in ("name", "tool_call_id") if name in message.info}
        said["content"] = message.content or STOPPED  # the server was killed meanwhile
    return said


def _answered(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which every call has an answer: those of a turn that was stopped have none."""
    made: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            open_calls = open_calls[1:]  # they are answered in their order
        else:
            made += [{"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": STOPPED}
                     for call in open_calls]
            open_calls = [] if message is None else message.get("tool_calls", [])
        if message is not None:
            made.append(message)
    return made


def with_files(messages: Sequence[Mapping[str, Any]], media: MediaFolder) -> list[dict[str, Any]]:
    """Messages with the bytes of their pictures and films, as `Model.request` takes them. Raises DgemmaError."""
    def whole(part: Any) -> Any:
        if not is_kept(part):
            return part
        return {"type": part["type"], part["type"]: media.read(part), "name": part.get("name", "the picture")}

    return [{**message, "content": [whole(part) for part in message["content"]]}
            if isinstance(message["content"], list) else dict(message) for message in messages]
