"""An answer read canvas by canvas: nothing is lost, nothing is told too early, and the cuts do not show."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat.reply import Called, ReplyReader, Said, Thought, declared_tools, read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data import tokenizer as bundled
from support.gemma_files import SPECIALS, tokenizer_json

TOKENIZER = Tokenizer(bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"})
CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
JSON = '{"name": "f", "arguments": {"a": "x"}}'
READ = Called("f", {"a": "x"})
REPAIRED = Called("f", {"a": "x"}, repaired=True)


def pieces_of(text, *cuts, typed=False, **options):
    """What comes out of each feed, and of finish: the text's tokens cut after these pieces of it."""
    reader = ReplyReader(TOKENIZER, [], **options)
    fed = [reader.feed(TOKENIZER.encode(part, specials=not typed)) for part in (text, *cuts)]
    return [*fed, reader.finish().rest]


def simple(pieces):
    """Said as its text, the rest as it is."""
    return [piece.text if isinstance(piece, Said) else piece for piece in pieces]


def read(text, typed=False, **options):
    return simple([piece for fed in pieces_of(text, typed=typed, **options) for piece in fed])


def test_pieces_come_in_their_order_and_as_soon_as_they_are_sure():
    fed = pieces_of("<|channel>thought\nhm", " well\n<channel|>Look: ", CALL[:20], CALL[20:] + "So", "!")
    assert [simple(pieces) for pieces in fed] == [
        [Thought("hm")], [Thought(" well"), "Look: "], [], [READ, "So"], ["!"], []]


def test_a_character_is_said_when_its_last_byte_is_there():
    ids = TOKENIZER.encode("a日b")
    reader = ReplyReader(TOKENIZER, [])
    assert reader.feed(ids[:2]) == [Said("a", (0, 1))]
    assert reader.feed(ids[2:3]) == []
    assert reader.feed([0, *ids[3:]]) == [Said("日b", (1, 6))]  # fill in between is no text
    assert reader.finish().rest == []


def test_a_broken_character_is_shown_as_one():
    ids = TOKENIZER.encode("é")
    for tail, text in (([], "\ufffd"), (TOKENIZER.encode("b"), "\ufffdb"), (TOKENIZER.encode(CALL), "\ufffd")):
        assert read_answer(TOKENIZER, [], [*ids[:1], *tail]).text == text


def test_lone_bytes_of_gemmas_own_tokenizer_make_characters():
    from tokenizers import Tokenizer as Backend

    tokenizer = Tokenizer(Backend.from_str(json.dumps(tokenizer_json())))
    text = "ab cd日本 é🙂\n"
    ids = tokenizer.encode(text)
    reader = ReplyReader(tokenizer, [])
    assert "".join(piece.text for token in ids for piece in reader.feed([token])) == text
    assert reader.finish().rest == []
    assert len(SPECIALS) == 9  # there are no tool marks here, and none are needed


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (f"{CALL}{CALL}", [READ, READ]),
        (f"<|channel>thought\n{CALL}<channel|>ok", [Thought(CALL), "ok"]),
        ("<|tool_call>nothing<tool_call|> and", ["<|tool_call>nothing<tool_call|> and"]),
        ("<|tool_call>nothing", ["<|tool_call>nothing"]),
        (CALL.removesuffix("}<tool_call|>"), [REPAIRED]),
        (CALL.replace("<tool_call|>", "") + CALL, [REPAIRED, READ]),
        (CALL.replace("<tool_call|>", "") + "<|channel>thought\nhm<channel|>ok", [REPAIRED, Thought("hm"), "ok"]),
        ('a<tool_call|>b<|"|>', ['a<tool_call|>b<|"|>']),
        ("\n\nHi\n", ["Hi\n"]),
        (f"\n{JSON}", [JSON]),  # no tools were declared
    ],
)
def test_marks(text, pieces):
    assert read(text) == pieces


def test_without_tools_nothing_is_a_call():
    for text in (CALL, f"<|channel>thought\nhm<channel|>{CALL}", JSON, f"{CALL}ok"):
        assert not any(isinstance(piece, Called) for piece in read(text, tools=[]))
    assert read(f"So {CALL}", tools=[]) == [f"So {CALL}"]
    assert read(f"<|channel>thought\n{CALL}", tools=[]) == [Thought(CALL)]


