"""Tool calls: Gemma's notation is read exactly, what is nearly that is repaired, and what is neither is refused."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgemma.chat.repair import read_calls
from dgemma.chat.reply import read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import Called
from dgemma.train.data import tokenizer as bundled

TOKENIZER = Tokenizer(
    bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"}
)
Q = '<|"|>'


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("{}", {}),
        ('{key:<|"|>text<|"|>,n:3}', {"key": "text", "n": 3}),
        ("{a:null,b:true,c:false,d:-1.5e3,e:0}", {"a": None, "b": True, "c": False, "d": -1500.0, "e": 0}),
        ("{a:[],b:{},c:[1,[2,{d:[]}]]}", {"a": [], "b": {}, "c": [1, [2, {"d": []}]]}),
        ('{a:<|"|>},<tool_call|>{"\\n<|tool_call><|"|>}', {"a": '},<tool_call|>{"\\n<|tool_call>'}),
        ('{ a : 1 , b : [ <|"|><|"|> , 2 ] } ', {"a": 1, "b": ["", 2]}),
        ('{<|"|>a key: {}<|"|>:1,b-c.d_e:2}', {"a key: {}": 1, "b-c.d_e": 2}),
        ('{a:<|"|>say "hi", True, \'x\': {b:1,}<|"|>}', {"a": "say \"hi\", True, 'x': {b:1,}"}),
    ],
)
def test_well_formed(body, arguments):
    assert read_calls(f"call:f{body}") == [Called("f", arguments)]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        # braces and brackets
        ("call:f{a:1", {"a": 1}),
        ("call:f{a:{b:[1", {"a": {"b": [1]}}),
        ("call:f{}}", {}),
        ('call:f{a:<|"|>x<|"|>}]<|"|>', {"a": "x"}),
        ("call:f", {}),
        # commas
        ("call:f{a:1,}", {"a": 1}),
        ("call:f{a:[1,2,],}", {"a": [1, 2]}),
        # quotes of another kind
        ('call:f{a:"x",b:["y","z"]}', {"a": "x", "b": ["y", "z"]}),
        ("call:f{a:'it\\'s \"x\"'}", {"a": 'it\'s "x"'}),
        ('call:f{"a":"x\\n\\"y\\", z: 1}"}', {"a": 'x\n"y", z: 1}'}),
        ('call:f{a:<|"|>x",b:1}', {"a": "x", "b": 1}),
        ('call:f{a:"x<|"|>,b:1}', {"a": "x", "b": 1}),
        ('call:f{a:<|"|>x",b:<|"|>y<|"|>}', {"a": "x", "b": "y"}),
        # quotes missing
        ('call:f{a:<|"|>x, y}', {"a": "x, y"}),
        ('call:f{a:<|"|>x,b:<|"|>y<|"|>}', {"a": "x", "b": "y"}),
        ('call:f{a:[<|"|>x,<|"|>y<|"|>]}', {"a": ["x", "y"]}),
        ('call:f{a:x, y<|"|>,b:1}', {"a": "x, y", "b": 1}),
        ("call:f{a:Zürich, HB,b:[red,blue],c:{d:x}}",
         {"a": "Zürich, HB", "b": ["red", "blue"], "c": {"d": "x"}}),
        ("call:f{url:https://a.b/c?d=1,day:2026-05-01}", {"url": "https://a.b/c?d=1", "day": "2026-05-01"}),
        # quotes too many
        ('call:f{a:<|"|><|"|>x<|"|>}', {"a": "x"}),
        ('call:f{a:<|"|>x<|"|><|"|>,b:<|"|><|"|>}', {"a": "x", "b": ""}),
        ('call:f{a<|"|>:5<|"|>,b:true<|"|>}', {"a": 5, "b": True}),
        # words of other languages
        ("call:f{a:True,b:None,c:[False]}", {"a": True, "b": None, "c": [False]}),
        # JSON
        ('call:f{"a": 1, "b": {"c": [null, "x"]}}', {"a": 1, "b": {"c": [None, "x"]}}),
        (' {"name": "f", "arguments": {"a": 1}} ', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"function": "f", "parameters": {"a": 1}}', {"a": 1}),
        ('[{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]', {"a": 1}),
        ("{'name': 'f', 'arguments': {'a': True,}", {"a": True}),
        ('{"name": "f"}', {}),
    ],
)
def test_what_was_surely_meant(source, arguments):
    assert read_calls(source) == [Called("f", arguments, repaired=True)]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "f{}",
        "call:{}",
        "call:f{a}",
        "call:f{a:}",
        "call:f{,a:1}",
        "call:f{a:1 b:2}",
        "call:f{a:1,a:2}",
        "call:f{a:x b:2}",
        "call:f{a:[1,2}",
        "call:f{a:01}",
        "call:f{a:NaN}",
        "call:f{a:-Infinity}",
        "call:f{a:1e999}",
        "call:f{a:" + "9" * 5000 + "}",
        "call:f{a:" + "[" * 5000 + "]" * 5000 + "}",
        'call:f{a:<|"|>x<|"|>y<|"|>z<|"|>}',
        'call:f{a:<|"|>x{y}',
        "call:f{} and more",
        '{"a": 1}',
        "[]",
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no JSON"}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "description": "what f does", "parameters": {}}',
    ],
)
def test_what_cannot_be_read_is_no_call(source):
    assert read_calls(source) == []


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("call:f{a:true", {"a": True}),
        ('call:f{a:<|"|>x<|"|>', {"a": "x"}),
        ("call:f{a:1}", {"a": 1}),
        ("call:f{a:[1]", {"a": [1]}),
        ("call:f{a:12", None),  # 123 may have been meant
        ("call:f{a:Par", None),
        ('call:f{a:<|"|>Par', None),
        ('call:f{a:"Par', None),
        ("call:f{", None),
        ("call:f{a:1,", None),
        ("call:f", None),
    ],
)
def test_without_its_closing_mark_a_call_counts_if_its_values_are_whole(source, arguments):
    expected = [] if arguments is None else [Called("f", arguments, repaired=True)]
    assert read_calls(source, closed=False) == expected


def test_the_word_call_may_be_missing_from_a_declared_tool():
    assert read_calls("f{a:1}", tools=["f"]) == [Called("f", {"a": 1}, repaired=True)]
    assert read_calls("f{a:1}", tools=["g"]) == []


def test_a_list_of_calls_is_several():
    source = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}]'
    assert [(call.name, call.arguments) for call in read_calls(source)] == [("f", {}), ("g", {"a": 1})]


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,4}", fullmatch=True)
TEXT = st.text(max_size=8).filter(lambda text: Q not in text)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


def as_json(value):
    return json.dumps(value, sort_keys=True)  # tells 1 from 1.0 and True


@settings(max_examples=80, deadline=None)
@given(ARGUMENTS)
def test_what_the_template_writes_is_read_back(arguments):
    made = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
    answer = read_answer(TOKENIZER, [], TOKENIZER.apply_chat_template([made], add_generation_prompt=False))
    assert answer.text == "model\n\n"
    assert as_json(answer.tool_calls) == as_json([{"name": "f", "arguments": arguments}])


@settings(max_examples=80, deadline=None)
@given(ARGUMENTS, st.sampled_from([None, 1]))
def test_json_in_the_marks_is_read_as_json(arguments, indent):
    for source in (json.dumps({"name": "f", "arguments": arguments}, indent=indent),
                   f"call:f{json.dumps(arguments, indent=indent, ensure_ascii=False)}"):
        (call,) = read_calls(source)
        assert as_json(call.arguments) == as_json(arguments)


def rendered(value):
    """Gemma's notation, as its template writes it."""
    if isinstance(value, str):
        return f"{Q}{value}{Q}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{rendered(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(rendered, value)) + "]"
    return json.dumps(value)


