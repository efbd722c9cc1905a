"""Conversations in one shape, whatever shape they came in.

Works on: plain dictionaries in the OpenAI / transformers style. Knows nothing of: templates, tokens.

Afterwards every message has a role among `ROLES`; content that is a string or a list of typed parts; tool calls
with a dictionary of arguments (or their text, where they are broken); and only the thoughts that a template may still
show. The input is never changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma.chat.thoughts import OPEN, split_thoughts
from dgemma.chat.tools import MAX_DEPTH
from dgemma.errors import DgemmaError
from dgemma.fields import is_deep

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {"developer": "system", "model": "assistant"}
_THOUGHT_KEYS = ("reasoning", "reasoning_content", "thinking")
# OpenAI's names of parts (those of its newer API among them), and the names that templates know.
_PART_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "text",
               "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
# What a tool's name cannot hold: it ends at a brace, a mark would be one, and what is no character cannot be written.
_UNWRITABLE = re.compile(r"[{}\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ue000-\uf8ff]|<\||\|>")


def normalise_messages(
    conversation: str | Sequence[Mapping[str, Any]], system: str | None = None, strict: bool = False
) -> list[dict]:
    """The conversation as a list of messages.

    A string is one user message. `system`, if given, becomes the first message. Thoughts are taken out of what
    the assistant said; those from before the last user message are dropped, since they are never sent back, and
    later ones (of a turn that goes on after a tool call) are kept under `reasoning` and `reasoning_content` for
    the template to decide.

    What is broken in what was said before must not end a conversation: arguments that are no JSON object stay text (or
    are none where there is nothing in them), an assistant without content said "", and a tool's answer whose call was
    trimmed away is told by the user: templates drop what follows no call. With ``strict``, for data to learn from,
    these are errors, too. Raises `DgemmaError`, naming the message and what is wrong with it.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or isinstance(conversation, bytes):
        raise DgemmaError(f"messages must be a string or a list of messages, not {_type(conversation)}")
    if system is not None:
        conversation = [{"role": "system", "content": system}, *conversation]
    if not conversation:
        raise DgemmaError("messages is empty: give at least one message")

    messages = [_message(message, f"message {index}", strict) for index, message in enumerate(conversation)]
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    names: dict[str | int | None, str] = {}  # tool call id -> the tool's name
    open_calls: list[str] = []  # names of the tools whose answers may follow
    for index, message in enumerate(messages):
        if index < last_user:
            message.pop("reasoning", None)
            message.pop("reasoning_content", None)
        if message["role"] != "tool":
            open_calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls", ())}
            continue
        call_id = _call_id(message, "tool_call_id", f"message {index}")
        name = message.get("name") or names.get(call_id)
        if not name and (strict or call_id is None):
            raise DgemmaError(f"message {index}: a tool message needs the `tool_call_id` of an earlier call, or `name`")
        if not open_calls and not strict:
            messages[index] = _told_by_the_user(message, name)
            continue
        message["name"] = name = name or open_calls[0]
        if name in open_calls and len(open_calls) > 1:
            open_calls.remove(name)  # the last one stays, for more answers than there were calls
    return messages


def _told_by_the_user(answer: Mapping[str, Any], name: str | None) -> dict:
    """A tool's answer that follows no call any more."""
    content = answer["content"]
    if isinstance(content, Mapping):
        content = "\n".join(f"{key}: {value}" for key, value in content.items())
    begin = f"Result of {name or 'a tool'}, which was called earlier:\n"
    if not isinstance(content, str):
        return {"role": "user", "content": [{"type": "text", "text": begin}, *content]}
    return {"role": "user", "content": begin + content}


