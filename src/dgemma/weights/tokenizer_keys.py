"""A checkpoint's tokenizer files as GGUF keys; `chat.gguf_tokenizer` is the other direction.

Works on ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` as plain data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma.fields import read_json
from dgemma.errors import CheckpointError

# Our own keys: the files as they are, for tokenizers that the keys of ggml cannot describe.
TOKENIZER_JSON = "dgemma.tokenizer.json"
TOKENIZER_CONFIG_JSON = "dgemma.tokenizer_config.json"

# Kinds of tokens, by ggml's numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# Special tokens that llama.cpp shall write out, for whoever parses an answer.
_VISIBLE = frozenset(("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
                      "<tool_response|>", '<|"|>'))
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """A checkpoint's tokenizer as GGUF keys; raises CheckpointError when there is none that can be written.

    Gemma's own kind is what `gemma4` names. Any other is written as far as the keys go, and its files are added whole
    under keys of our own.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: a GGUF file holds the tokenizer too; copy tokenizer.json, "
                              "tokenizer_config.json and chat_template.jinja there")
    data = read_json(path)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: this kind of tokenizer cannot be written (a vocabulary by name is needed)")
    added = {entry["content"]: entry for entry in data.get("added_tokens") or ()}
    ids = {**model["vocab"], **{text: entry["id"] for text, entry in added.items()}}
    if max(ids.values(), default=0) >= vocab_size:
        raise CheckpointError(f"{path}: token ids go up to {max(ids.values())}, but the network knows {vocab_size} "
                              "tokens only")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    byte_fallback = bool(model.get("byte_fallback"))
    for text, token_id in ids.items():
        tokens[token_id] = text
        types[token_id] = _token_type(text, added.get(text), model.get("unk_token"), byte_fallback)
    gemma = byte_fallback and _is_gemma(data)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    roles = {role: config.get(f"{role}_token") for role in _ROLES}
    special = {role: value.get("content") if isinstance(value, dict) else value for role, value in roles.items()}
    return {
        "tokenizer.ggml.model": "gemma4" if gemma else "gpt2",
        **({} if gemma else {"tokenizer.ggml.pre": "default"}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * vocab_size,
        "tokenizer.ggml.token_type": types,
        **({"tokenizer.ggml.merges": merges} if merges else {}),
        **{f"tokenizer.ggml.{theirs}_token_id": ids[text] for role, theirs in _ROLES.items()
           if isinstance(text := special[role] or f"<{role}>", str) and text in ids},
        "tokenizer.ggml.add_bos_token": gemma,
        "tokenizer.ggml.add_space_prefix": False,
        **_chat_templates(folder, config),
        **({} if gemma else {TOKENIZER_JSON: path.read_text(encoding="utf-8")}),
        **({} if gemma or not config else {TOKENIZER_CONFIG_JSON: config_path.read_text(encoding="utf-8")}),
    }


def _is_gemma(data: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is byte pairs over text whose spaces are ▁ and which nothing else changes."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    splits = data.get("pre_tokenizer")  # at spaces, of which there are none left
    return (data["model"].get("type") == "BPE" and data.get("normalizer") == spaces
            and (splits is None or (splits.get("type") == "Split" and splits.get("pattern") == {"String": " "})))


def _token_type(text: str, added: Mapping[str, Any] | None, unknown: str | None, byte_fallback: bool) -> int:
    if text == (unknown or "<unk>"):
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added.get("special") and text not in _VISIBLE else _USER_DEFINED
    return _BYTE if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else _NORMAL


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"tokenizer.chat_template": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    named = {entry["name"]: entry["template"] for entry in found or ()}
    others = [name for name in named if name != "default"]
    return {
        **({"tokenizer.chat_template": named["default"]} if "default" in named else {}),
        **{f"tokenizer.chat_template.{name}": named[name] for name in others},
        **({"tokenizer.chat_templates": others} if others else {}),
    }
