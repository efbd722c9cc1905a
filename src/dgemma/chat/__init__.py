"""Messages to tokens, and a model's raw output back to text, thoughts and tool calls.

The checkpoint's own tokenizer and template do the work. Knows nothing of: the network, sampling, HTTP.
Importing this package imports nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgemma.chat.answer import Answer, AnswerReader, read_answer
    from dgemma.chat.messages import normalise_messages, normalise_tools
    from dgemma.chat.repair import read_calls
    from dgemma.chat.reply import ReplyReader
    from dgemma.chat.thoughts import Stretch, ThoughtParser, split_thoughts
    from dgemma.chat.tokenizer import Tokenizer

_HOMES = {
    "Answer": "answer", "AnswerReader": "answer", "read_answer": "answer", "Tokenizer": "tokenizer",
    "normalise_messages": "messages", "normalise_tools": "messages", "ReplyReader": "reply",
    "Stretch": "thoughts", "ThoughtParser": "thoughts", "split_thoughts": "thoughts", "read_calls": "repair",
}

__all__ = ["Answer", "AnswerReader", "ReplyReader", "Stretch", "ThoughtParser", "Tokenizer", "normalise_messages",
           "normalise_tools", "read_answer", "read_calls", "split_thoughts"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
