"""Tool calls in Gemma's notation: what is well formed is read, what is not stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat import Tokenizer, parse_tool_calls
from dgemma.train import tokenizer as bundled

TOKENIZER = Tokenizer(
    bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"}
)


def call(body):
    return f"<|tool_call>call:f{body}<tool_call|>"


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("{}", {}),
        ('{key:<|"|>text<|"|>,n:3}', {"key": "text", "n": 3}),
        ("{a:null,b:true,c:false,d:-1.5e3,e:0}", {"a": None, "b": True, "c": False, "d": -1500.0, "e": 0}),
        ("{a:[],b:{},c:[1,[2,{d:[]}]]}", {"a": [], "b": {}, "c": [1, [2, {"d": []}]]}),
        ('{a:<|"|>},<tool_call|>{"\\n<|tool_call><|"|>}', {"a": '},<tool_call|>{"\\n<|tool_call>'}),
        ('{ a : 1 , b : [ <|"|><|"|> , 2 ] }', {"a": 1, "b": ["", 2]}),
        ('{<|"|>a key: {}<|"|>:1,b-c.d_e:2}', {"a key: {}": 1, "b-c.d_e": 2}),
    ],
)
def test_well_formed(body, arguments):
    assert parse_tool_calls(call(body)) == ("", [{"name": "f", "arguments": arguments}])


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "<|tool_call>",
        "<|tool_call>call:f{}",
        "<|tool_call>call:f{a:1<tool_call|>",
        "<|tool_call>f{}<tool_call|>",
        "<|tool_call>call:{}<tool_call|>",
        "<|tool_call>call:f<tool_call|>",
        call("{}}"),
        call("{a}"),
        call("{a:}"),
        call("{a:1,}"),
        call("{,a:1}"),
        call("{a:1 b:2}"),
        call("{a:1,a:2}"),
        call("{a:[1,]}"),
        call("{a:text}"),
        call("{a:nullx}"),
        call("{a:01}"),
        call("{a:1x}"),
        call("{a:NaN}"),
        call("{a:1e999}"),
        call("{a:" + "9" * 5000 + "}"),
        call('{a:<|"|>open}'),
        call("{a:" + "[" * 5000 + "]" * 5000 + "}"),
    ],
)
def test_malformed_stays_text(text):
    assert parse_tool_calls(text) == (text, [])


def test_calls_among_text_and_broken_ones():
    text = f"Look:{call('{a:1}')}{call('{a:')} and {call('{}')}."
    rest, calls = parse_tool_calls(text)
    assert rest == f"Look:{call('{a:')} and ."
    assert [found["arguments"] for found in calls] == [{"a": 1}, {}]
    assert parse_tool_calls("<|tool_call>" + call("{}")) == ("<|tool_call>", [{"name": "f", "arguments": {}}])


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,4}", fullmatch=True)
TEXT = st.text(max_size=8).filter(lambda text: '<|"|>' not in text)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_the_template_writes_is_read_back(arguments):
    made = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
    prompt = TOKENIZER.render([made], add_generation_prompt=False)
    rest, calls = parse_tool_calls(prompt)
    assert rest == "<bos><|turn>model\n<turn|>\n"
    assert json.dumps(calls, sort_keys=True) == json.dumps(
        [{"name": "f", "arguments": arguments}], sort_keys=True
    )
