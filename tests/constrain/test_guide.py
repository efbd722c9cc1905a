"""Constrained answers as the loop makes them: always valid, always complete, whatever the network says."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.constrain import constraint_of, made
from dgemma.errors import DgemmaError
from support.constrain_helpers import STOPS, denoise, random_log_probs, walk

PERSON = {"type": "object", "required": ["name", "age"],
          "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                         "tags": {"type": "array", "items": {"enum": ["é", "日本", "x"]}, "maxItems": 3}}}
LONG = {"type": "object", "required": ["bio"], "properties": {"bio": {"type": "string", "maxLength": 300},
                                                              "n": {"type": "number"}}}
TREE = {"$defs": {"node": {"type": "object", "required": ["value", "children"],
                           "properties": {"value": {"type": ["integer", "string", "null"]},
                                          "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
        "$ref": "#/$defs/node"}
OPEN = {"type": "object", "required": ["kind"], "properties": {"kind": {"const": "a\nb"}, "data": {}}}
SCHEMAS = {"person": PERSON, "long": LONG, "tree": TREE, "open": OPEN, "any object": {"type": "object"}}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request, byte_tokenizer, piece_tokenizer):
    return byte_tokenizer if request.param == "bytes" else piece_tokenizer


def least(form, tokenizer):
    """The least room that a guide takes."""
    constraint = constraint_of(form, tokenizer, STOPS)
    with pytest.raises(ValueError, match="max_tokens") as error:
        constraint.guide(0)
    return int(re.search(r"(\d+) tokens", str(error.value))[1])


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("canvas", [8, 30])
def test_an_answer_satisfies_its_schema(name, canvas, tokenizer):
    form = schema_format(SCHEMAS[name])
    constraint, needed = constraint_of(form, tokenizer, STOPS), least(form, tokenizer)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(SCHEMAS[name]), overrides={"whitespace_flexible": False, "item_separator": ", ",
                                              "key_separator": ": "})
    outside = llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=tokenizer.vocab_size, eos_token=1)
    for seed, room in enumerate([needed, needed + 1, needed + 9, 100, 200]):
        ids = denoise(constraint, tokenizer, room, canvas, seed, sharpness=(1, 5, 20)[seed % 3], drawn=seed % 2 == 0)
        assert len(ids) <= room
        assert not any(tokenizer.is_special(token) for token in ids)
        jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMAS[name])
        matcher = llguidance.LLMatcher(outside, grammar)
        assert matcher.consume_tokens(ids), tokenizer.decode(ids)
        assert matcher.is_accepting()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), room=st.integers(2, 80), canvas=st.integers(1, 40), sharpness=st.floats(0, 40),
       drawn=st.booleans())
def test_any_object_parses_under_any_distribution(seed, room, canvas, sharpness, drawn):
    tokenizer = test_any_object_parses_under_any_distribution.tokenizer
    constraint = constraint_of({"type": "json_object"}, tokenizer, STOPS)
    ids = denoise(constraint, tokenizer, room, canvas, seed, sharpness, drawn)
    assert isinstance(json.loads(tokenizer.decode(ids)), dict)
    assert len(ids) <= room


@pytest.fixture(autouse=True, scope="module")
def _tokenizer_for_hypothesis(piece_tokenizer):
    test_any_object_parses_under_any_distribution.tokenizer = piece_tokenizer


@pytest.mark.parametrize("pattern", [r"\d{3}-[a-z]+(é|日本)*", "(ab|a)+", r"[^\s]{5,70}", "x?"])
def test_an_answer_matches_its_regular_expression(pattern, tokenizer):
    form = {"type": "regex", "regex": pattern}
    constraint = constraint_of(form, tokenizer, STOPS)
    needed = constraint._graph.distance(constraint._graph.start)
    for seed, room in enumerate([max(needed, 1), needed + 1, needed + 3, 60]):
        ids = denoise(constraint, tokenizer, room, 9, seed, drawn=seed % 2 == 0)
        assert re.fullmatch(pattern, tokenizer.decode(ids))


def test_a_choice_is_one_of_them_and_the_more_probable_one(tokenizer):
    choices = ["yes", "no", "perhaps é"]
    constraint = constraint_of({"type": "choice", "choice": choices}, tokenizer, STOPS)
    for wanted in choices:
        def scores(canvas, vocab, generator, _, wanted=wanted):
            logits = torch.randn(canvas, vocab, generator=generator)
            logits[torch.arange(len(wanted.encode())), tokenizer.encode(wanted)] += 12
            return logits.log_softmax(-1)

        assert tokenizer.decode(denoise(constraint, tokenizer, 30, 12, 0, log_probs=scores)) == wanted


def test_no_room_is_an_error_that_says_how_much_is_needed(byte_tokenizer):
    constraint = constraint_of({"type": "choice", "choice": ["abc", "abcd"]}, byte_tokenizer, STOPS)
    assert denoise(constraint, byte_tokenizer, 3, 8, 0) == byte_tokenizer.encode("abc")
    with pytest.raises(ValueError, match="3 tokens or more, and there is room for 2: raise max_tokens"):
        constraint.guide(2)


def test_what_a_schema_fixes_stands_in_the_template(byte_tokenizer):
    guide = constraint_of(schema_format(PERSON), byte_tokenizer, STOPS).guide(200)
    known = guide.template(30, 200)
    assert len(known) == 30
    assert byte_tokenizer.decode([token for token in known if token is not None]) == '{"name": "'
    chosen = guide.choose(walk(random_log_probs(30, 288, torch.Generator().manual_seed(0))), 30, 200, torch.rand(30))
    assert chosen.fixed.tolist()[:11] == [True] * 10 + [False]
    guide.commit(byte_tokenizer.encode('{"name": "x"'))
    assert byte_tokenizer.decode([token for token in guide.template(30, 188) if token is not None]) == ', "age": '


def test_a_template_is_in_the_tokenizers_own_spelling_and_leaves_open_what_may_grow():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from dgemma.chat.tokenizer import Tokenizer

    known = {piece: i for i, piece in enumerate(["<eos>", *"abwxyz12", "wx", "ab"])}
    backend = Backend(models.BPE(vocab=known, merges=[("w", "x"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend)

    def template(*choices):
        constraint = constraint_of({"type": "choice", "choice": list(choices)}, tokenizer, (0,))
        return [token for token in constraint.guide(9).template(8, 9) if token is not None]

    assert template("wxy1", "wxy2") == [known["wx"], known["y"]]
    assert template("wxab", "wxa1") == [known["wx"]]  # the a may become ab
    assert template("wxa") == [known["wx"], known["a"]]  # nothing can follow


def test_a_thought_may_come_first_and_the_answer_still_fits(byte_tokenizer):
    opened, closed = byte_tokenizer.token_to_id("<|channel>"), byte_tokenizer.token_to_id("<channel|>")
    constraint = constraint_of(schema_format(PERSON), byte_tokenizer, STOPS, thinking=True)
    thought = 0
    for seed in range(12):
        def scores(canvas, vocab, generator, sharpness):
            logits = torch.randn(canvas, vocab, generator=generator) * sharpness
            logits[:, closed] -= 30  # it would rather think on
            logits[0, opened] += 25
            return logits.log_softmax(-1)

        ids = denoise(constraint, byte_tokenizer, 70, 25, seed, log_probs=scores, drawn=seed % 2 == 0)
        text = ids
        if ids[0] == opened:
            thought += 1
            text = ids[ids.index(closed) + 1 :]
            assert not any(byte_tokenizer.is_special(token) for token in ids[1 : ids.index(closed)])
        jsonschema.validate(json.loads(byte_tokenizer.decode(text)), PERSON)
    assert thought
    without = constraint_of(schema_format(PERSON), byte_tokenizer, STOPS)
    assert opened not in denoise(without, byte_tokenizer, 70, 25, 0, log_probs=scores)


def test_an_open_thought_is_closed_before_the_answer(byte_tokenizer):
    closed = byte_tokenizer.token_to_id("<channel|>")
    form = {"type": "choice", "choice": ["yes", "no"]}
    constraint = constraint_of(form, byte_tokenizer, STOPS, inside_thought=True)
    for seed in range(4):
        ids = denoise(constraint, byte_tokenizer, 20, 8, seed)
        assert byte_tokenizer.decode(ids[ids.index(closed) + 1 :]) in ("yes", "no")


@pytest.mark.parametrize("form", [{"type": "json_object"}, schema_format(PERSON)], ids=["stacks", "table"])
def test_distributions_that_exclude_everything_valid_do_not_hinder(form, byte_tokenizer):
    def scores(canvas, vocab, generator, _):
        logits = torch.full((canvas, vocab), -torch.inf)
        logits[:, 200:203] = torch.randn(canvas, 3, generator=generator)
        if torch.rand(1, generator=generator) < 0.5:
            logits[canvas // 2] = torch.nan
        return logits.log_softmax(-1)

    constraint = constraint_of(form, byte_tokenizer, STOPS)
    for seed in range(4):
        assert json.loads(byte_tokenizer.decode(denoise(constraint, byte_tokenizer, 60, 16, seed, log_probs=scores,
                                                        drawn=seed % 2 == 0))) is not None


def test_a_text_that_could_go_on_at_the_end_of_a_canvas_does_not_end_by_itself(byte_tokenizer):
    constraint = constraint_of({"type": "regex", "regex": "a+"}, byte_tokenizer, STOPS)
    letter = byte_tokenizer.encode("a")
    guide = constraint.guide(20)
    guide.template(4, 20)
    guide.commit(letter * 4)
    assert not guide.finished
    guide.template(4, 16)
    guide.commit([])  # a stop token at once
    assert guide.finished
    full = constraint.guide(4)
    full.template(4, 4)
    full.commit(letter * 4)  # no room is left
    assert full.finished
    whole = constraint_of({"type": "regex", "regex": "a{4}"}, byte_tokenizer, STOPS).guide(20)
    whole.template(4, 20)
    whole.commit(letter * 4)  # nothing can follow
    assert whole.finished


def test_a_commit_that_is_not_valid_is_an_error(byte_tokenizer):
    guide = constraint_of({"type": "regex", "regex": "ab"}, byte_tokenizer, STOPS).guide(9)
    with pytest.raises(ValueError, match="position 1"):
        guide.commit(byte_tokenizer.encode("ax"))


@pytest.mark.parametrize("drawn", [False, True])
def test_an_answer_does_not_depend_on_the_answers_before(drawn, byte_tokenizer):
    def answers(seeds):
        made.clear()
        constraint = constraint_of(schema_format(TREE), byte_tokenizer, STOPS)
        return {seed: denoise(constraint, byte_tokenizer, 90, 30, seed, 0.1 if seed % 2 else 9, drawn)
                for seed in seeds}

    assert answers(range(8)) == answers(range(7, -1, -1))


def test_the_order_of_a_steps_edges_does_not_depend_on_what_was_read_before(byte_tokenizer):
    def plans(before):
        made.clear()
        graph = constraint_of({"type": "json_object"}, byte_tokenizer, STOPS)._graph
        state, states, found = graph.start, np.array([graph.start]), []
        for token in byte_tokenizer.encode(before):
            state = graph.step(state, token)
        for _ in range(8):
            plan = graph.plan(states)
            found.append((plan.src.tolist(), plan.starts.tolist(), plan.distance.tolist()))
            states = plan.targets[:40]
        return found

    assert plans("") == plans('{"a": [[{"b": [1, "x\\n", {"c": -2.5e')


def test_answers_may_be_guided_from_several_threads(byte_tokenizer):
    constraint = constraint_of({"type": "json_object"}, byte_tokenizer, STOPS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: denoise(constraint, byte_tokenizer, 60, 16, seed, 1.0), range(8)))
    assert found == [denoise(constraint, byte_tokenizer, 60, 16, seed, 1.0) for seed in range(8)]


@pytest.mark.parametrize(("form", "named"), [
    ({}, "type"), ({"type": "xml"}, "xml"), ({"type": "json_schema"}, "schema"), ({"type": "regex"}, "regex"),
    ({"type": "choice", "choice": []}, "choice"), ({"type": "choice", "choice": ["a", 1]}, "choice"),
    ({"type": "regex", "regex": "("}, "unterminated"), (schema_format({"not": {}}), "contradicts"),
    (schema_format(False), "contradicts"),
    (schema_format({"type": "string", "minLength": 3, "maxLength": 1}), "contradicts"),
    ("json", "object"), ({"type": "choice", "choice": {"a"}}, "JSON"),
    ({"type": "choice", "choice": ["\ud800"]}, "surrogate"),
    ({"type": "regex", "regex": "(a|" * 300 + "b" + ")" * 300}, "too deeply"),
    ({"type": "choice", "choice": ["a" * 2**18]}, "are the most"),
    (schema_format({"properties": {f"q{i}": {"$ref": f"#/$defs/a{i}"} for i in range(9)}, "$defs": {
        f"a{i}": {"type": "object", "properties": {"x": {"type": "string", "pattern": "^a{4000}$"},
                                                   "n": {"$ref": f"#/$defs/a{i}"}}} for i in range(9)}}), "together"),
])
def test_a_format_that_cannot_be_honoured_is_refused_by_name(form, named, byte_tokenizer):
    with pytest.raises(DgemmaError, match=named):
        constraint_of(form, byte_tokenizer, STOPS)


def test_a_long_limit_of_a_string_is_cut_and_not_refused(byte_tokenizer):
    schema = {"type": "object", "required": ["title", "body"],
              "properties": {"title": {"type": "string", "maxLength": 200},
                             "body": {"type": "string", "maxLength": 9000}}}
    constraint = constraint_of(schema_format(schema), byte_tokenizer, STOPS)
    jsonschema.validate(json.loads(byte_tokenizer.decode(denoise(constraint, byte_tokenizer, 90, 30, 0))), schema)


def test_text_is_no_constraint_and_the_same_form_is_made_once(byte_tokenizer):
    assert constraint_of({"type": "text"}, byte_tokenizer, STOPS) is None
    assert constraint_of(schema_format(PERSON), byte_tokenizer, STOPS) is \
        constraint_of(schema_format(PERSON), byte_tokenizer, STOPS)
