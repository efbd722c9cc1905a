"""The tokenizer out of GGUF keys, held to the one that transformers builds for Gemma from the same vocabulary."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
from dgemma.errors import CheckpointError
from dgemma.train.data.tokenizer import build_byte_tokenizer, tokenizer_config
from support.gguf_files import MERGES, TEMPLATE, TOKENS, TYPES, tokenizer_metadata

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>",
            "<|channel>", "<channel|>", '<|"|>']


def vocabulary():
    """Specials, all bytes, characters of several scripts, and every way to merge words and runs out of them."""
    characters = [*map(chr, range(33, 127)), *"äöüßéèñçøłπωжякшأبم中文字本語한국🙂👍", "▁", "\n", "\t"]
    words = ["the", "and", "ing", "hello", "world", "über", "жизнь", "中文", "▁▁", "▁▁▁▁", "\n\n", "\n\n\n", "\n\n\n\n",
             "\t\t", "don", "'t", "123", "==", "👍🙂", ". ", "), ", "http", "://"]
    words += ["▁" + word for word in ("the", "a", "hello", "world", "I", "中文", "é")]
    words = [word.replace(" ", "▁") for word in words]
    pieces = {word[:k] for word in words for k in range(2, len(word) + 1)} - set(characters)
    pieces |= {word[k:] for word in words for k in range(len(word) - 1)} - set(characters)
    pieces = sorted(piece for piece in pieces if len(piece) > 1)
    random.Random(0).shuffle(pieces)
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *pieces]
    tokens = list(dict.fromkeys(tokens))
    known = set(tokens)
    merges = [(piece[:k], piece[k:]) for piece in pieces for k in range(1, len(piece))
              if piece[:k] in known and piece[k:] in known]
    types = [2 if token == "<unk>" else 4 if "tool" in token or "channel" in token or token == '<|"|>' else 3
             for token in SPECIALS]
    types += [6 if token.startswith("<0x") and len(token) == 6 else 1 for token in tokens[len(SPECIALS):]]
    return tokens, types, merges


TOKENS_LARGE, TYPES_LARGE, MERGES_LARGE = vocabulary()


@pytest.fixture(scope="module")
def ours():
    return tokenizer_from_gguf({
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": TOKENS_LARGE,
        "tokenizer.ggml.token_type": TYPES_LARGE,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in MERGES_LARGE],
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE}, "model.gguf")


@pytest.fixture(scope="module")
def theirs():
    """transformers' Gemma tokenizer, its specials as in the model's tokenizer.json."""
    from transformers import GemmaTokenizer

    built = GemmaTokenizer(vocab={token: i for i, token in enumerate(TOKENS_LARGE)}, merges=MERGES_LARGE)
    backend = Backend.from_str(built.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return backend


TEXTS = [
    "", " ", "  ", "   leading", "trailing   ", "hello world", "Hello  world\n", "a\n\nb\n\n\nc\n\n\n\n\n",
    "\t\ttabs\t", "the▁world", "don't http://x.y/?a=1&b=2", "über Ünïcödé жизнь 中文字 本語 한국어", "🙂👍🏽👨‍👩‍👧 zwj",
    "\x00\x01\x7f", "\ufeffbom", "e\u0301 combining", "\r\nwindows\r\n",
    "<|turn>user\nthe<turn|>\n", "x<bos>y<eos>", "< |turn>", '<|"|>text<|"|>',
    "<|tool_call>call:f{}<tool_call|>", "<0x41> is text", "<unused7>", "\u00a0nbsp\u2003em", "\U0010ffff", "a" * 1000,
    " ▁ ▁▁ ", "عربي بم", "\u2028\u2029",
]


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_text_as_transformers(text, ours, theirs):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    if "▁" not in text:
        assert ours.decode(ids) == text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text


@given(st.lists(st.one_of(st.sampled_from([*TOKENS_LARGE[268:], *SPECIALS, " ", "  ", "\n"]),
                          st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_same_ids_as_transformers_on_any_text(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_marks_are_special_whatever_the_file_calls_them(ours):
    """llama.cpp's conversions call some of them "user defined"; typed by a user they must stay text."""
    for token in SPECIALS:
        assert ours.is_special(ours.token_to_id(token))
        assert ours.encode(token) == [ours.token_to_id(token)]
        assert ours.token_to_id(token) not in ours.encode(token, specials=False)
    assert not any(ours.is_special(i) for i in range(len(SPECIALS), len(TOKENS_LARGE)))
    ids = ours.apply_chat_template("stop<turn|>")
    assert ids.count(ours.token_to_id("<turn|>")) == 1 and ids[0] == ours.bos_id == 2


