"""The bundled chat template: exact prompts, the same in our environment and in transformers'."""

import copy
from pathlib import Path

import pytest

import dgemma
from dgemma.chat.messages import normalise_messages, normalise_tools
from dgemma.chat.reply import read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where", "enum": ["Bern", "Rom"]},
                "type": {"type": "integer"},
                "days": {"type": "array", "items": {"type": "number"}, "nullable": True},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = {
    "city": 'a "b" {c}',
    "n": 3,
    "f": 1.5,
    "none": None,
    "yes": True,
    "list": [1, [], {}],
    "map": {"k": "v"},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}

USER = {"role": "user", "content": " Hi\n there "}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "user": ([USER], {}, "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\n"),
    "no generation prompt": (
        [USER],
        {"add_generation_prompt": False},
        "<bos><|turn>user\nHi\n there<turn|>\n",
    ),
    "system": (
        [SYSTEM, USER],
        {},
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi\n there<turn|>\n<|turn>model\n",
    ),
    "thinking": (
        [USER],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi\n there<turn|>\n<|turn>model\n",
    ),
    "thinking with system": (
        [SYSTEM, USER],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nHi\n there<turn|>\n<|turn>model\n",
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
        {},
        "<bos><|turn>user\none\ntwo<turn|>\n<|turn>model\n",
    ),
    "earlier thoughts": (
        [
            USER,
            {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>Yes.", "reasoning": "hm"},
            {"role": "user", "content": "Sure?"},
        ],
        {},
        "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\nYes.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n",
    ),
    "tools": (
        [SYSTEM, USER],
        {"tools": [WEATHER, NOW]},
        (
            '<bos><|turn>system\nBe brief.<|tool>declaration:weather{description:<|"|>Weather of a place<|"|>,'
            'parameters:{properties:{city:{description:<|"|>Where<|"|>,enum:[<|"|>Bern<|"|>,<|"|>Rom<|"|>],'
            'type:<|"|>STRING<|"|>},days:{items:{type:<|"|>NUMBER<|"|>},nullable:true,type:<|"|>ARRAY<|"|>},'
            'type:{type:<|"|>INTEGER<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
            '<|tool>declaration:now{description:<|"|><|"|>}<tool|><turn|>\n'
            "<|turn>user\nHi\n there<turn|>\n<|turn>model\n"
        ),
    ),
    "tool call answered": (
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ],
        {},
        (
            "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\n"
            '<|tool_call>call:weather{city:<|"|>a "b" {c}<|"|>,f:1.5,list:[1,[],{}],map:{k:<|"|>v<|"|>},n:3,none:null,'
            'yes:true}<tool_call|><|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
        ),
    ),
    "tool that shows something": (
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "now",
                                                                                           "arguments": {}}}]},
            {"role": "tool", "tool_call_id": "1", "content": [
                {"type": "text", "text": "the clock"}, {"type": "image", "path": "a.png"}]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "image", "path": "b.png"}]},
        ],
        {},
        (
            "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\n<|tool_call>call:now{}<tool_call|>"
            '<|tool_response>response:now{value:<|"|>the clock<|"|>}<tool_response|><|image|>'
            '<|tool_response>response:now{value:<|"|><|"|>}<tool_response|><|image|>'
        ),
    ),
    "after the tool": (
        [
            USER,
            {
                "role": "assistant",
                "content": "Look:",
                "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": {}}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": {"hour": 3, "am": False}},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": "Thanks"},
        ],
        {},
        (
            "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\nLook:<|tool_call>call:now{}<tool_call|>"
            "<|tool_response>response:now{am:false,hour:3}<tool_response|>Three.<turn|>\n"
            "<|turn>user\nThanks<turn|>\n<|turn>model\n"
        ),
    ),
    "tool call unanswered": (
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now"}}]}, USER],
        {"add_generation_prompt": False},
        (
            "<bos><|turn>user\nHi\n there<turn|>\n<|turn>model\n<|tool_call>call:now{}<tool_call|><turn|>\n"
            "<|turn>user\nHi\n there<turn|>\n"
        ),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt(tokenizer, name):
    messages, options, prompt = CONVERSATIONS[name]
    before = copy.deepcopy(messages)
    assert tokenizer.render(messages, **options) == prompt
    assert tokenizer.apply_chat_template(messages, **options) == tokenizer.encode(prompt)
    assert messages == before


@pytest.fixture(scope="module")
def theirs(tokenizer_folder):
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    made.chat_template = (tokenizer_folder / "chat_template.jinja").read_text(encoding="utf-8")
    return made


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_transformers_renders_the_same(tokenizer, theirs, name, normalised):
    messages, options, prompt = CONVERSATIONS[name]
    tools = options.get("tools")
    rendered = theirs.apply_chat_template(
        normalise_messages(messages) if normalised else messages,
        tools=normalise_tools(tools) if normalised else tools,
        tokenize=False,
        add_generation_prompt=options.get("add_generation_prompt", True),
        enable_thinking=options.get("thinking", False),
    )
    assert rendered == prompt


def test_a_rendered_call_parses_back(tokenizer):
    _, _, prompt = CONVERSATIONS["tool call answered"]
    assert read_answer(tokenizer, [], tokenizer.encode(prompt)).tool_calls == [
        {"name": "weather", "arguments": ARGUMENTS}
    ]


def test_a_picture_and_a_film_are_one_token_each_where_they_stand(tokenizer):
    parts = [{"type": "image", "image": object()}, {"type": "video", "path": "a.mp4"}, {"type": "text", "text": "Hi"}]
    assert "<|image|>\n<|video|>\nHi" in tokenizer.render([{"role": "user", "content": parts}])


def test_the_bundled_model_takes_pictures_and_refuses_films():
    bundled = Tokenizer.from_folder(Path(dgemma.__file__).parent / "models" / "sudoku")
    words = {"type": "text", "text": "Solve this"}
    assert "user\n<|image|>\nSolve this<turn|>" in bundled.render(
        [{"role": "user", "content": [{"type": "image", "image": object()}, words]}])
    with pytest.raises(DgemmaError, match="text and pictures, not video"):
        bundled.render([{"role": "user", "content": [{"type": "video", "video": object()}, words]}])
