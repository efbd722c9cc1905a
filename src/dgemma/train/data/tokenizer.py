"""The tokenizer and chat template that ship with the bundled small models.

A byte-level vocabulary of 288 tokens: the 256 bytes and 32 special tokens. There are no merges, so any UTF-8
text round-trips exactly and its length in tokens is its length in bytes. The special tokens are those of
Gemma 4, at Gemma 4's own ids wherever those fit, so a small model and the released one stop, think and call
tools in the same way.

Works on: token spellings and files. Knows nothing of: tensors, training, how a conversation is encoded
(`dgemma.chat.tokenizer` does that, for any checkpoint).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.files import atomic_write, make_folder
from dgemma.tokenizer_files import byte_symbols

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 288
TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

# Gemma 4's ids, kept where they lie below VOCAB_SIZE. Its media tokens lie far above (around 256000): here
# they take free low ids, and `<unusedN>` fill the special tokens up to 32.
_STRETCHES = {
    0: "<pad> <eos> <bos> <unk> <mask> <|image> <image|> <|image|> <|audio> <audio|> <|audio|> <|video|>",
    12: "<unused0> <unused1> <unused2> <unused3> <unused4> <unused5> <unused6> <unused7>",
    46: '<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>',
    98: "<|think|>", 100: "<|channel> <channel|>", 105: "<|turn> <turn|>"}
SPECIAL_IDS = {token: first + place for first, tokens in _STRETCHES.items()
               for place, token in enumerate(tokens.split())}


def vocabulary() -> dict[str, int]:
    """Every token's spelling and id: the special tokens at `SPECIAL_IDS`, the bytes in order in the gaps."""
    taken = set(SPECIAL_IDS.values())
    free = [token_id for token_id in range(VOCAB_SIZE) if token_id not in taken]
    return {**SPECIAL_IDS, **dict(zip(byte_symbols(), free, strict=True))}


def build_byte_tokenizer() -> Tokenizer:
    """The byte tokenizer, ready to use: 288 tokens, one per byte of ordinary text, nothing normalised."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The special tokens stand in the model's vocabulary too: that is what pins their ids. Without merges the
    # model itself can only ever produce single bytes, so plain text never turns into one of them by itself.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_id = sorted(SPECIAL_IDS, key=SPECIAL_IDS.__getitem__)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in by_id])
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What `tokenizer_config.json` says: the roles of the special tokens, for `dgemma` and `transformers`."""
    roles = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "clean_up_tokenization_spaces": False,
            "padding_side": "left"}


def save(folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `folder`.

    The folder is made if needed. Each file is written beside its place and then renamed over it, so a reader
    never sees half of one. Raises `DgemmaError` when one cannot be written.
    """
    folder = make_folder(folder)
    texts = {"tokenizer.json": build_byte_tokenizer().to_str(pretty=True),
             "tokenizer_config.json": json.dumps(tokenizer_config(), indent=2) + "\n",
             "chat_template.jinja": TEMPLATE_FILE.read_text(encoding="utf-8")}
    for name, text in texts.items():
        with atomic_write(folder / name) as beside:
            beside.write_text(text, encoding="utf-8", newline="\n")
