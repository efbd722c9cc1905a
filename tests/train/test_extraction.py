"""Structured extraction: texts whose record can be read in them, two sides that share nothing, answers that fit."""

import json
import re
from itertools import pairwise

import pytest

import dgemma
from dgemma.errors import DgemmaError
from dgemma.train import extraction_phrases
from dgemma.train.conversations import read_conversations
from dgemma.train.examples import prepare
from dgemma.train.extraction import (
    KEYS,
    LONG_KEYS,
    LONG_SCHEMA,
    MAX_ANSWER,
    MAX_LONG_ANSWER,
    MAX_LONG_TEXT,
    MAX_TEXT,
    SCHEMA,
    answer_of,
    conversations,
    write_jsonl,
)

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def records(rows):
    return [(row.messages[0]["content"], json.loads(row.messages[1]["content"])) for row in rows]


def days_in(text):
    """Every day that a text names, read by rules of the test's own."""
    months = "|".join(MONTHS)
    named = [(month, day) for month, day in re.findall(rf"({months})[a-z]* (\d+)", text)]
    named += [(month, day) for day, month in re.findall(rf"(\d+) ({months})", text)]
    return ({f"{MONTHS.index(month) + 1:02}-{int(day):02}" for month, day in named}
            | set(re.findall(r"2026-(\d\d-\d\d)", text)))


def amounts_in(text):
    return {float(number.replace(",", ".")) for number in re.findall(r"\d+(?:[.,]\d\d)?", text)}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_what_a_record_says_stands_in_its_text(held_out, long):
    for text, record in records(conversations(400, seed=3, held_out=held_out, long=long)):
        assert tuple(record) == (LONG_KEYS if long else KEYS)
        for key in ("ref", "who", "time", "place", "mail"):
            assert record.get(key) is None or text.count(record[key]) == 1, (key, text, record)
        assert record["date"] is None or record["date"] in days_in(text), (text, record)
        assert record["sum"] is None or record["sum"] in amounts_in(text), (text, record)


@pytest.mark.parametrize("held_out", [False, True])
def test_what_a_text_does_not_say_is_null_and_some_say_nothing(held_out):
    """Full names and codes have shapes that no distractor has."""
    nulls = dict.fromkeys(KEYS, 0)
    for text, record in records(conversations(600, seed=4, held_out=held_out)):
        codes = re.findall(r"(?<![\w€$-])(?:[A-Z]{1,2}-?)\d{3,4}\b", text)
        assert set(codes) <= {record["ref"]}
        for key in KEYS:
            nulls[key] += record[key] is None
    assert nulls.pop("type") == 0
    assert all(20 < count < 240 for count in nulls.values()), nulls


def test_texts_and_answers_fit():
    tokenizer = dgemma.load("sudoku").tokenizer
    for long, most_text, most_answer, canvases in ((False, MAX_TEXT, MAX_ANSWER, {1}),
                                                   (True, MAX_LONG_TEXT, MAX_LONG_ANSWER, {2})):
        rows = conversations(500, seed=5, long=long) + conversations(500, seed=5, long=long, held_out=True)
        assert max(len(row.messages[0]["content"].encode()) for row in rows) <= most_text
        assert max(len(row.messages[1]["content"].encode()) for row in rows) <= most_answer
        rows = rows[490:510]  # templates are slow
        examples = prepare(rows, tokenizer, 90, stop_ids=(1, 106)).examples
        per_turn = [example.canvas_index + 1 for example, after in pairwise([*examples, examples[0]])
                    if after.canvas_index == 0]
        assert set(per_turn) == canvases
        assert len(per_turn) == len(rows)


def test_held_out_values_and_wordings_are_not_in_training():
    seen, held = (records(conversations(3000, seed=seed, held_out=side)) for seed, side in ((6, False), (6, True)))
    for key in ("date", "ref", "sum"):
        assert not ({r[key] for _, r in seen} & {r[key] for _, r in held}) - {None}, key
    names = [{name for _, r in side if r["who"] for name in r["who"].split()} for side in (seen, held)]
    assert not names[0] & names[1]
    phrases = [*extraction_phrases.OPENINGS.values(), *extraction_phrases.EXTRA.values(),
               extraction_phrases.DISTRACTORS,
               *(phrases for kind in extraction_phrases.FIELDS.values() for phrases in kind.values())]
    training = {wording for p in phrases for wording in p.training}
    assert not training & {wording for p in phrases for wording in p.held_out}
    for wording in training:  # nor is one a piece of the other
        assert not any(wording in other for p in phrases for other in p.held_out), wording


def test_one_seed_is_one_endless_row():
    whole = conversations(40, seed=7)
    assert conversations(15, seed=7, start=25) == whole[25:]
    assert whole == conversations(40, seed=7)
    texts = {row.messages[0]["content"] for seed in (7, 8) for row in conversations(2000, seed=seed)}
    assert len(texts) > 3990  # hardly any comes twice
    assert {row.messages[0]["content"] for row in conversations(40, seed=8)}.isdisjoint(
        row.messages[0]["content"] for row in whole)


def test_answers_have_the_schema_and_the_models_own_constraint_accepts_them():
    from dgemma.constrain import constraint_of

    model = dgemma.load("sudoku")
    for schema, long in ((SCHEMA, False), (LONG_SCHEMA, True)):
        form = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}
        constraint = constraint_of(form, model.tokenizer, model.generation_config.eos_token_id)
        assert constraint is not None
        for row in conversations(5, seed=9, long=long):
            answer = row.messages[1]["content"]
            record = json.loads(answer)
            assert answer_of(record) == answer
            assert list(record) == schema["required"]
            guide = constraint.guide(200)
            guide.commit(model.tokenizer.encode(answer))
            assert guide.finished
            with pytest.raises(ValueError, match="constraint"):
                constraint.guide(200).commit(model.tokenizer.encode(answer.replace('"type"', '"kind"')))


def test_a_file_of_conversations_is_read_back(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, 20, seed=10, held_out=True)
    rows = read_conversations(path).rows
    assert [row.messages for row in rows] == [row.messages for row in conversations(20, seed=10, held_out=True)]
    assert all(row.trained == (1,) for row in rows)
    with pytest.raises(DgemmaError, match="cannot be written"):
        write_jsonl(tmp_path / "train.jsonl" / "below", 1, seed=0)