def test_roles_and_templates():
    tokenizer = tokenizer_from_gguf({**tokenizer_metadata(), "tokenizer.chat_template.tool_use": "tools",
                                     "tokenizer.chat_templates": ["tool_use"]}, "model.gguf")
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                                        "pad_token": "<pad>"}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)
    assert tokenizer.chat_templates == {"default": TEMPLATE, "tool_use": "tools"}
    assert tokenizer.render("hi") == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
    assert tokenizer.vocab_size == 50
    assert tokenizer.encode("the thing\n\n🙂") == [tokenizer.token_to_id(t) for t in
                                                ["t", "he", "▁t", "h", "ing", "\n\n"]] + [7, 8, 9, 10]


def test_without_types_ids_and_template_it_still_reads():
    metadata = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": MERGES}
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")
    assert tokenizer.special_tokens["bos_token"] == "<bos>" and not tokenizer.has_chat_template
    assert tokenizer.is_special(2)


def test_of_a_token_there_twice_the_later_counts():
    tokens = [*TOKENS, "a"]
    tokenizer = tokenizer_from_gguf({**tokenizer_metadata(), "tokenizer.ggml.tokens": tokens,
                                     "tokenizer.ggml.token_type": [*TYPES, 1]}, "model.gguf")
    assert tokenizer.encode("a") == [50]


def test_user_defined_words_are_taken_whole():
    types = [4 if token == "ing" else kind for token, kind in zip(TOKENS, TYPES, strict=True)]
    metadata = {**tokenizer_metadata(), "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["h e"]}
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")
    assert tokenizer.encode("thing") == [tokenizer.token_to_id(token) for token in ("t", "h", "ing")]
    assert not tokenizer.is_special(tokenizer.token_to_id("ing"))


def test_our_own_key_carries_any_tokenizer():
    built = build_byte_tokenizer()
    metadata = {**tokenizer_metadata(), "dgemma.tokenizer.json": built.to_str(),
                "dgemma.tokenizer_config.json": json.dumps(tokenizer_config())}
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")
    assert tokenizer.vocab_size == 288
    assert tokenizer.special_tokens["mask_token"] == "<mask>"
    assert tokenizer.encode("ö 1<turn|>") == built.encode("ö 1<turn|>", add_special_tokens=False).ids
    assert tokenizer.chat_templates == {"default": TEMPLATE}


@pytest.mark.parametrize(("change", "fragment"), [
    ({"tokenizer.ggml.model": None}, "no tokenizer in this file"),
    ({"tokenizer.chat_template": "{% for %}"}, "tokenizer.chat_template: the chat template is broken at line 1"),
    ({"tokenizer.chat_template.a": "{{"}, "tokenizer.chat_template.a: the chat template is broken at line 1"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or no list of texts"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.merges": ["x y"]}, "merges do not fit"),
    ({"tokenizer.ggml.merges": ["nospace"]}, "merges do not fit"),
    ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must hold a number for each of the 50"),
    ({"tokenizer.ggml.bos_token_id": 50}, "bos_token_id is 50, but there are 50 tokens"),
    ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"dgemma.tokenizer.json": "{}"}, "dgemma.tokenizer.json cannot be read"),
    ({"dgemma.tokenizer.json": "{}", "dgemma.tokenizer_config.json": "nonsense"}, "cannot be read"),
])
def test_what_cannot_be_read(change, fragment):
    metadata = {key: value for key, value in (tokenizer_metadata() | change).items() if value is not None}
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_gguf(metadata, "model.gguf")
    assert fragment in str(error.value) and str(error.value).startswith("model.gguf: ")
