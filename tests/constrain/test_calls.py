"""Calls that are made under a constraint: of a declared tool, with arguments that its schema accepts, whatever the
network says."""

import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat.reply import read_answer
from dgemma.constrain import constraint_of
from dgemma.constrain.choice import CallableTool, Calls, ToolsError, calls_of, read_tool_choice, shown_tools
from support.constrain_helpers import STOPS, denoise, random_log_probs, walk

LOOK = {"type": "object", "required": ["q", "n"], "additionalProperties": False, "properties": {
    "q": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 1, "maximum": 20},
    "deep": {"type": "object", "required": ["x"], "properties": {"x": {"type": ["number", "null"]}}}}}
ODD = {"type": "object", "required": ["a b", "größe", '"q"', "", "x:y", "\u00a0"], "properties": {
    "a b": {"enum": ["line\nbreak", 'a "quote"', "back\\slash", "<|\"|>", "\u0001", "é日"]},
    "größe": {"type": "boolean"},
    '"q"': {"const": {"k e y": [1, 2.5, None, "x"], "plain": {}}}, "": {"type": "array", "items": {"type": "string"}},
    "x:y": {"type": "string", "pattern": "^[\\n\"{}]{2,4}$"}, "\u00a0": {"const": None}, "last{": {"type": "null"}}}