def test_marks_typed_as_text_are_text_within_a_call_too():
    ids = [*TOKENIZER.encode('<|tool_call>call:f{a:<|"|>'), *TOKENIZER.encode(f"1<2 {CALL} \ue000", specials=False),
           *TOKENIZER.encode('<|"|>}<tool_call|>')]
    assert ReplyReader(TOKENIZER, []).feed(ids) == [Called("f", {"a": f"1<2 {CALL} \ue000"})]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (JSON, [REPAIRED]),
        (f" \n{JSON}\n", [REPAIRED]),
        (f"<|channel>thought\nhm<channel|>{JSON}", [Thought("hm"), REPAIRED]),
        (f"{JSON}\n{JSON}", [REPAIRED, REPAIRED]),
        (f"[{JSON}, {JSON}]", [REPAIRED, REPAIRED]),
        ('{"function": "f", "parameters": {"a": "x"}}', [REPAIRED]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}}', [REPAIRED]),
        ('{"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": "x"}}}]}', [REPAIRED]),
        ('{"name": "f", "arguments": {"a": "x",},}', [REPAIRED]),
        ('{"name": "f", "arguments": {"a": "x"}', [REPAIRED]),
        (f"I call:\n```json\n{JSON}\n```\nDone.", ["I call:\n", REPAIRED, "\nDone."]),
        (f"```\n{JSON}```", [REPAIRED]),
        (f"```json\n{JSON}", [REPAIRED]),
        ('```json\n{"name": "f", "arguments": {"a": "x",}}\n```.', [REPAIRED, "."]),
        ('```json\n{"name": "f", "arguments": {"a": "```"}}\n```', [Called("f", {"a": "```"}, repaired=True)]),
    ],
)
def test_json_that_calls_a_declared_tool(text, pieces):
    assert read(text, tools=["f"]) == pieces


@pytest.mark.parametrize(
    "text",
    [
        f"I call {JSON}",
        f"{JSON} is how one calls it.",
        f"```json\n{JSON}\n... ```",
        JSON.replace('"f"', '"g"'),
        '{"name": "f"}',
        '{"name": "f", "arguments": {"a": "x',
        '{"name": "f", "age": 3}',
        '{"name": "f", "parameters": {"type": "object", "properties": {}}}',
        '{"answer": 42}',
        "[1, 2]",
        "{",
        "```",
        "``",
        "```json",
        "```python\nf()\n```",
        "```json\n{\"a\": 1}\n```",
        '{"name": ' + "[" * 3000,
        "[]",
        " ",
    ],
)
def test_other_json_is_text(text):
    assert "".join(read(text, tools=["f"])) == text


@pytest.mark.parametrize("arguments", [
    '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1} x', "[1]", '{"a": ' * 900 + "1" + "}" * 900,
    '{"a": ' * 5000 + "1" + "}" * 5000], ids=lambda text: text[:20])
def test_arguments_written_as_text_must_be_a_json_object_of_sane_depth(arguments):
    call = '{"name": "f", "arguments": ' + json.dumps(arguments) + "}"
    for text in (call, f"```json\n{call}\n```", f"<|tool_call>{call}<tool_call|>"):
        assert "".join(read(text, tools=["f"])) == text


def test_text_that_cannot_be_a_call_is_not_held_back():
    fed = pieces_of('{"answer": ', "42}", tools=["f"])
    assert [simple(pieces) for pieces in fed] == [['{"answer": '], ["42}"], []]
    fed = pieces_of("See `x` and ``", "`py\nf()\n``", "`", tools=["f"])
    assert [simple(pieces) for pieces in fed] == [["See `x` and "], ["```py\nf()\n"], [], ["```"]]


def test_the_prompt_says_which_tools_there_are():
    declared = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "get_weather")]
    prompt = TOKENIZER.apply_chat_template("<|tool>declaration:typed{}<tool|>", tools=declared)
    assert declared_tools(TOKENIZER, prompt) == ["f", "get_weather"]
    assert read_answer(TOKENIZER, prompt, TOKENIZER.encode(JSON)).tool_calls == [{"name": "f", "arguments": {"a": "x"}}]
    assert read_answer(TOKENIZER, prompt, TOKENIZER.encode(JSON), tools=[]).text == JSON


def stop_place(ids, stop):
    reader = ReplyReader(TOKENIZER, [], stop=stop)
    for token in ids:
        reader.feed([token])
    return reader.stop_place