def normalise_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict] | None:
    """Tool declarations as `{"type": "function", "function": {"name", …}}` each; None when there are none.

    A bare `{"name": …, "parameters": …}` is wrapped. Raises `DgemmaError` naming the tool and what is wrong: a name
    that the model's notation cannot hold, too.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise DgemmaError(f"tools must be a list of declarations, not {_type(tools)}")
    return [_tool(tool, f"tool {index}") for index, tool in enumerate(tools)] or None


def _tool(tool: Any, where: str) -> dict:
    if not isinstance(tool, Mapping):
        raise DgemmaError(f"{where}: must be a dictionary, not {_type(tool)}")
    if tool.get("type", "function") != "function":
        raise DgemmaError(f"{where}: type {tool['type']!r} is not supported, only 'function'")
    function = tool.get("function", tool if "name" in tool else None)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DgemmaError(
            f"{where}: must be {{'type': 'function', 'function': {{'name': …, 'parameters': …}}}}"
        )
    name = function["name"]
    if name != name.strip() or _UNWRITABLE.search(name):
        raise DgemmaError(
            f"{where}: the name {name!r} cannot be written in a call: a name has no braces, no blanks around it, no"
            " line breaks or other control characters, and no marks such as <|tool_call>"
        )
    # A bare declaration may carry the outer type; null stands for what is absent.
    kept = {
        key: value
        for key, value in function.items()
        if value is not None and (key, value) != ("type", "function")
    }
    return {"type": "function", "function": kept}


def _message(message: Any, where: str, strict: bool) -> dict:
    if not isinstance(message, Mapping):
        raise DgemmaError(f"{where}: must be a dictionary with role and content, not {_type(message)}")
    # APIs send null for what is absent, and templates then print "None": drop those.
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DgemmaError(f"{where}: unknown role {role!r}: use one of {', '.join(ROLES)}")
    message["role"] = role
    if not isinstance(message.get("name", ""), str):
        raise DgemmaError(f"{where}: name must be a string, not {_type(message['name'])}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], role, where, strict)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, where, strict)
    if role == "assistant":
        _take_out_thoughts(message)
    return message


def _content(message: dict, where: str, strict: bool) -> str | list[dict] | dict:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        if isinstance(message.get("refusal"), str):
            return message["refusal"]
        if "tool_calls" in message or any(k in message for k in _THOUGHT_KEYS):
            return ""
    if content is None and message["role"] in ("assistant", "tool") and not strict:
        return ""
    if content is None:
        raise DgemmaError(f"{where}: content is missing")
    if isinstance(content, str):
        return content
    if message["role"] == "tool" and isinstance(content, Mapping):
        return dict(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DgemmaError(f"{where}: content must be a string or a list of parts, not {_type(content)}")
    parts = [_part(part, f"{where}, part {index}") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts) and (len(parts) == 1 or message["role"] == "tool"):
        # What a single string can say is one: not every template reads lists, nor lists in every role.
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise DgemmaError(f"{where}: must be a dictionary with a type, not {_type(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_TYPES:
        raise DgemmaError(f"{where}: unknown type {kind!r}: use text, image or video")
    if _PART_TYPES[kind] == "text":
        key = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(key), str):
            raise DgemmaError(f"{where}: a {kind} part needs a string `{key}`")
        return {"type": "text", "text": part[key]}
    part = dict(part, type=_PART_TYPES[kind])
    if kind.endswith("_url"):
        # OpenAI nests it: {"type": "image_url", "image_url": {"url": …}}
        source = part.pop(kind, None)
        source = source.get("url") if isinstance(source, Mapping) else source
        if not isinstance(source, str):
            raise DgemmaError(f"{where}: an {kind} part needs `{kind}` with a url")
        part["url"] = source
    return part


def _tool_calls(calls: Any, role: str, where: str, strict: bool) -> list[dict]:
    if role != "assistant":
        raise DgemmaError(f"{where}: only an assistant message may have tool_calls, not {role}")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise DgemmaError(f"{where}: tool_calls must be a list, not {_type(calls)}")
    return [_tool_call(call, f"{where}, tool call {index}", strict) for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str, strict: bool) -> dict:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DgemmaError(f"{where}: must be {{'id': …, 'function': {{'name': …, 'arguments': …}}}}")
    arguments = _arguments(function.get("arguments"), where, strict)
    named = {} if call.get("id") is None else {"id": _call_id(call, "id", where)}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _arguments(given: Any, where: str, strict: bool) -> dict[str, Any] | str:
    """A call's arguments: a dictionary, given as such or as JSON text; what is broken stays text."""
    wrong = ""
    arguments = given
    if isinstance(given, str):  # OpenAI sends them as JSON text
        try:
            arguments = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError) as error:
            wrong = f"arguments are not valid JSON: {error}"
    arguments = {} if arguments is None else arguments
    if not wrong and not isinstance(arguments, Mapping):
        wrong = f"arguments must be a dictionary, not {_type(arguments)}"
    elif not wrong and is_deep(dict(arguments), MAX_DEPTH):
        wrong = f"arguments are nested deeper than {MAX_DEPTH} levels"
    if not wrong:
        return dict(arguments)
    if strict:
        raise DgemmaError(f"{where}: {wrong}")
    if isinstance(arguments, Sequence) and not arguments:
        return {}
    text = given if isinstance(given, str) else _as_json(given)
    # A template puts braces around a text: those of the object that it was to be are not said twice.
    text = text.strip().removeprefix("{").removesuffix("}").strip()
    return text or {}


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # nothing that came as JSON
        return ""


def _call_id(owner: Mapping[str, Any], key: str, where: str) -> str | int | None:
    """The id of a tool call, in the call itself or in its answer."""
    call_id = owner.get(key)
    if call_id is not None and not isinstance(call_id, str | int):
        raise DgemmaError(f"{where}: {key} must be a string, not {_type(call_id)}")
    return call_id


def _take_out_thoughts(message: dict) -> None:
    """Moves what the assistant thought, in a field of its own or inside its content, under one name."""
    fields = [message.pop(key) for key in _THOUGHT_KEYS if key in message]
    found = [field for field in fields[:1] if isinstance(field, str) and field]
    if isinstance(message["content"], str):
        message["content"] = _said(message["content"], found)
    else:
        message["content"] = [
            dict(part, text=_said(part["text"], found)) if part["type"] == "text" else part
            for part in message["content"]
        ]
    if found:
        message["reasoning"] = message["reasoning_content"] = "\n\n".join(found)


def _said(text: str, thoughts: list[str]) -> str:
    """The text without its thoughts, which are added to `thoughts`. A text without any stays as it is."""
    if OPEN not in text:
        return text
    reasoning, said = split_thoughts(text)
    thoughts.extend([reasoning] if reasoning else [])
    return said


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