TREE = {"$defs": {"node": {"type": "object", "required": ["value", "children"], "properties": {
    "value": {"type": ["integer", "string"]}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    "$ref": "#/$defs/node"}
EITHER = {"anyOf": [{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}},
                    {"type": "object", "required": ["b"], "properties": {"b": {"type": "string"}}}]}
SCHEMAS = {"look": LOOK, "odd": ODD, "tree": TREE, "either": EITHER}


def tool(name, schema, strict=False):
    return CallableTool(name, schema, strict)


def required(*tools, many=False):
    return Calls(tools, True, many)


def constraint(calls, tokenizer, form=None, **options):
    made = constraint_of(form, tokenizer, STOPS, calls=calls, **options)
    assert made is not None
    return made


def check_calls(calls, schemas):
    for call in calls:
        jsonschema.validate(call["arguments"], schemas[call["name"]])


@pytest.fixture(params=["bytes", "pieces"])
def tokenizer(request, byte_tokenizer, piece_tokenizer):
    return byte_tokenizer if request.param == "bytes" else piece_tokenizer


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_call_satisfies_its_schema(name, tokenizer):
    made = constraint(required(tool(name, SCHEMAS[name])), tokenizer)
    needed = made._graph.distance(made._graph.start)
    for seed, room in enumerate([needed, needed + 1, needed + 30, 200]):
        ids = denoise(made, tokenizer, room, 30, seed, sharpness=(1, 5, 20)[seed % 3], drawn=seed % 2 == 0)
        assert len(ids) <= room
        answer = read_answer(tokenizer, [], ids)
        assert (answer.text, [call["name"] for call in answer.tool_calls]) == ("", [name])
        check_calls(answer.tool_calls, SCHEMAS)


def test_keys_are_bare_where_they_can_be_and_strings_stand_as_they_are(byte_tokenizer):
    schema = {"type": "object", "required": ["plain", "größe", "a b", "'q"], "properties": {
        "plain": {"const": "two\nlines \"and\" \\"}, "größe": {"const": [1, -2.5e3, True, None, {"k": {}}]},
        "a b": {"const": ""}, "'q": {"const": "\u0007"}}}
    ids = denoise(constraint(required(tool("f", schema)), byte_tokenizer), byte_tokenizer, 200, 90, 0)
    assert byte_tokenizer.decode(ids) == (
        '<|tool_call>call:f{plain:<|"|>two\nlines "and" \\<|"|>,größe:[1,-2500.0,true,null,{k:{}}],'
        '<|"|>a b<|"|>:<|"|><|"|>,<|"|>\'q<|"|>:<|"|>\u0007<|"|>}<tool_call|>')


def test_marks_are_tokens_never_text(byte_tokenizer):
    made = constraint(required(tool("f", LOOK)), byte_tokenizer)
    for seed in range(4):
        ids = denoise(made, byte_tokenizer, 90, 20, seed)
        specials = [byte_tokenizer.id_to_token(token) for token in ids if byte_tokenizer.is_special(token)]
        assert (specials[0], specials[-1]) == ("<|tool_call>", "<tool_call|>")
        assert set(specials[1:-1]) == {'<|"|>'}


def test_what_every_call_begins_with_stands_in_the_template(byte_tokenizer):
    guide = constraint(required(tool("look", LOOK)), byte_tokenizer).guide(200)
    known = [token for token in guide.template(60, 200) if token is not None]
    assert byte_tokenizer.decode(known) == '<|tool_call>call:look{q:<|"|>'
    guide.commit(byte_tokenizer.encode('<|tool_call>call:look{q:<|"|>x<|"|>'))
    assert byte_tokenizer.decode([token for token in guide.template(60, 180) if token is not None]) == ",n:"
    either = constraint(required(tool("look", LOOK), tool("list", None)), byte_tokenizer).guide(200)
    assert byte_tokenizer.decode([token for token in either.template(60, 200) if token is not None]) == \
        "<|tool_call>call:l"


def test_a_map_whose_keys_come_twice_is_still_a_call(byte_tokenizer):
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    keys = byte_tokenizer.encode(":1,")

    def short(canvas, vocab, generator, _):
        logits = torch.randn(canvas, vocab, generator=generator)
        logits[:-20, [*keys, byte_tokenizer.token_to_id('<|"|>')]] += 30
        return logits.log_softmax(-1)

    made, twice = constraint(required(tool("f", schema)), byte_tokenizer), 0
    for seed in range(4):
        ids = denoise(made, byte_tokenizer, 80, 80, seed, log_probs=short)
        answer = read_answer(byte_tokenizer, [], ids, held=True)
        assert len(answer.tool_calls) == 1
        jsonschema.validate(answer.tool_calls[0]["arguments"], schema)
        twice += byte_tokenizer.decode(ids).count('<|"|>:') > len(answer.tool_calls[0]["arguments"])
    assert twice


def test_one_call_or_several(byte_tokenizer):
    opened = byte_tokenizer.token_to_id("<|tool_call>")

    def more(canvas, vocab, generator, _):
        logits = torch.randn(canvas, vocab, generator=generator)
        logits[:, opened] += 30
        logits[:-1, STOPS] -= 9000
        return logits.log_softmax(-1)

    tools = tool("now", {"type": "object", "properties": {}}), tool("f", {"properties": {"x": {"type": "integer"}}})
    for many in (False, True):
        made = constraint(required(*tools, many=many), byte_tokenizer)
        counts = set()
        for seed in range(4):
            answer = read_answer(byte_tokenizer, [], denoise(made, byte_tokenizer, 70, 70, seed, log_probs=more))
            assert answer.text == ""
            counts.add(len(answer.tool_calls))
        assert (counts == {1}) is not many, counts
        assert 0 not in counts


def test_a_tool_without_parameters_is_called_without_arguments(byte_tokenizer):
    for parameters in (None, {"type": "object", "properties": {}}, {"properties": {}}):
        made = constraint(required(tool("now", parameters)), byte_tokenizer)
        assert byte_tokenizer.decode(denoise(made, byte_tokenizer, 99, 30, 0)) == "<|tool_call>call:now{}<tool_call|>"


def test_calls_that_nest_deeply_can_still_be_read(byte_tokenizer):
    brackets = byte_tokenizer.encode("[{")

    def deep(canvas, vocab, generator, _):
        logits = torch.randn(canvas, vocab, generator=generator)
        logits[:, brackets] += 12
        return logits.log_softmax(-1)

    for schema in (TREE, {"type": "object", "properties": {"x": {}}, "required": ["x"]}):
        made = constraint(required(tool("f", schema)), byte_tokenizer)
        for seed in range(2):
            answer = read_answer(byte_tokenizer, [], denoise(made, byte_tokenizer, 400, 200, seed, log_probs=deep))
            assert len(answer.tool_calls) == 1
            check_calls(answer.tool_calls, {"f": schema})


def test_a_thought_may_come_before_and_holds_no_marks_of_calls(byte_tokenizer):
    opened, closed = (byte_tokenizer.token_to_id(mark) for mark in ("<|channel>", "<channel|>"))
    marks = [byte_tokenizer.token_to_id(mark) for mark in ("<|tool_call>", '<|"|>', "<tool_call|>")]
    made = constraint(required(tool("look", LOOK)), byte_tokenizer, thinking=True)

    def scores(canvas, vocab, generator, _):
        logits = torch.randn(canvas, vocab, generator=generator) * 3
        logits[0, opened] += 30
        logits[1:9, marks] += 30
        return logits.log_softmax(-1)

    for seed in range(6):
        ids = denoise(made, byte_tokenizer, 120, 60, seed, log_probs=scores, drawn=seed % 2 == 0)
        if ids[0] == opened:
            assert not set(ids[: ids.index(closed)]) & set(marks)
        answer = read_answer(byte_tokenizer, [], ids)
        assert answer.text == ""
        check_calls(answer.tool_calls, SCHEMAS)


FORM = {"type": "json_schema", "json_schema": {"schema": {
    "type": "object", "required": ["answer"], "properties": {"answer": {"type": "string", "maxLength": 9}}}}}


def pushing(tokenizer, token, strength=600):
    def scores(canvas, vocab, generator, _):
        logits = torch.randn(canvas, vocab, generator=generator) * 3
        logits[0, token] += strength
        return logits.log_softmax(-1)

    return scores


@pytest.mark.parametrize("form", [FORM, {"type": "choice", "choice": ["yes", "no"]}, {"type": "json_object"}],
                         ids=lambda form: form["type"])
def test_beside_a_form_the_answer_is_calls_or_the_form(form, byte_tokenizer):
    made = constraint(Calls((tool("look", LOOK), tool("tree", TREE)), False, True), byte_tokenizer, form)
    for wanted in ("<|tool_call>", "y" if form["type"] == "choice" else "{"):
        for seed in range(3):
            ids = denoise(made, byte_tokenizer, 110, 40, seed, drawn=seed % 2 == 0,
                          log_probs=pushing(byte_tokenizer, byte_tokenizer.encode(wanted)[0]))
            answer = read_answer(byte_tokenizer, [], ids, tools=("look", "tree"), form=True, held=True)
            if answer.tool_calls:
                assert answer.text == ""
                check_calls(answer.tool_calls, SCHEMAS)
            elif form["type"] == "choice":
                assert answer.text in ("yes", "no")
            else:
                assert isinstance(json.loads(answer.text), dict)
            assert bool(answer.tool_calls) == (wanted == "<|tool_call>")


def free(tokenizer, *tools, many=True):
    return constraint(Calls(tools, False, many), tokenizer)


def free_text(made, tokenizer, room, canvas, seed, log_probs):
    """`denoise` for text that goes on as long as there is room."""
    generator, guide, answer = torch.Generator().manual_seed(seed), made.guide(room), []
    while len(answer) < room:
        left = room - len(answer)
        scores = log_probs(canvas, tokenizer.vocab_size, generator, 3)
        chosen = guide.choose(walk(scores), canvas, left, torch.rand(canvas, generator=generator))
        tokens = (chosen.sample if seed % 2 else chosen.draft).tolist()
        end = next((place for place, token in enumerate(tokens) if token in STOPS), canvas)
        answer += tokens[: min(end, left)]
        guide.commit(tokens[: min(end, left)])
        if end < min(canvas, left):
            break
    return answer


def test_strict_tools_are_held_to_their_schema_wherever_they_are_called(byte_tokenizer):
    opened = byte_tokenizer.token_to_id("<|tool_call>")
    made = free(byte_tokenizer, tool("look", LOOK, strict=True), tool("any", {"type": "string"}))
    called = said = 0
    for seed in range(8):
        def scores(canvas, vocab, generator, _, seed=seed):
            logits = torch.randn(canvas, vocab, generator=generator) * 3
            logits[5, opened] += 600
            logits[:40, STOPS] -= 9000
            logits[11, byte_tokenizer.encode("l")] += 500 * (seed < 5)
            return logits.log_softmax(-1)

        ids = free_text(made, byte_tokenizer, 120, 60, seed, scores)
        answer = read_answer(byte_tokenizer, [], ids)
        said += bool(answer.text)
        for call in answer.tool_calls:
            called += 1
            assert call["name"] in ("look", "any")
            if call["name"] == "look":
                jsonschema.validate(call["arguments"], LOOK)
    assert called >= 5
    assert said >= 6


def test_free_text_is_not_complete_because_no_room_is_left(byte_tokenizer):
    guide = free(byte_tokenizer, tool("look", LOOK, strict=True)).guide(4)
    assert guide.may_be_empty
    guide.template(4, 4)
    guide.commit(byte_tokenizer.encode("text"))
    assert not guide.finished  # it was cut off: whoever asks how it ended is told


def test_a_canvas_can_be_made_to_begin_with_tokens(byte_tokenizer):
    opened, closed = (byte_tokenizer.token_to_id(mark) for mark in ("<|channel>", "<channel|>"))
    guide = constraint(required(tool("look", LOOK)), byte_tokenizer, thinking=True).guide(200)
    guide.template(60, 200)
    guide.commit([opened, *byte_tokenizer.encode("thought")])
    guide.begin_with([closed])
    known = [token for token in guide.template(60, 190) if token is not None]
    assert byte_tokenizer.decode(known) == '<channel|><|tool_call>call:look{q:<|"|>'
    scores = random_log_probs(60, byte_tokenizer.vocab_size, torch.Generator().manual_seed(0))
    chosen = guide.choose(walk(scores), 60, 190, torch.rand(60))
    assert chosen.draft[: len(known)].tolist() == chosen.sample[: len(known)].tolist() == known
    guide.begin_with([opened])
    with pytest.raises(ValueError, match="cannot stand"):
        guide.template(60, 190)


@pytest.mark.parametrize(("calls", "words"), [
    (required(tool("f", {"type": "string"})), ["'f'", "object"]),
    (required(tool("f", [])), ["'f'", "JSON schema"]),
    (required(tool("ok", None), tool("bad", {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}})),
     ["'bad'", "#/nowhere"]),
    (Calls((tool("bad", {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}, True),), False, True),
     ["'bad'", "#/nowhere"]),
    (required(tool("f", {"type": "object", "required": ["x"], "properties": {"x": False}})), ["no call"]),
])
def test_what_cannot_be_called_is_said_with_the_tools_name(calls, words, byte_tokenizer):
    with pytest.raises(ToolsError) as error:
        constraint(calls, byte_tokenizer)
    assert error.value.field == "tools"
    assert all(word in str(error.value) for word in words), error.value


def test_a_tool_that_is_not_strict_may_stand_beside_a_form_with_any_schema(byte_tokenizer):
    bad = tool("bad", {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}})
    made = constraint(Calls((bad,), False, False), byte_tokenizer, FORM)
    ids = denoise(made, byte_tokenizer, 60, 30, 0,
                  log_probs=pushing(byte_tokenizer, byte_tokenizer.token_to_id("<|tool_call>")))
    assert [call["name"] for call in read_answer(byte_tokenizer, [], ids).tool_calls] == ["bad"]


