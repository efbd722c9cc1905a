"""Conversations in one shape, and errors that say which message is wrong."""

import json

import pytest

from dgemma.chat.messages import normalise_messages, normalise_tools
from dgemma.chat.reply import read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.train.data import tokenizer as bundled
from support.gemma_files import TEMPLATE as GEMMA_LIKE

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_a_string_is_one_user_message():
    assert normalise_messages("hi") == [USER]
    assert normalise_messages("hi", system="be good") == [{"role": "system", "content": "be good"}, USER]


def test_names_of_roles_and_parts():
    url = {"type": "image_url", "image_url": {"url": "data:x"}}
    content = [url, "a", {"type": "text", "text": "b"}]
    given = [
        {"role": "developer", "content": "s"},
        {"role": "model", "content": "m"},
        {"role": "user", "content": content},
    ]
    system, assistant, user = normalise_messages(given)
    assert (system["role"], assistant["role"]) == ("system", "assistant")
    assert user["content"][0] == {"type": "image", "url": "data:x"}
    assert user["content"][1:] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content[0] is url
    assert "image_url" in url


def test_thoughts_before_the_last_user_message_are_dropped():
    answer = {
        "role": "assistant",
        "content": "<|channel>thought\nin\n<channel|>said",
        "reasoning_content": "beside",
    }
    said = {"role": "assistant", "content": "said"}
    kept = {**said, "reasoning": "beside\n\nin", "reasoning_content": "beside\n\nin"}
    assert normalise_messages([USER, answer, USER]) == [USER, said, USER]
    assert normalise_messages([USER, answer]) == [USER, kept]
    parts = [{"type": "text", "text": answer["content"]}, {"type": "text", "text": "more"}]
    assert normalise_messages([USER, {**answer, "content": parts}, USER])[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "said"}, {"type": "text", "text": "more"}],
    }


def test_tool_calls_and_their_answers():
    text = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    bare = {"name": "g", "arguments": None}
    answer = {"role": "tool", "tool_call_id": "1", "content": "ok"}
    messages = normalise_messages(
        [USER, {"role": "assistant", "content": None, "tool_calls": [text, bare]}, answer]
    )
    nothing = {"type": "function", "function": {"name": "g", "arguments": {}}}
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, nothing]}
    assert messages[2] == {**answer, "name": "f"}


TWO = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "developer", "content": [{"type": "text", "text": "a"}]}, "a"),
        ({"role": "user", "content": TWO}, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        ({"role": "assistant", "content": TWO[1:]}, "b"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}, ""),
        ({"role": "tool", "name": "f", "content": TWO}, "a\nb"),
        ({"role": "tool", "name": "f", "content": []}, ""),
    ],
)
def test_what_clients_send_as_content(message, content):
    calling = {"role": "assistant", "tool_calls": [CALL]}
    assert normalise_messages([calling, message])[1]["content"] == content


@pytest.mark.parametrize("template", [bundled.TEMPLATE_FILE.read_text(), GEMMA_LIKE])
def test_templates_read_what_clients_send(template):
    """A whole round with a tool, as the newer clients write it: what was said is there, and no Python is."""
    part = [{"type": "input_text", "text": "the question"}]
    conversation = [
        {"role": "developer", "content": [{"type": "text", "text": "the rules"}]},
        {"role": "user", "content": part},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": TWO},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "the refusal"}]},
    ]
    prompt = Tokenizer(bundled.build_byte_tokenizer(), template, {"bos_token": "<bos>"}).render(conversation)
    for said in ("system\nthe rules<turn|>", "user\nthe question<turn|>", "a\nb", "the refusal<turn|>"):
        assert said in prompt
    assert "None" not in prompt
    assert "'text'" not in prompt


