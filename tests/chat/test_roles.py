"""Tokens with a role (<pad> <eos> <bos> <unk> <mask>) and the format's marks are special, whatever a file says."""

import json

import pytest

from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
from dgemma.chat.tokenizer import MARKS, Tokenizer
from dgemma.cli.terminal.drafts import Place, spell
from dgemma.cli.terminal.view import CanvasView
from dgemma.diffusion.events import CanvasStarted, Denoised
from dgemma.tokenizer_files import ROLES
from support.gemma_files import SPECIALS, tokenizer_json, write_tokenizer
from support.gguf_files import MERGES

ROLE_TOKENS = [f"<{role}>" for role in ROLES]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁",
          *"abcdefghijklmnopqrstuvwxyz<>|/", "\n\n", "▁t", "he", "▁the", "▁▁", "in", "ing", "</b>"]
# As llama.cpp's conversion writes them for a tokenizer whose eos_token is "<turn|>".
PUBLISHED = [3, 1, 3, 3, 1] + [4 if "channel" in mark or "tool" in mark else 3 for mark in MARKS]


def from_gguf(types, **keys):
    """A tokenizer whose specials are typed so; `keys` are of ``tokenizer.ggml.``."""
    rest = len(TOKENS) - len(types)
    bytes_ = [6] * 256
    return tokenizer_from_gguf({
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": types + bytes_ + [1] * (rest - 256),
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": TOKENS.index("<turn|>"),
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}, "model.gguf")


def check_special(tokenizer, token):
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None and tokenizer.is_special(token_id), token
    assert tokenizer.encode(f"a{token}b") == [*tokenizer.encode("a"), token_id, *tokenizer.encode("b")]
    assert token_id not in tokenizer.encode(f"a{token}b", specials=False)
    assert tokenizer.decode(tokenizer.encode(f"a{token}b"), skip_special_tokens=True) == "ab"


def added(tokenizer):
    return [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6])
def test_roles_in_a_gguf_file_are_special_whatever_their_type(kind):
    tokenizer = from_gguf([kind] * 5 + [3] * len(MARKS))
    for token in ROLE_TOKENS:
        check_special(tokenizer, token)
        assert added(tokenizer).count(token) == 1
    assert tokenizer.vocab_size == len(TOKENS)


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_so_are_the_marks(kind):
    tokenizer = from_gguf([3] * 5 + [kind] * len(MARKS))
    for token in MARKS:
        check_special(tokenizer, token)
    assert tokenizer.vocab_size == len(TOKENS)


def test_a_published_file_whose_turns_end_in_eos_token():
    tokenizer = from_gguf(PUBLISHED)
    for token in (*ROLE_TOKENS, *MARKS):
        check_special(tokenizer, token)
    assert tokenizer.special_tokens["eos_token"] == "<turn|>"
    assert tokenizer.end_of_text_id == TOKENS.index("<eos>") != tokenizer.eos_id


def test_what_only_looks_like_a_role_stays_text():
    tokenizer = from_gguf(PUBLISHED)
    for token in ("</b>", "<", "ing"):
        assert not tokenizer.is_special(tokenizer.token_to_id(token))
    without = tokenizer_from_gguf({"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": TOKENS[5:],
                                   "tokenizer.ggml.merges": MERGES}, "model.gguf")
    assert without.vocab_size == len(TOKENS) - 5 and without.token_to_id("<eos>") is None  # no token is made up
    assert without.end_of_text_id is without.eos_id is without.padding_id is None


@pytest.mark.parametrize("form", ["plain", "left-out", "mixed"])
def test_a_folder_that_leaves_roles_ordinary(form, tmp_path):
    """`tokenizer.json` may call an added token plain, or leave it among the words."""
    write_tokenizer(tmp_path)
    data = tokenizer_json()
    for entry in data["added_tokens"]:
        entry["special"] = False
    if form != "plain":
        data["added_tokens"] = [] if form == "left-out" else data["added_tokens"][::2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<turn|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for token in SPECIALS.values():
        check_special(tokenizer, token)
        assert added(tokenizer).count(token) == 1
    assert tokenizer.vocab_size == len(data["model"]["vocab"])
    assert (tokenizer.eos_id, tokenizer.end_of_text_id) == (6, 1)


def test_a_role_that_the_vocabulary_lacks_is_not_made_up(tmp_path):
    write_tokenizer(tmp_path)
    roles = {"eos_token": "</s>", "pad_token": {"content": "[PAD]"}, "sep_token": "[SEP]", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == len(tokenizer_json()["model"]["vocab"])
    assert tokenizer.eos_id is None and tokenizer.end_of_text_id == 1
    assert tokenizer.pad_id is None and tokenizer.padding_id == 0


# What is seen of it


@pytest.mark.parametrize("fill", ["<eos>", "<pad>"])
def test_a_draft_shows_no_fill_and_counts_none(fill):
    tokenizer = from_gguf(PUBLISHED)

    def piece_of(token):
        return tokenizer.token_bytes(token), tokenizer.is_special(token)

    ids = tokenizer.encode(f"the thing{fill * 6}")
    said = tokenizer.encode("the thing")
    spelling = spell([(token, "settled") for token in ids], Place(), piece_of)
    assert "".join(char for char, _ in spelling.glyphs).rstrip("·") == "the thing"
    assert spelling.length == len(said)

    view = CanvasView(piece_of)
    view.apply(CanvasStarted(0, 0, ids, [False] * len(ids), 4, 0.0))
    count = len(ids)
    view.apply(Denoised(0, 0, 1, ids, ids, [0.0] * count, [True] * count, [False] * count, 0.8, 2.0))
    shown = "".join(segment.text for line in view.frame(100, 10) for segment in line)
    assert "<eos>" not in shown and "<pad>" not in shown
    assert f"({len(said) / 2.0:.1f}/s)" in shown