def test_too_little_room_is_said_in_the_words_of_calls(byte_tokenizer):
    with pytest.raises(ValueError, match="tool_choice asks for an answer of 12 tokens or more"):
        constraint(required(tool("now", None)), byte_tokenizer).guide(11)


def test_a_model_without_the_marks_cannot_be_made_to_call():
    from support.constrain_helpers import tokenizer_of

    with pytest.raises(ToolsError, match="vocabulary has no"):
        constraint_of(None, tokenizer_of("abc"), (0,), calls=required(tool("f", None)))


_scalars = st.sampled_from([
    {"type": "string", "maxLength": 6}, {"type": "integer", "minimum": -5, "maximum": 99}, {"type": "boolean"},
    {"type": "null"}, {"enum": ["a b", 'q"q', "n\nl", 3, None]}, {"type": "string", "pattern": "^[a-c\"\\\\]{1,3}$"},
    {"type": "number"}, {"const": {"a:b": ["{", "}"]}}, {"type": "string", "format": "date"}])
_keys = st.text(st.sampled_from("ab :{}\"'\\<é日\n"), max_size=3)
_schemas = st.recursive(_scalars, lambda inner: st.one_of(
    st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
    st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=2)),
    st.builds(lambda value: {"type": "object", "additionalProperties": value}, inner),
    st.builds(lambda named: {"type": "object", "properties": named, "required": list(named)[::2]},
              st.dictionaries(_keys, inner, max_size=3))), max_leaves=5)


