"""Where examples come from: epochs of conversations, what is held out, and streams."""

import dataclasses
import json
from collections import Counter

import pytest

from dgemma.errors import DgemmaError
from dgemma.model import load
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.sources import source_of, split
from dgemma.train.recipe import ConversationData, ExtractionData, Recipe, SudokuData, TextData


@pytest.fixture(scope="module")
def model():
    return load("sudoku")


def source(model, data, tmp_path, report=print, **others):
    recipe = Recipe(**{"name": "r", "model": "sudoku", "data": data, "max_steps": 1, "batch_size": 3, **others})
    return source_of(recipe, model.tokenizer, model.config, model.generation_config, tmp_path, report)


def test_every_conversation_is_trained_once_an_epoch_and_the_kept_ones_never(model, conversations, tmp_path):
    made = source(model, ConversationData((str(conversations),), held_out_share=0.25, fill="pad"), tmp_path)
    assert made.steps_per_epoch == 2
    kept = {example.turn.row for example in made.held_out(99)}
    for epoch in range(3):
        seen = Counter(example.turn.row for step in (2 * epoch, 2 * epoch + 1) for example in made.batch(step))
        assert set(seen.values()) == {1}
        assert len(seen) == 6
        assert not kept & set(seen)
    assert len(kept) == 2
    assert [c.where for c in made.questions(1)] == [made.held_out(1)[0].turn.row]


def test_other_files_may_be_held_out(model, conversations, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "say nine", "response": "nine"}))
    made = source(model, ConversationData((str(conversations),), (str(other),), fill="pad"), tmp_path)
    assert made.steps_per_epoch == 3
    assert [str(other) in example.turn.row for example in made.held_out(9)] == [True]


@pytest.mark.parametrize(("count", "share", "kept"), [(10, 0.2, 2), (10, 0.0, 0), (1, 0.5, 0), (3, 0.05, 1),
                                                      (200, 0.05, 10)])
def test_a_share_is_held_out_evenly(count, share, kept):
    rows = [conversation_of({"prompt": "a", "response": "b"}, where=f"row {i}") for i in range(count)]
    train, apart = split(rows, share)
    assert (len(train), len(apart)) == (count - kept, kept)
    assert sorted(row.where for row in train + apart) == sorted(row.where for row in rows)


def test_what_is_left_out_is_told(model, conversations, tmp_path):
    with conversations.open("a") as file:
        file.write('\n{"prompt": "no answer"}')
    told = []
    source(model, ConversationData((str(conversations),), skip_bad=True, fill="pad"), tmp_path, told.append)
    assert any("1 left out; the first:" in line for line in told)


def test_fill_has_the_objective_s_weight(model, conversations, tmp_path):
    from dgemma.train.objective import Objective

    made = source(model, ConversationData((str(conversations),), fill="pad"), tmp_path,
                  objective=Objective(fill_weight=0.25))
    assert {weight for example in made.batch(0) for weight in example.weights} == {1.0, 0.25}


def test_puzzles_have_no_end_and_those_kept_are_of_other_grids(model, tmp_path):
    made = source(model, SudokuData(bases=20, plain=True), tmp_path)
    assert [len(made.batch(step)) for step in (0, 10_000)] == [3, 3]
    assert made.batch(7) == made.batch(7)
    batch, examples = made.made.batch(5), made.batch(5)
    assert [example.canvas_ids for example in examples] == batch.canvas.tolist()
    assert [example.context_ids for example in examples] == batch.prompt.tolist()
    assert examples[0].weights == [1.0] * model.config.canvas_length
    assert examples[0].real_length == 90  # nine lines and the end of the turn
    answers = {tuple(example.canvas_ids) for step in range(20) for example in made.batch(step)}
    assert not answers & {tuple(example.canvas_ids) for example in made.held_out(50)}
    questions = made.questions(2)
    assert [question.where.split()[0] for question in questions] == ["easy"] * 2 + ["medium"] * 2 + ["hard"] * 2


def test_a_range_below_the_beginning_of_the_curriculum_is_all_there_is(model, tmp_path):
    made = source(model, SudokuData(bases=40, givens=(28, 30)), tmp_path)
    assert len(made.batch(0)) == 3


def test_a_model_that_cannot_write_an_answer_learns_no_sudoku(model, tmp_path):
    small = dataclasses.replace(model.config, canvas_length=80)
    recipe = Recipe(name="r", model="sudoku", data=SudokuData(bases=4, givens=(30, 40)), max_steps=1, batch_size=3)
    with pytest.raises(DgemmaError, match="cannot learn Sudoku: an answer of 90 tokens does not fit a canvas of 80"):
        source_of(recipe, model.tokenizer, small, model.generation_config, tmp_path)


def test_of_few_bases_the_fewest_givens_there_are_do(model, tmp_path):
    few = source(model, SudokuData(bases=4, givens=(22, 40), easy_givens=22, curriculum_steps=0), tmp_path)
    assert [len(few.batch(step)) for step in range(3)] == [3, 3, 3]
    with pytest.raises(DgemmaError, match="of 4 base puzzles none has 22 givens or fewer, the fewest is 2"):
        source(model, SudokuData(bases=4, givens=(22, 22)), tmp_path)


def test_generated_notes_are_held_out_by_their_wording(model, tmp_path):
    made = source(model, ExtractionData(count=12, held_out=4, keys=("type", "date", "who")), tmp_path)
    assert made.steps_per_epoch == 4
    assert len(made.held_out(99)) == 4
    assert all(json.loads(c.messages[-1]["content"]) for c in made.questions(4))


def test_text_has_no_questions(model, tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n" * 100)
    made = source(model, TextData((str(tmp_path),)), tmp_path)
    assert len(made.batch(0)) == 3
    assert made.questions(5) == []


def test_a_context_beyond_the_model_is_an_error(model, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 30, "response": "short"}))
    data = ConversationData((str(path),), max_context=50, fill="pad")
    with pytest.raises(DgemmaError, match="truncate or skip"):
        source(model, data, tmp_path)
    with pytest.raises(DgemmaError, match="nothing to train on"):
        source(model, dataclasses.replace(data, too_long="skip"), tmp_path)
