"""The bundled byte tokenizer: its ids, and that nothing is ever lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data import tokenizer as bundled

SPELLINGS = sorted(bundled.SPECIAL_IDS)
BACKEND = bundled.build_byte_tokenizer()
TEXTS = st.one_of(
    st.text(), st.lists(st.one_of(st.text(max_size=4), st.sampled_from(SPELLINGS))).map("".join)
)


def test_the_ids_are_gemmas_and_dense():
    vocabulary = bundled.vocabulary()
    assert sorted(vocabulary.values()) == list(range(288))
    assert len(bundled.SPECIAL_IDS) == 32
    fixed = {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<|tool_response>": 50,
        "<|turn>": 105,
        "<turn|>": 106,
    }
    assert {token: BACKEND.token_to_id(token) for token in fixed} == fixed
    assert {BACKEND.id_to_token(i): i for i in range(288)} == vocabulary
    assert BACKEND.get_vocab_size() == 288


def test_every_special_token_is_one_token_and_every_byte_is_one():
    for token, token_id in bundled.SPECIAL_IDS.items():
        assert BACKEND.encode(f"a {token} b", add_special_tokens=False).ids.count(token_id) == 1
    ids = [BACKEND.token_to_id(symbol) for symbol in bundled.byte_symbols()]
    assert len(set(ids)) == 256
    assert BACKEND.encode("\x00Aé", add_special_tokens=False).ids == [ids[byte] for byte in b"\x00A\xc3\xa9"]


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_text_round_trips(text):
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert BACKEND.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_plain_encoding_spells_out_special_tokens(text):
    tokenizer = Tokenizer(BACKEND)
    ids = tokenizer.encode(text, specials=False)
    assert len(ids) == len(text.encode())
    assert not set(ids) & set(bundled.SPECIAL_IDS.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<eos>") == [1]


def test_a_long_text_is_quick_and_whole():
    text = "Ünïcödé 日本語 <|turn>\n" * 20_000
    assert (
        BACKEND.decode(BACKEND.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
    )


def test_broken_utf8_decodes_to_the_replacement_character():
    ids = [BACKEND.token_to_id(bundled.byte_symbols()[byte]) for byte in b"a\xff\xc3b"]
    assert BACKEND.decode(ids) == "a\ufffd\ufffdb"


def test_skipping_special_tokens():
    ids = BACKEND.encode("<bos>hi<turn|><eos>", add_special_tokens=False).ids
    assert BACKEND.decode(ids, skip_special_tokens=True) == "hi"


def test_save_writes_whole_files_and_nothing_else(tokenizer_folder):
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tokenizer_folder.iterdir()) == names
    bundled.save(tokenizer_folder)  # over what is there
    assert json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"


def test_transformers_reads_the_same_tokenizer(tokenizer_folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    text = "<bos><|turn>user\nWie heißt du?\n<turn|>"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
