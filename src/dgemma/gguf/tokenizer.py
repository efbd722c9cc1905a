"""A checkpoint's tokenizer files as GGUF keys; `chat.gguf_tokenizer` is the other direction.

Works on ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` as plain data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma.errors import CheckpointError
from dgemma.fields import parse_json
from dgemma.gguf import keys
from dgemma.tokenizer_files import ROLE_KEYS, read_tokenizer_files, special_roles

# Our own keys: the files as they are, for tokenizers that the keys of ggml cannot describe.
TOKENIZER_JSON = "dgemma.tokenizer.json"
TOKENIZER_CONFIG_JSON = "dgemma.tokenizer_config.json"

# Kinds of tokens, by ggml's numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Special tokens that llama.cpp shall write out, for whoever parses an answer.
_VISIBLE = frozenset(("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
                      "<tool_response|>", '<|"|>'))
# A role -> what ggml's keys call it.
GGML_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """A checkpoint's tokenizer as GGUF keys; raises CheckpointError when there is none that can be written.

    Gemma's own kind is what `gemma4` names. Any other is written as far as the keys go, and its files are added whole
    under keys of our own.
    """
    files = read_tokenizer_files(folder, "a GGUF file holds the tokenizer too; copy tokenizer.json, "
                                 "tokenizer_config.json and chat_template.jinja there")
    path = files.path
    data = parse_json(files.json_text, str(path))
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: this kind of tokenizer cannot be written (a vocabulary by name is needed)")
    added = {entry["content"]: entry for entry in data.get("added_tokens") or ()}
    ids = {**model["vocab"], **{text: entry["id"] for text, entry in added.items()}}
    if max(ids.values(), default=0) >= vocab_size:
        raise CheckpointError(f"{path}: token ids go up to {max(ids.values())}, but the network knows {vocab_size} "
                              "tokens only")
    roles = special_roles(files.config)
    special = {f"<{role}>" for role in GGML_ROLES} | {text for key, text in roles.items() if key in ROLE_KEYS}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    byte_fallback = bool(model.get("byte_fallback"))
    for text, token_id in ids.items():
        tokens[token_id] = text
        types[token_id] = _token_type(text, added.get(text), model.get("unk_token"), byte_fallback, text in special)
    gemma = byte_fallback and _is_gemma(data)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    return {
        keys.TOKENIZER_MODEL: "gemma4" if gemma else "gpt2",
        **({} if gemma else {"tokenizer.ggml.pre": "default"}),
        keys.TOKENS: tokens,
        "tokenizer.ggml.scores": [0.0] * vocab_size,
        keys.TOKEN_TYPES: types,
        **({keys.MERGES: merges} if merges else {}),
        **{keys.token_id_key(theirs): ids[text] for role, theirs in GGML_ROLES.items()
           if (text := roles.get(f"{role}_token") or f"<{role}>") in ids},
        "tokenizer.ggml.add_bos_token": gemma,
        "tokenizer.ggml.add_space_prefix": False,
        **_chat_templates(files.templates),
        **({} if gemma else {TOKENIZER_JSON: files.json_text}),
        **({} if gemma or not files.config_text else {TOKENIZER_CONFIG_JSON: files.config_text}),
    }


def _is_gemma(data: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is byte pairs over text whose spaces are ▁ and which nothing else changes."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    splits = data.get("pre_tokenizer")  # at spaces, of which there are none left
    return (data["model"].get("type") == "BPE" and data.get("normalizer") == spaces
            and (splits is None or (splits.get("type") == "Split" and splits.get("pattern") == {"String": " "})))


def _token_type(text: str, added: Mapping[str, Any] | None, unknown: str | None, byte_fallback: bool,
                has_role: bool) -> int:
    if text == (unknown or "<unk>"):
        return UNKNOWN
    if has_role and text not in _VISIBLE:
        return CONTROL
    if added is not None:
        return CONTROL if added.get("special") and text not in _VISIBLE else USER_DEFINED
    return BYTE if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL


def _chat_templates(found: str | dict[str, str] | None) -> dict[str, Any]:
    named = {"default": found} if isinstance(found, str) else found or {}
    others = [name for name in named if name != "default"]
    return {
        **{keys.CHAT_TEMPLATE if name == "default" else f"{keys.CHAT_TEMPLATE}.{name}": named[name] for name in named},
        **({"tokenizer.chat_templates": others} if others else {}),
    }


def mended_types(metadata: Mapping[str, Any]) -> list[int] | None:
    """``tokenizer.ggml.token_type`` of a file with the tokens that have a role as `tokenizer_metadata` types them.

    Conversions that go by an ``eos_token`` of "<turn|>" leave `<eos>` an ordinary token. None: nothing to mend.
    """
    tokens, types = metadata.get(keys.TOKENS), metadata.get(keys.TOKEN_TYPES)
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        return None
    own = {f"<{role}>": UNKNOWN if role == "unk" else CONTROL for role in GGML_ROLES}
    mended = [own[token] if token in own and kind in (NORMAL, USER_DEFINED) else kind
              for token, kind in zip(tokens, types, strict=True)]
    return mended if mended != types else None