@settings(max_examples=20, deadline=None)
@given(named=st.dictionaries(_keys, _schemas, max_size=3), seed=st.integers(0, 2**31), drawn=st.booleans(),
       sharpness=st.floats(0, 20))
def test_calls_satisfy_random_schemas(named, seed, drawn, sharpness):
    tokenizer = test_calls_satisfy_random_schemas.tokenizer
    schema = {"type": "object", "properties": named, "required": list(named)[::2]}
    made = constraint(required(tool("f", schema)), tokenizer)
    room = max(made._graph.distance(made._graph.start), 0) + seed % 40
    ids = denoise(made, tokenizer, room, 30, seed, sharpness, drawn)
    answer = read_answer(tokenizer, [], ids, held=True)
    assert answer.text == ""
    assert len(answer.tool_calls) == 1
    jsonschema.validate(answer.tool_calls[0]["arguments"], schema)


@pytest.fixture(autouse=True, scope="module")
def _tokenizer_for_hypothesis(piece_tokenizer):
    test_calls_satisfy_random_schemas.tokenizer = piece_tokenizer


@pytest.mark.parametrize(("said", "mode", "allowed"), [
    (None, "auto", None), ("auto", "auto", None), ("none", "none", None), ("required", "required", None),
    ("any", "required", None), ({"type": "any"}, "required", None), ({"type": "none"}, "none", None),
    ({"name": "f"}, "function", ("f",)), ({"type": "function", "name": "f"}, "function", ("f",)),
    ({"type": "function", "function": {"name": "f"}}, "function", ("f",)), ({"type": "tool", "name": "f"}, "function",
                                                                           ("f",)),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}, {"name": "g"}]},
     "required", ("f", "g")),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "f"}}]}}, "auto", ("f",)),
])
def test_every_spelling_of_a_tool_choice(said, mode, allowed):
    choice = read_tool_choice(said)
    assert (choice.mode, choice.allowed) == (mode, allowed)


