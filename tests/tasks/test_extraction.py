"""Structured extraction: texts whose record can be read in them, two sides that share nothing, answers that fit."""

import json
import re

import pytest

import dgemma
from dgemma.tasks.extraction import HELD_OUT, KEYS, TRAINING, answer_of, conversations
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.examples import prepare

SHORT = ("type", "date", "ref", "sum", "who")
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def records(rows):
    return [(row[0]["content"], json.loads(row[1]["content"])) for row in rows]


def days_in(text):
    """Every day that a text names, read by rules of the test's own."""
    months = "|".join(MONTHS)
    named = [(month, day) for month, day in re.findall(rf"({months})[a-z]* (\d+)", text)]
    named += [(month, day) for day, month in re.findall(rf"(\d+) ({months})", text)]
    return ({f"{MONTHS.index(month) + 1:02}-{int(day):02}" for month, day in named}
            | set(re.findall(r"2026-(\d\d-\d\d)", text)))


def amounts_in(text):
    return {float(number.replace(",", ".")) for number in re.findall(r"\d+(?:[.,]\d\d)?", text)}


@pytest.mark.parametrize("keys", [("who",), SHORT, KEYS])
@pytest.mark.parametrize("held_out", [False, True])
def test_what_a_record_says_stands_in_its_text(held_out, keys):
    for text, record in records(conversations(400, seed=3, held_out=held_out, keys=keys)):
        assert tuple(record) == keys
        for key in ("ref", "who", "time", "place", "mail"):
            assert record.get(key) is None or text.count(record[key]) == 1, (key, text, record)
        assert record.get("date") is None or record["date"] in days_in(text), (text, record)
        assert record.get("sum") is None or record["sum"] in amounts_in(text), (text, record)


def test_without_distractors_a_text_says_only_what_the_record_says():
    for text, record in records(conversations(200, seed=3, keys=SHORT, distractors=0)):
        assert days_in(text) == {record["date"]} - {None}
        beginnings = [phrase.partition("{")[0] for phrase in TRAINING["any", "beside"]]
        assert not any(beginning in text for beginning in beginnings if beginning), text


@pytest.mark.parametrize("held_out", [False, True])
def test_what_a_text_does_not_say_is_null_and_some_say_nothing(held_out):
    """Full names and codes have shapes that no distractor has."""
    nulls = dict.fromkeys(SHORT, 0)
    for text, record in records(conversations(600, seed=4, held_out=held_out, keys=SHORT)):
        codes = re.findall(r"(?<![\w€$-])(?:[A-Z]{1,2}-?)\d{3,4}\b", text)
        assert set(codes) <= {record["ref"]}
        for key in SHORT:
            nulls[key] += record[key] is None
    assert nulls.pop("type") == 0
    assert all(20 < count < 240 for count in nulls.values()), nulls


def test_short_records_take_one_small_canvas_and_long_ones_two():
    tokenizer = dgemma.load("sudoku").tokenizer
    for keys, canvases in ((SHORT, 1), (KEYS, 2)):
        rows = conversations(10, seed=5, keys=keys) + conversations(10, seed=5, held_out=True, keys=keys)
        rows = [conversation_of({"messages": row}) for row in rows]
        examples = prepare(rows, tokenizer, 90, stop_ids=(1, 106)).examples
        assert max(example.canvas_index for example in examples) + 1 == canvases


def test_held_out_values_and_wordings_are_not_in_training():
    seen, held = (records(conversations(3000, seed=seed, held_out=side)) for seed, side in ((6, False), (6, True)))
    for key in ("date", "ref", "sum"):
        assert not ({r[key] for _, r in seen} & {r[key] for _, r in held}) - {None}, key
    names = [{name for _, r in side if r["who"] for name in r["who"].split()} for side in (seen, held)]
    assert not names[0] & names[1]
    training, held_out = ({w for wordings in side.values() for w in wordings} for side in (TRAINING, HELD_OUT))
    assert not training & held_out
    for wording in training:  # nor is one a piece of the other
        assert not any(wording in other for other in held_out), wording


def test_one_seed_is_one_endless_row():
    whole = conversations(40, seed=7)
    assert whole[:15] == conversations(15, seed=7)
    texts = {row[0]["content"] for seed in (7, 8) for row in conversations(2000, seed=seed)}
    assert len(texts) > 3990  # hardly any comes twice


def test_answers_are_written_as_json_is_spaced():
    for row in conversations(20, seed=9):
        record = json.loads(row[1]["content"])
        assert answer_of(record) == row[1]["content"]
        assert list(record) == list(KEYS)
