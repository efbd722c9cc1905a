"""Questions, metrics and scores say what they claim, and one bad answer does not end a run."""

import dataclasses
import json

import pytest

import dgemma
from dgemma.diffusion.events import Generation
from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku
from dgemma.tasks.evaluate import evaluate_sudoku
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.turns import turn_of
from dgemma.train.eval.metrics import METRICS, Question, metric_identity, metric_of, pairs
from dgemma.train.eval.tasks import questions_of, run_task
from support.reference import randomise

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"name": "weather", "arguments": {"city": "Paris", "days": 2}}


@pytest.fixture(scope="module")
def model():
    return dgemma.load("sudoku")


def answer(text="", calls=(), reason="stop", steps=(3, 1), tokens=8):
    return Generation(text, None, list(calls), [5] * tokens, reason, list(steps), tokens / sum(steps), 4, 0.1)


def ask(text, reference="yes", **fields):
    return Question([{"role": "user", "content": text}], reference, where=f"row {text}", **fields)


class Scripted:
    """Stands for a model: what is said to each prompt (an exception is raised), and what it was asked with."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def generate_batch(self, prompts, *, seeds=None, max_tokens=None, **options):
        asked = [prompt[-1]["content"] for prompt in prompts]
        self.calls.append((asked, seeds, max_tokens, options))
        found = [self.answers[text] for text in asked]
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found


def score(metric, reference, text, calls=(), wanted=()):
    return METRICS[metric].score(ask("?", reference, tool_calls=list(wanted)), answer(text, calls))


# ---- questions -------------------------------------------------------------------------------------

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
    {"role": "assistant", "reasoning": "first thought", "content": "1"}, {"role": "user", "content": "weather?"},
    {"role": "assistant", "reasoning": "second thought", "content": "", "tool_calls": [{"function": CALL}]},
    {"role": "tool", "name": "weather", "content": "rain"}, {"role": "assistant", "content": "It rains."}],
    "tools": TOOLS}


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_a_question_is_asked_with_the_very_tokens_that_are_trained_on(model, thinking):
    conversation = conversation_of(CHAT)
    questions = questions_of([conversation], thinking)
    assert [question.reference for question in questions] == ["1", "", "It rains."]
    assert [question.tool_calls for question in questions] == [[], [CALL], []]
    for question, index in zip(questions, conversation.trained, strict=True):
        turn = turn_of(conversation, index, model.tokenizer, thinking=thinking)
        ids = model.prompt_ids(question.prompt, thinking=question.thinking, tools=question.tools)
        assert ids == turn.context_ids
        assert question.where == turn.where
    kept = any("reasoning" in message for question in questions for message in question.prompt)
    assert kept == (thinking != "off")  # not every template leaves them out by itself


def test_turns_that_are_not_trained_are_not_asked():
    messages = [dict(message) for message in CHAT["messages"][:3]]
    assert len(questions_of([conversation_of({"messages": messages})])) == 1
    messages[2]["weight"] = 0
    more = [*messages, {"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]
    assert [one.reference for one in questions_of([conversation_of({"messages": more})])] == ["2"]


# ---- metrics ---------------------------------------------------------------------------------------


def test_exact_forgives_white_space_only():
    assert score("exact", "a  b\nc", " a b c\n")["exact"] == 1
    assert score("exact", "ab", "a b")["exact"] == score("exact", "a", "A")["exact"] == 0
    assert score("exact", "", "", wanted=[CALL])["exact"] == 0
    assert score("exact", "", "", [CALL], [CALL])["exact"] == 1


def test_contains_finds_the_reference_inside():
    assert score("contains", "42", "It is 42, I think")["contains"] == 1
    assert score("contains", "4 2", "It is 42")["contains"] == 0
    with pytest.raises(DgemmaError, match=r"row \?: the metric \"contains\""):
        score("contains", " ", "anything")


def test_tool_calls_compare_names_and_arguments_in_any_order():
    other = {"name": "weather", "arguments": {"days": 2.0, "city": "Rome"}}
    assert score("tool_calls", "", "", [other, CALL], [CALL, other]) == {"tool_calls": 1, "tool_names": 1}
    assert score("tool_calls", "", "", [other], [CALL]) == {"tool_calls": 0, "tool_names": 1}
    assert score("tool_calls", "", "", [CALL, CALL], [CALL]) == {"tool_calls": 0, "tool_names": 0}
    assert score("tool_calls", "text", "", [], [CALL]) == {"tool_calls": 0, "tool_names": 0}
    assert score("tool_calls", "text", "other text") == {"tool_calls": 1, "tool_names": 1}


def test_json_pairs_tell_values_apart():
    assert pairs({"a": [1, {"b": None}], "c": {}}) == {(("a", 0), "1"), (("a", 1, "b"), "null"), (("c",), "{}")}
    assert pairs(1.0) == pairs(1) != pairs("1")
    assert pairs(True) != pairs(1)


def test_json_scores_fields_records_and_all_pairs_together():
    rows = [score("json", '{"a": 1, "b": "x"}', text) for text in
            ('{"b": "x", "a": 1}', '{"a": 1, "b": "y", "c": 3}', "no JSON", '{"a": NaN}')]
    assert [row["record"] for row in rows] == [1, 0, 0, 0]
    assert [row["fields"] for row in rows] == [1, 0.5, 0, 0]
    assert [row["valid_json"] for row in rows] == [1, 1, 0, 0]
    # 3 pairs right, 5 given, 8 wanted
    assert METRICS["json"].summary(rows) == pytest.approx(
        {"record": 0.25, "fields": 0.375, "valid_json": 0.5, "precision": 3 / 5, "recall": 3 / 8, "f1": 6 / 13})
    assert score("json", "[]", "[" * 100_000)["valid_json"] == 0
    with pytest.raises(DgemmaError, match="needs a reference answer that is JSON"):
        score("json", "hello", "{}")


def test_sudoku_is_scored_by_band_and_only_on_sudoku():
    (puzzle,), (solution,) = sudoku.generate(1, 35, seed=1)
    grid = sudoku.format_grid(solution)
    question = ask(f"Solve {sudoku.to_line(puzzle)}", grid)
    right = {"solved": 1, "givens_kept": 1, "solved/medium": 1, "givens_kept/medium": 1}
    assert METRICS["sudoku"].score(question, answer(grid)) == right
    cell = int((puzzle == 0).argmax())
    wrong = solution.copy()
    wrong[cell] = wrong[cell] % 9 + 1
    assert METRICS["sudoku"].score(question, answer(sudoku.format_grid(wrong))) == right | {
        "solved": 0, "solved/medium": 0}
    with pytest.raises(DgemmaError, match=r"row hello: the metric \"sudoku\""):
        METRICS["sudoku"].score(ask("hello", grid), None)


# ---- the user's own --------------------------------------------------------------------------------


def own(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def words(question, generation):\n    {body}\n")
    return metric_of(f"{tmp_path}/mine.py:words")


def test_pictures_of_puzzles_are_read_solved_or_text():
    puzzle, solution = (grid[0] for grid in sudoku.generate(1, 42, seed=3))
    said, solved = sudoku.format_grid(puzzle), sudoku.format_grid(solution)
    part = {"type": "image", "image": b"", "name": "photo"}
    pictured = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    score = METRICS["sudoku_pictures"].score
    assert score(Question(pictured, said), answer(said)) == {"right": 1.0, "read/photo": 1.0}
    assert score(Question(pictured, said), answer(solved)) == {"right": 0.0, "read/photo": 0.0}
    assert score(Question(pictured, solved), answer(solved)) == {"right": 1.0, "solved/photo": 1.0}
    assert score(Question(pictured, solved), None) == {"right": 0.0, "solved/photo": 0.0}
    assert score(ask(said, solved), answer(solved)) == {"right": 1.0, "solved/text": 1.0}
    with pytest.raises(DgemmaError, match="needs a grid"):
        score(Question(pictured, "a cat"), None)



def test_a_function_of_the_users_scores(tmp_path):
    metric = own(tmp_path, "return len(generation.text.split()) / len(question.reference.split())")
    found = run_task(Scripted({"a": answer("x"), "b": answer("x y")}), [ask("a", "1 2"), ask("b", "1 2")], metric)
    assert (found.main, found.value) == ("task/words", 0.75)
    metric = own(tmp_path, "return {'good': generation.text == 'x', 'length': 2.5}")
    found = run_task(Scripted({"a": answer("x"), "b": RuntimeError("no"), "c": answer("y")}),
                     [ask("a"), ask("b"), ask("c")], metric)
    assert (found.main, found.value, found.values["task/length"]) == ("task/good", 1 / 3, 5 / 3)
    assert set(found.intervals) == {"task/good"}


@pytest.mark.parametrize(("body", "message"), [
    ("return int(generation.text)", r"mine\.py, line 2: the metric words failed on the answer to row a: ValueError"),
    ("import ast; return ast.literal_eval('(')", r"mine\.py, line 2: .*SyntaxError"),
    ("return None", "must return a finite number"), ("return float('nan')", "must return a finite number"),
    ("return {}", "no value"), ("return {'failed': 1}", "call it something else"),
    ("return generation.txt", r"line 2: .*no attribute 'txt'")])
def test_a_function_that_goes_wrong_is_named_with_its_line(tmp_path, body, message):
    with pytest.raises(DgemmaError, match=message):
        run_task(Scripted({"a": answer("x")}), [ask("a")], own(tmp_path, body))


@pytest.mark.parametrize(("name", "text", "message"), [
    ("nothing", "", "no metric 'nothing': use one of exact, json"), ("a.py:f", None, r"a\.py: no such file"),
    ("a.py:f", "x = 1", "no function 'f'"), ("a.py:f", "f = 3", "no function 'f'"),
    ("a.py:f", "\nimport no_such_module_here", r"a\.py, line 2: .*ModuleNotFoundError"),
    ("a.py:f", "\n\ndef f(:", r"a\.py, line 3: .*SyntaxError"), ("a.py:", "", "no metric"), ("a:f", "", "no metric")])
def test_a_metric_that_cannot_be_had_is_named(tmp_path, name, text, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "a.py").write_text(text)
    with pytest.raises(DgemmaError, match=message):
        metric_of(name)


# ---- runs ------------------------------------------------------------------------------------------


def test_values_intervals_and_samples_are_of_all_answers():
    model = Scripted({"a": answer("yes", steps=(2, 4), tokens=30), "b": answer("no", steps=(6,), tokens=6)})
    found = run_task(model, [ask("a"), ask("b")], "exact", seed=7, max_tokens=5, t_max=0.9)
    assert model.calls == [(["a", "b"], [7, 8], 5, {"t_max": 0.9})]
    seconds = found.values.pop("task/seconds_per_answer")
    assert 0 <= seconds < 1
    assert found.values == {"task/exact": 0.5, "task/steps_per_canvas": 4, "task/tokens_per_forward": 3,
                            "task/failed": 0}
    assert found.intervals == {"task/exact": pytest.approx((0.0945, 0.9055), abs=1e-3)}  # 1 of 2, by Wilson's formula
    assert (found.count, found.main, found.value, found.partial) == (2, "task/exact", 0.5, False)
    assert [(one.prompt, one.reference, one.answer, one.score) for one in found.samples] == [
        ("a", "yes", "yes", 1), ("b", "yes", "no", 0)]


def test_questions_with_other_tools_or_thoughts_are_asked_apart_with_seeds_of_their_own():
    questions = [ask("a"), ask("b", tools=TOOLS), ask("c"), ask("d", thinking=True), ask("e")]
    model = Scripted({one: answer("yes") for one in "abcde"})
    found = run_task(model, questions, "exact", batch=2)
    assert [(asked, seeds, options) for asked, seeds, _, options in model.calls] == [
        (["a", "c"], [0, 2], {}), (["e"], [4], {}), (["b"], [1], {"tools": TOOLS}), (["d"], [3], {"thinking": True})]
    assert [one.prompt for one in found.samples] == list("abcde")


def test_a_request_that_fails_counts_as_wrong_and_the_others_go_on():
    model = Scripted({"a": answer("yes"), "b": DgemmaError("too long"), "c": answer("yes"), "d": answer("yes")})
    found = run_task(model, [ask(one) for one in "abcd"], "exact", batch=3)
    assert (found.count, found.value, found.values["task/failed"]) == (4, 0.75, 1)
    assert [one.error for one in found.samples] == [None, "DgemmaError: too long", None, None]
    assert [seeds for _, seeds, *_ in model.calls] == [[0, 1, 2], [0], [1], [2], [3]]
    model = Scripted({"a": answer("{}"), "b": ValueError("no")})
    found = run_task(model, [ask("a", "{}"), ask("b", '{"x": 1}')], "json")
    assert (found.values["task/record"], found.values["task/recall"]) == (0.5, 0.5)  # what was not given is missed


def test_when_every_request_fails_that_is_an_error(model):
    with pytest.raises(DgemmaError, match="not one of 2 questions was answered; row a: max_denoising_steps must be"):
        run_task(model, [ask("a"), ask("b")], "exact", max_denoising_steps=0)


def test_what_a_metric_cannot_use_is_said_before_anything_is_asked():
    model = Scripted({"a": answer("{}")})
    with pytest.raises(DgemmaError, match="row b: the metric \"json\""):
        run_task(model, [ask("a", "{}"), ask("b", "hello")], "json", batch=1)
    with pytest.raises(DgemmaError, match="at least one question"):
        run_task(model, [], "exact")
    assert model.calls == []


def test_a_run_that_is_stopped_scores_what_was_done():
    model = Scripted({"a": answer("yes"), "b": answer("no"), "c": answer("yes"), "d": answer("", reason="cancelled")})
    told = []
    found = run_task(model, [ask(one) for one in "abc"], "exact", batch=1, stop=lambda: len(model.calls) == 2,
                     progress=lambda done, total: told.append((done, total)))
    assert (found.count, found.value, found.partial, told) == (2, 0.5, True, [(1, 3), (2, 3)])
    found = run_task(model, [ask("a"), ask("d")], "exact")  # cancelled in the middle of a batch
    assert (found.count, found.value, found.partial) == (1, 1.0, True)
    found = run_task(model, [ask("a")], "exact", stop=lambda: True)
    assert (found.count, found.partial, found.values, found.intervals) == (0, True, {}, {})
    assert found.value != found.value  # NaN: nothing is known


def test_a_metric_is_its_function_and_what_its_file_says(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("def words(question, answer):\n    return 1.0\n")
    here, there = (metric_identity(f"{tmp_path}/{name}/mine.py:words") for name in ("a", "b"))
    assert here == there
    (tmp_path / "b" / "mine.py").write_text("def words(question, answer):\n    return 2.0\n")
    assert metric_identity(f"{tmp_path}/b/mine.py:words") != here
    assert metric_identity("exact") == "exact"


def test_samples_show_calls_and_whole_conversations():
    question = questions_of([conversation_of(CHAT)])[2]
    model = Scripted({"rain": answer("Sunny.", [CALL])})
    (sample,) = run_task(model, [question], "exact").samples
    call = 'weather({"city": "Paris", "days": 2})'
    assert sample.prompt == f"system: Be brief.\nuser: one\nassistant: 1\nuser: weather?\nassistant: {call}\ntool: rain"
    assert sample.answer == f"Sunny.\n{call}"


# ---- the bundled model -----------------------------------------------------------------------------


def questions_and_grids(count):
    puzzles, solutions = sudoku.generate(count, (30, 39), seed=11)
    rows = [{"prompt": sudoku.to_line(p), "response": sudoku.format_grid(s)}
            for p, s in zip(puzzles, solutions, strict=True)]
    return questions_of([conversation_of(row) for row in rows]), puzzles, solutions


def test_the_bundled_model_solves_sudoku_as_its_own_evaluation_says(model):
    questions, puzzles, solutions = questions_and_grids(8)
    found = run_task(model, questions, "sudoku", batch=3, seed=2)
    wanted = evaluate_sudoku(model, puzzles, solutions, seed=2)
    assert (found.value, found.values["task/givens_kept"]) == (wanted.exact, wanted.givens_kept)
    assert found.values["task/steps_per_canvas"] == wanted.mean_steps
    assert found.intervals["task/solved"] == wanted.exact_interval
    assert found.value >= 0.75
    one_step = run_task(model, questions, "exact", max_denoising_steps=1)
    assert (one_step.value, one_step.values["task/steps_per_canvas"]) == (0, 1)


def test_what_was_read_with_other_weights_is_forgotten():
    """In training the same model object is asked again after its weights have changed."""
    trained, fresh = dgemma.load("sudoku"), dgemma.load("sudoku")
    questions, *_ = questions_and_grids(2)
    limits = {"max_denoising_steps": 2, "metric": "exact"}
    before = run_task(trained, questions, **limits)
    for network in (trained.network, fresh.network):
        randomise(network, seed=3)
    trained.network.train()
    after, wanted = run_task(trained, questions, **limits), run_task(fresh, questions, **limits)
    assert [one.answer for one in after.samples] == [one.answer for one in wanted.samples]
    assert [one.answer for one in after.samples] != [one.answer for one in before.samples]
    assert trained.network.training
    assert trained.prefixes.nbytes == 0


def test_samples_are_plain_data(model):
    questions, *_ = questions_and_grids(1)
    found = run_task(model, questions, "exact", max_denoising_steps=1)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["samples"][0]["reference"] == questions[0].reference