@pytest.mark.parametrize("said", ["f", "", 3, [], {}, {"type": "f"}, {"type": "function"}, {"type": "tool", "name": 3},
                                  {"type": "function", "function": "f"}, {"type": "allowed_tools"},
                                  {"type": "allowed_tools", "tools": []}, {"type": "allowed_tools", "tools": ["f"]},
                                  {"type": "allowed_tools", "mode": "none", "tools": [{"name": "f"}]}, True])
def test_what_is_no_tool_choice_is_said(said):
    with pytest.raises(ToolsError, match="tool_choice") as error:
        read_tool_choice(said)
    assert error.value.field == "tool_choice"


def declared(name, **function):
    return {"type": "function", "function": {"name": name, **function}}


def test_which_tools_may_be_called_and_which_are_shown():
    tools = [declared("f", strict=True), declared("g"), declared("h")]

    def names(choice, formed=False, parallel=True):
        choice = read_tool_choice(choice)
        calls = calls_of(tools, choice, parallel, formed)
        shown = [tool["function"] for tool in shown_tools(tools, choice) or ()]
        assert not any("strict" in function for function in shown)
        return ([function["name"] for function in shown], calls and [tool.name for tool in calls.tools],
                calls and calls.required, calls and calls.many)

    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}, {"name": "h"}]}
    assert names("none", formed=True) == ([], None, None, None)
    assert names("auto") == (["f", "g", "h"], ["f", "g", "h"], False, True)  # one of them is strict
    assert names(some) == (["g", "h"], None, None, None)
    assert names(some, formed=True, parallel=False) == (["g", "h"], ["g", "h"], False, False)
    assert names({**some, "mode": "required"}) == (["g", "h"], ["g", "h"], True, True)
    assert names({"name": "g"}) == (["f", "g", "h"], ["g"], True, False)
    assert names("required", parallel=False) == (["f", "g", "h"], ["f", "g", "h"], True, False)
    for choice, words in (({"name": "x"}, "'x'.*'f', 'g', 'h'"), ({**some, "tools": [{"name": "x"}]}, "'x'")):
        with pytest.raises(ToolsError, match=words):
            names(choice)
    with pytest.raises(ToolsError, match="no tools"):
        calls_of(None, read_tool_choice("required"), True, False)


def test_free_text_that_is_valid_as_it_is_is_taken(byte_tokenizer):
    def guide(*committed, room=60):
        made = free(byte_tokenizer, tool("look", LOOK, strict=True)).guide(room)
        made.template(20, room)
        if committed:
            made.commit(list(committed))
        return made

    def spelt(text):
        return byte_tokenizer.encode(text)

    call = '<|tool_call>call:look{q:<|"|>a<|"|>,n:3}<tool_call|>'
    for text, taken in (("Hello", True), (f"So: {call} and", True), ("<|channel>thought\nhm<channel|>x", True),
                        (call.replace("3", "99"), False), (call.replace("look", "list"), False),
                        ("a<tool_call|>", False), (call.replace("n:3", "n:<turn|>"), False),
                        ("Hello<turn|><|tool_call><|tool_call>", True)):
        assert guide().takes(spelt(text), 20, 60) is taken, text
    assert not guide(room=9).takes(spelt(call[:20]), 20, 9)  # it could not be completed
    assert guide(room=3).takes(spelt("Hello"), 20, 3)
    begun = guide(*spelt("<|tool_call>call:look"))
    assert not begun.takes(spelt('{q:<|"|>'), 20, 60)  # what must stand there is chosen
    formed = constraint(required(tool("look", LOOK)), byte_tokenizer).guide(60)
    assert not formed.takes(spelt(call), 20, 60)
