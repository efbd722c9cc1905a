"""The tokenizer and chat template out of a GGUF file's metadata.

Works on the keys ``tokenizer.*`` as plain values; knows nothing of files or tensors. What it builds is what Gemma's own
``tokenizer.json`` describes: byte pairs merged over text whose spaces are ▁, and bytes for what has no token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dgemma.chat.template import compiled
from dgemma.chat.tokenizer import MARKS, Tokenizer
from dgemma.errors import CheckpointError
from dgemma.fields import Fields, is_whole, parse_json, shown
from dgemma.gguf import keys
from dgemma.gguf.tokenizer import CONTROL, GGML_ROLES, TOKENIZER_CONFIG_JSON, TOKENIZER_JSON, UNKNOWN, USER_DEFINED
from dgemma.tokenizer_files import ROLES, read_backend, refused_as, special_roles

if TYPE_CHECKING:
    import tokenizers

# llama.cpp's conversion calls some of the chat format's marks "user defined", only so that it shows them. They are as
# special as the others: typed by a user they must be plain text.
_MARK = re.compile(r"<\|.*>|<.*\|>", re.DOTALL)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes; ``source`` names the file in errors.

    Raises CheckpointError when there is none, or one of another kind than DiffusionGemma's.
    """
    if TOKENIZER_JSON in metadata:
        backend, roles = _own(metadata, source)
    else:
        backend, roles = _from_keys(metadata, source)
    return Tokenizer(backend, _templates(metadata, source), roles, source)


def _own(metadata: Mapping[str, Any], source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    fields = Fields(metadata, source)
    backend = read_backend(fields.text(TOKENIZER_JSON, ""), f"{source}: {TOKENIZER_JSON}")
    where = f"{source}: {TOKENIZER_CONFIG_JSON}"
    return backend, special_roles(Fields(parse_json(fields.text(TOKENIZER_CONFIG_JSON, "{}"), where), where))


def _from_keys(metadata: Mapping[str, Any], source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    kind = metadata.get(keys.TOKENIZER_MODEL)
    if kind is None:
        raise CheckpointError(f"{source}: there is no tokenizer in this file (no {keys.TOKENIZER_MODEL})")
    if kind != "gemma4":
        raise CheckpointError(f"{source}: {keys.TOKENIZER_MODEL} {shown(kind)} is not supported ('gemma4' is, "
                              "which is what DiffusionGemma has)")
    tokens = _strings(metadata, keys.TOKENS, source)
    merges = _strings(metadata, keys.MERGES, source)
    types = metadata.get(keys.TOKEN_TYPES, [])
    if not isinstance(types, list) or len(types) not in (0, len(tokens)) or not all(map(is_whole, types)):
        raise CheckpointError(f"{source}: {keys.TOKEN_TYPES} must hold a number for each of the {len(tokens)} "
                              "tokens")
    roles = {}
    for ours, theirs in GGML_ROLES.items():
        key = keys.token_id_key(theirs)
        token_id = metadata.get(key)
        if token_id is None and f"<{ours}>" in tokens:
            roles[f"{ours}_token"] = f"<{ours}>"
        elif token_id is not None:
            if not is_whole(token_id) or not 0 <= token_id < len(tokens):
                raise CheckpointError(f"{source}: {key} is {shown(token_id)}, but there are "
                                      f"{len(tokens)} tokens")
            roles[f"{ours}_token"] = tokens[token_id]
    with refused_as(f"{source}: {keys.MERGES} do not fit {keys.TOKENS}"):
        # Of a token that is there twice the later one counts. Text never becomes the other, as everywhere.
        pairs: Any = [merge.partition(" ")[::2] for merge in merges]
        backend = Backend(models.BPE(
            vocab=dict(zip(tokens, range(len(tokens)), strict=True)), merges=pairs, unk_token=roles.get("unk_token"),
            fuse_unk=True, byte_fallback=True))
    # Nothing splits text into words first: merges never reach across spaces or lines by themselves.
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # What has a role is special whatever the file calls it. `Tokenizer` sees to it: added here it could stay text.
    known = {f"<{role}>" for role in ROLES} | set(roles.values()) | set(MARKS)
    special, plain = {}, []
    for token, kind in zip(tokens, types, strict=False):
        if not token or token in known:
            continue
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and _MARK.fullmatch(token)):
            special[token] = None
        elif kind == USER_DEFINED:
            plain.append(token)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return backend, roles


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{source}: {key} is missing or no list of texts, so there is no tokenizer in this file")
    return value


def _templates(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """The chat templates by name; the usual one is "default"."""
    prefix = keys.CHAT_TEMPLATE
    fields = Fields(metadata, source)
    found = {"default" if key == prefix else key.removeprefix(f"{prefix}."): fields.text(key, "") for key in metadata
             if key == prefix or key.startswith(f"{prefix}.")}
    for name, text in found.items():
        compiled(text, f"{source}: {prefix if name == 'default' else f'{prefix}.{name}'}")
    return {name: text for name, text in found.items() if text}