def test_tools():
    declaration = {"name": "f", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": declaration}]
    assert normalise_tools(wrapped) == normalise_tools([declaration]) == wrapped
    assert normalise_tools([{"type": "function", **declaration, "strict": None}]) == wrapped
    assert normalise_tools(None) is normalise_tools([]) is None


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        (None, "string or a list of messages, not null"),
        ({"role": "user"}, "not dict"),
        (["hi"], "message 0: must be a dictionary"),
        ([USER, {"role": "robot", "content": ""}], "message 1: unknown role 'robot'"),
        ([{"content": "hi"}], "unknown role None"),
        ([{"role": ["user"], "content": "hi"}], "unknown role"),
        ([{"role": "user"}], "content is missing"),
        ([{"role": "user", "content": 3}], "not int"),
        ([{"role": "user", "content": {"text": "hi"}}], "not dict"),
        ([{"role": "user", "content": [3]}], "message 0, part 0: must be"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "unknown type 'smell'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "with a url"),
        ([{**USER, "tool_calls": [CALL]}], "only an assistant"),
        ([{"role": "assistant", "tool_calls": "f()"}], "must be a list"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "tool call 0: must be"),
        ([{"role": "tool", "content": "x"}], "tool_call_id"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": ["9"]}], "message 1: tool_call_id must be a string"),
        ([{"role": "tool", "content": "x", "name": {}}], "message 0: name must be a string, not dict"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": {}}]}], "message 0, tool call 0: id must be a string"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "unknown type"),
        ([{"role": "assistant", "content": [{"type": "refusal", "text": "x"}]}], "needs a string `refusal`"),
    ],
)
def test_what_is_wrong_is_said(messages, error):
    for strict in (False, True):
        with pytest.raises(DgemmaError, match=error):
            normalise_messages(messages, strict=strict)


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


BROKEN = [
    ('{"q": ', '"q":'), ('{"q": "a', '"q": "a'), ('{"q": "a"}}', '"q": "a"}'), ("no JSON", "no JSON"),
    ("[1, 2]", "[1, 2]"), ("3", "3"), ('"a"', '"a"'), ("1" * 5000, "1" * 5000), ("[" * 100_000, "[" * 100_000),
    (3, "3"), ([1], "[1]"), (True, "true"), ("[]", {}), ("null", {}), (" ", {}), ("", {}), (None, {}), ([], {}),
    ("{", {}), ("{}", {}),
    (json.dumps(deep(70)), json.dumps(deep(70))[1:-1]), (deep(70), json.dumps(deep(70))[1:-1]), (deep(100_000), {}),
    ({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}), ({"a": [deep(50)]}, {"a": [deep(50)]}),
]


@pytest.mark.parametrize(("given", "kept"), BROKEN, ids=[str(given)[:20] for given, _ in BROKEN[:-4]] + list("abcd"))
@pytest.mark.parametrize("template", [
    bundled.TEMPLATE_FILE.read_text(),
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}"
    "{{ v }}{% endfor %}{% endfor %}{{ m.content }}{% endfor %}"])
def test_broken_arguments_of_an_earlier_call_end_no_conversation(given, kept, template):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    conversation = [USER, {"role": "assistant", "content": "so", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "1", "content": "no such thing"}]
    assert normalise_messages(conversation)[1]["tool_calls"][0]["function"]["arguments"] == kept
    if len(str(kept)) > 5000:
        return
    prompt = Tokenizer(bundled.build_byte_tokenizer(), template, {"bos_token": "<bos>"}).render(conversation)
    assert "so" in prompt and "no such thing" in prompt
    if isinstance(kept, str) and "items" not in template:
        assert f"call:f{{{kept}}}" in prompt


def test_what_is_broken_is_not_to_be_learnt():
    def of(**fields):
        return [USER, {"role": "assistant", **fields}]

    for arguments in ('{"q": ', "[]", "3", [1], deep(70)):
        with pytest.raises(DgemmaError, match=r"message 1, tool call 0: arguments"):
            normalise_messages(of(tool_calls=[{"name": "f", "arguments": arguments}]), strict=True)
    with pytest.raises(DgemmaError, match="content is missing"):
        normalise_messages(of(content=None), strict=True)
    with pytest.raises(DgemmaError, match="earlier call"):
        normalise_messages([USER, {"role": "tool", "content": "x", "tool_call_id": "9"}], strict=True)


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": None, "tool_calls": None},
                                     {"content": None, "tool_calls": []}, {"content": None, "refusal": None}])
def test_an_assistant_without_content_said_nothing(message):
    assert normalise_messages([USER, {"role": "assistant", **message}, USER]) == [
        USER, {"role": "assistant", "content": ""}, USER]


def test_a_tools_answer_may_be_empty_and_its_call_trimmed_away():
    # Templates drop what follows no call: the user tells it.
    conversation = [{"role": "tool", "tool_call_id": "9", "content": "42 degrees"}, USER]
    told = normalise_messages(conversation)[0]
    assert told["role"] == "user" and "42 degrees" in told["content"]
    named = normalise_messages([{"role": "tool", "name": "look", "content": {"a": 1}}, USER])[0]
    assert named["content"] == "Result of look, which was called earlier:\na: 1"
    empty = normalise_messages([
        {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": None}])[1]
    assert empty == {"role": "tool", "tool_call_id": "1", "name": "f", "content": ""}


def test_answers_with_ids_of_nobodys_belong_to_the_calls_before_them():
    calls = {"role": "assistant", "tool_calls": [{"id": name, "function": {"name": name}} for name in "ab"]}
    answers = [{"role": "tool", "tool_call_id": "?", "content": "x"} for _ in range(3)]
    assert [message.get("name") for message in normalise_messages([USER, calls, *answers])[2:]] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("f", "list"),
        (["f"], "tool 0"),
        ([{"type": "web"}], "'web' is not supported"),
        ([{"type": "function"}], "must be"),
        *[([{"name": "ok"}, {"name": name}], "tool 1: ") for name in (
            "", " ", " a", "a ", "a{b", "a}", "{}", "a\nb", "a\tb", "\0", "a\x7f", "a\u2028b", "<|tool_call>", 'a<|"|>',
            "a|>", "\ud800", "\ue000")],
    ],
)
def test_what_is_wrong_with_tools(tools, error):
    with pytest.raises(DgemmaError, match=error):
        normalise_tools(tools)


@pytest.mark.parametrize("name", ["a", "ns:tool", "my tool", "a[0]", "mcp__x.y", "f(x)", "it's", 'say "x"', "a<b",
                                  "日本", "a,b", "call:f", "default_api.f", "print", "true", "1", "a=b", "x" * 300])
def test_a_name_that_can_be_declared_can_be_called(name):
    """Declared, shown to the model, called as the template writes it, and read back."""
    tokenizer = Tokenizer(bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"})
    tools = [{"name": name, "parameters": {"type": "object", "properties": {"a b": {}, "n": {}}}}, {"name": "other"}]
    prompt = tokenizer.apply_chat_template([USER], tools=tools)
    call = {"name": name, "arguments": {"a b": "x<y", "n": 1}}
    said = tokenizer.apply_chat_template([USER, {"role": "assistant", "tool_calls": [call]}], tools=tools,
                                         add_generation_prompt=False)[len(prompt):]
    answer = read_answer(tokenizer, prompt, said, normalise_tools(tools))
    assert (answer.text.strip(), answer.tool_calls) == ("", [call])
    shorter = {"name": name, "arguments": {"n": 1}}
    said = tokenizer.apply_chat_template([USER, {"role": "assistant", "tool_calls": [shorter]}], tools=tools,
                                         add_generation_prompt=False)[len(prompt):]
    assert len(name) > 150 or read_answer(tokenizer, prompt, said).tool_calls == [shorter]  # from the prompt alone