@pytest.mark.parametrize(
    ("text", "stop", "said", "met"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["four"], "one two three", None),
        ("abcabd", ["abd"], "abc", "abd"),
        ("aab", ["ab"], "a", "ab"),
        ("xabc", ["abc", "b"], "xa", "b"),  # b is complete first
        ("xabc", ["bc", "abc"], "x", "abc"),  # both at once
        ("one tw", ["two"], "one tw", None),
        ("two", ["two"], "", "two"),
        ("a日本b", ["本"], "a日", "本"),
        ("<|channel>thought\ntwo<channel|>one two", ["two"], "one ", "two"),
        (f"{CALL}one x two", ["x"], "one ", "x"),
        ("on<|channel>thought\nhm<channel|>e", ["one"], "one", None),  # not one stretch of text
        ("a<pad>b", ["ab"], "", "ab"),
        ("<|tool_call>no call<tool_call|>", ["call"], "<|tool_", "call"),
        ("one", [""], "one", None),
    ],
)
def test_stop_strings(text, stop, said, met):
    ids = TOKENIZER.encode(text)
    answer = read_answer(TOKENIZER, [], ids, stop=stop)
    assert (answer.text, answer.stopped) == (said, met)
    kept = stop_place(ids, stop)
    if met is None:
        assert kept is None
        return
    assert read_answer(TOKENIZER, [], ids[:kept], stop=stop) == answer
    assert read_answer(TOKENIZER, [], ids[: kept - 1], stop=stop).stopped is None


def test_what_may_become_a_stop_string_is_held_back_and_nothing_follows_it():
    fed = pieces_of("one t", "wi", "ce tw", f"o {CALL}", "<|channel>thought\nhm", stop=["two"])
    assert [simple(pieces) for pieces in fed] == [["one "], ["twi"], ["ce "], [], [], []]


def test_said_tokens_tile_the_text():
    reader = ReplyReader(TOKENIZER, [], stop=["xyz"])
    ids = TOKENIZER.encode("<|channel>thought\nhm<channel|>\nab xy日<pad>c")
    pieces = [piece for token in ids for piece in reader.feed([token])] + reader.finish().rest
    said = [piece for piece in pieces if isinstance(piece, Said)]
    assert "".join(piece.text for piece in said) == "ab xy日c"
    for piece in said:
        assert TOKENIZER.decode(ids[slice(*piece.tokens)], skip_special_tokens=True) == piece.text


def in_thoughts(ids, inside):
    """How many tokens belong to thoughts, their marks included."""
    opened, closed = map(TOKENIZER.token_to_id, ("<|channel>", "<channel|>"))
    count = 0
    for token in ids:
        inside = inside or token == opened
        count += inside
        inside = inside and token != closed
    return count


BITS = st.sampled_from([
    "<|channel>", "<channel|>", "thought\n", "<|tool_call>", "<tool_call|>", "call:f{a:1}", "call:f{", "}", '<|"|>',
    CALL, JSON, JSON[:12], "```", "```json\n", "\n", " ", "a", "b", "ab", "`", "日", "<", "<pad>",
    '{"name"', "[", "stop", "st"])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(BITS, max_size=12), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_cuts_do_not_show(bits, with_tools, inside, random):
    ids = [token for bit in bits for token in TOKENIZER.encode(bit)]
    ids = [*ids, *random.choices(range(128, 288), k=2)] if random.random() < 0.3 else ids  # broken characters
    prompt = TOKENIZER.encode("<|channel>") if inside else []
    options = {"tools": ["f"] if with_tools else [], "stop": ["stop", "ab", "b日"]}
    whole = read_answer(TOKENIZER, prompt, ids, **options)

    reader, pieces, rest, fed = ReplyReader(TOKENIZER, prompt, **options), [], ids, 0
    places = [0]
    while rest:
        size = random.randint(1, 9)
        new = reader.feed(rest[:size])
        fed += len(rest[:size])
        rest = rest[size:]
        pieces += new
        places += [place for piece in new if isinstance(piece, Said) for place in piece.tokens]
        assert max(places) <= fed
    last = reader.finish()
    pieces += last.rest
    places += [place for piece in last.rest if isinstance(piece, Said) for place in piece.tokens]
    assert places == sorted(places)
    assert all(piece.text for piece in pieces if not isinstance(piece, Called))
    assert "".join(piece.text for piece in pieces if isinstance(piece, Said)) == whole.text
    assert ("".join(piece.text for piece in pieces if isinstance(piece, Thought)) or None) == whole.reasoning
    assert [{"name": piece.name, "arguments": piece.arguments}
            for piece in pieces if isinstance(piece, Called)] == whole.tool_calls
    assert last == whole
    assert whole.thought_tokens == in_thoughts(ids[: reader.stop_place], inside)
    if not whole.tool_calls and not any(map(TOKENIZER.is_special, ids)):
        assert not any(stop in whole.text for stop in options["stop"])