WORDS = st.text("abcxyzäö -./", min_size=1, max_size=6).map(str.strip).filter(str.isalpha)
PLAIN = st.dictionaries(
    KEYS, st.one_of(WORDS, st.integers(), st.booleans(), st.none(), st.lists(WORDS, max_size=3)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.sampled_from(["quotes", "unclosed", "trailing", "python"]))
def test_usual_damage_costs_nothing(arguments, damage):
    source = rendered(arguments)
    if damage == "quotes":
        source = source.replace(Q, '"')
    elif damage == "unclosed":
        source = source.removesuffix("}")
    elif damage == "trailing":
        source = source.replace("]", ",]").replace("[,", "[").removesuffix("}") + ",}"
    else:
        source = repr(arguments)
    (call,) = read_calls(f"call:f{source}")
    assert as_json(call.arguments) == as_json(arguments)


@settings(max_examples=300, deadline=None)
@given(
    ARGUMENTS.map(lambda arguments: f"call:f{rendered(arguments)}")
    | ARGUMENTS.map(lambda arguments: json.dumps({"name": "f", "arguments": arguments})),
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["", Q, '"', "'", "{", "}", "[", ",", ":", "\\", " ", "é"]),
                       st.integers(0, 3)), min_size=1, max_size=4),
    st.booleans(),
)
@example("call:f{a:1}", [(8, '"', 0)], True)
def test_damage_never_raises(source, damages, closed):
    for at, put, lost in damages:
        at %= len(source) + 1
        source = source[:at] + put + source[at + lost :]
    for call in read_calls(source, closed, ["f"]):
        assert isinstance(call.name, str)
        json.dumps(call.arguments, allow_nan=False)  # what is handed on is JSON


@pytest.mark.parametrize("part", [Q, '"', "'", "\\", "{", "[", ",a:", " ", "\n,", "x ", "```", '{"name":', "}]", ',"',
                                  "\\\"", "<", f"{Q}x", "a:b,"])
@pytest.mark.parametrize("prefix", ["call:f{a:", f"call:f{{a:{Q}", 'call:f{a:"', '{"name":'])
def test_long_damage_takes_no_more_than_its_length(prefix, part):
    began = time.process_time()
    read_calls(prefix + part * (20_000 // len(part)))
    assert time.process_time() - began < 1.0  # a few milliseconds; what goes over it again and again takes minutes
