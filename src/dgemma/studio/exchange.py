"""Conversations as files: JSON, which holds all of them, and Markdown, which anybody can read.

Works on: a store's records. Knows nothing of: pages. In JSON pictures and other files are data URLs ("url" in place of
"media"); Markdown says where one was. What a file allows to tools is not brought in: it may be somebody else's.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dgemma.errors import DgemmaError
from dgemma.studio.media import KINDS, MediaFolder, Part, data_url, is_kept, kept_parts
from dgemma.studio.store import Conversation, Message, Store, new_ids, text_of, title_of

FORMAT = "dgemma-conversations"
VERSION = 1
ROLES = ("user", "assistant", "tool")
_NAMES = {"user": "You", "assistant": "Model", "tool": "Tool"}
# A heading alone could be one of the text's own.
_MARK = re.compile(r"^<!-- dgemma: (system|user|assistant|tool|thought) -->\n+(?:## .*\n+)?", re.MULTILINE)


def export_json(store: Store, ids: Sequence[str]) -> bytes:
    """Conversations with all of their branches."""
    kept = [conversation for id in ids if (conversation := store.conversation(id)) is not None]
    return json.dumps({"format": FORMAT, "version": VERSION, "conversations": [
        {**asdict(conversation), "messages": [asdict(_with_files(message, partial(_with_url, media=store.media)))
                                              for message in store.messages(conversation.id)]}
        for conversation in kept]}, indent=1).encode()


def _with_files(message: Message, change: Callable[[Any], Any]) -> Message:
    """A message whose files, in what it says and of what a tool made, are changed."""
    content, files = message.content, message.info.get("files")
    return replace(message, content=[*map(change, content)] if isinstance(content, list) else content,
                   info={**message.info, "files": [*map(change, files)]} if isinstance(files, list) else message.info)


def _with_url(part: Any, media: MediaFolder) -> Any:
    """A kept file as one that has a data URL; one that is gone stays as it is."""
    if not is_kept(part):
        return part
    try:
        url = data_url(part, media.read(part))
    except DgemmaError:
        return part
    return {**{name: value for name, value in part.items() if name != "media"}, "url": url}


def _with_media(part: Any, media: MediaFolder) -> Any:
    """A file that has a data URL as a kept one. Raises DgemmaError."""
    if not isinstance(part, dict) or part.get("type") not in KINDS or not isinstance(part.get("url"), str):
        return part
    head, _, data = part["url"].partition(",")
    if not re.fullmatch(r"data:[\w.+/-]*;base64", head):
        raise DgemmaError("a picture in this file is no data URL")
    try:
        raw, name = base64.b64decode(data, validate=True), str(part.get("name", ""))
    except ValueError as error:
        raise DgemmaError(f"a picture in this file is damaged ({error})") from error
    made = media.put_made(raw, name) if part["type"] == "file" else media.put_seen(raw, name)
    return {**{name: value for name, value in part.items() if name != "url"}, **made}


def export_markdown(store: Store, id: str) -> str:
    """The branch of a conversation that is shown."""
    conversation = store.conversation(id)
    if conversation is None:
        raise DgemmaError("this conversation is not there any more")
    parts = [f"# {conversation.title}"]
    if conversation.system:
        parts.append(f"<!-- dgemma: system -->\n\n## System\n\n{conversation.system}")
    for message in store.branch(id):
        if message.reasoning:
            parts.append(f"<!-- dgemma: thought -->\n\n## Thought\n\n{message.reasoning}")
        files = map(_place, [*kept_parts(message.content), *kept_parts(message.info.get("files"))])
        said = "\n\n".join(filter(None, [*files, message.text]))
        parts.append(f"<!-- dgemma: {message.role} -->\n\n## {_NAMES[message.role]}\n\n{said}")
    return "\n\n".join(parts) + "\n"


def _place(part: Part) -> str:
    """What Markdown says of a file."""
    return f"*[{part['type']}: {part.get('name', '')}]*"


def import_file(store: Store, data: bytes) -> list[Conversation]:
    """Add what a file holds, under new ids. Raises DgemmaError, and adds nothing, for a file that is neither."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DgemmaError("this file is no text: choose one that was exported as JSON or Markdown") from error
    whole = _from_json(text) if text.lstrip().startswith("{") else [_from_markdown(text)]
    renamed = [_renamed(conversation, messages) for conversation, messages in whole]
    take = partial(_with_media, media=store.media)
    renamed = [(conversation, [_with_files(message, take) for message in messages])
               for conversation, messages in renamed]
    for conversation, messages in renamed:
        store.add_whole(conversation, messages)
    return [conversation for conversation, _ in renamed]


def _from_json(text: str) -> list[tuple[Conversation, list[Message]]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"this file is damaged JSON ({error})") from error
    if data.get("format") != FORMAT:
        raise DgemmaError(f"this JSON holds no conversations of dgemma: it has no format {FORMAT!r}")
    if data.get("version") != VERSION:
        raise DgemmaError(f"this file is of version {data.get('version')!r:.20}; this dgemma reads version {VERSION}")
    try:
        return [_whole(record) for record in _typed(data, "conversations", list)]
    except (TypeError, KeyError, AttributeError) as error:
        raise DgemmaError(f"this file is damaged: {error!s:.200}") from error


def _whole(record: dict[str, Any]) -> tuple[Conversation, list[Message]]:
    conversation = Conversation(
        _typed(record, "id", str), _typed(record, "title", str), _typed(record, "system", str),
        {name: value for name, value in _typed(record, "options", dict).items() if name != "tools"},
        _typed(record, "pinned", bool), record["head"],
        _typed(record, "created", (int, float)), _typed(record, "updated", (int, float)))
    messages, known = [], set()
    for item in _typed(record, "messages", list):
        status = "stopped" if item["status"] == "running" else item["status"]
        message = Message(
            _typed(item, "id", str), conversation.id, item["parent"], item["role"], _content(item["content"]),
            _typed(item, "reasoning", str), status, _typed(item, "info", dict), _typed(item, "created", (int, float)))
        if message.role not in ROLES:
            raise TypeError(f"role {message.role!r}")
        if status not in ("done", "stopped", "failed"):
            raise TypeError(f"status {status!r}")
        if message.parent is not None and message.parent not in known:
            raise TypeError(f"message {message.id!r} follows {message.parent!r}, which does not stand before it")
        known.add(message.id)
        messages.append(message)
    if conversation.head is not None and conversation.head not in known:
        raise TypeError(f"head {conversation.head!r} is no message")
    return conversation, messages


def _content(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
        return value
    raise TypeError("content is neither text nor a list of parts")


def _typed(record: dict[str, Any], name: str, kind: Any) -> Any:
    if not isinstance(record[name], kind):
        raise TypeError(f"{name} is {type(record[name]).__name__}")
    return record[name]


def _from_markdown(text: str) -> tuple[Conversation, list[Message]]:
    """A conversation as `export_markdown` writes it."""
    parts = _MARK.split(text.replace("\r\n", "\n"))
    if len(parts) < 3:
        raise DgemmaError("this Markdown holds no conversation of dgemma: it has no <!-- dgemma: user --> in it")
    heading = parts[0].strip()
    now, title = time.time(), heading.removeprefix("# ").strip() if heading.startswith("# ") else ""
    system = thought = ""
    messages: list[Message] = []
    for role, said in zip(parts[1::2], parts[2::2], strict=True):
        said = said.strip("\n")
        if role == "system":
            system = said
        elif role == "thought":
            thought = said
        else:
            parent = messages[-1].id if messages else None
            messages.append(Message(str(len(messages)), "", parent, role, said, thought, created=now))
            thought = ""
    title = title or title_of(text_of(messages[0].content) if messages else "")
    head = messages[-1].id if messages else None
    return Conversation("", title, system, head=head, created=now, updated=now), messages


def _renamed(conversation: Conversation, messages: Sequence[Message]) -> tuple[Conversation, list[Message]]:
    """The same under ids that nothing else has."""
    own, *fresh = new_ids(len(messages) + 1)
    names: dict[str | None, str | None] = {None: None}
    names.update(zip((message.id for message in messages), fresh, strict=True))
    return (replace(conversation, id=own, head=names[conversation.head]),
            [replace(message, id=name, conversation=own, parent=names[message.parent])
             for message, name in zip(messages, fresh, strict=True)])
