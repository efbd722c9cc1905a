"""Calls as models really write them: the right call or plain text, never another name, never a part of an argument."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat.repair import read_calls
from dgemma.chat.reply import ReplyReader, read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data import tokenizer as bundled

TOKENIZER = Tokenizer(bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"})
OPEN, CLOSE, Q = "<|tool_call>", "<tool_call|>", '<|"|>'
STRING = {"type": "string"}


def tool(name, required=(), **properties):
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(required)}}}


TOOLS = [
    tool("look", ["q"], q=STRING),
    tool("run_code", ["code"], code=STRING, lang=STRING),
    tool("add", ["a", "b"], b={"type": "integer"}, a=STRING),
    tool("pair", x=STRING, a=STRING), tool("book", ["order"], order={"type": "object"}),
    tool("ns:tool", a={}), tool("ns", a={}), tool("my tool", a={}), tool("a[0]"), tool("mcp__x.y", **{"a key": {}}),
    tool("x<y", **{"<": {}}), tool("it's", a={}), {"type": "function", "function": {"name": "bare"}}]


def marks(text):
    return text.replace("Q", Q)


def read(text, tools=TOOLS, **options):
    answer = read_answer(TOKENIZER, [], TOKENIZER.encode(marks(text)), tools, **options)
    return answer.text, answer.reasoning, [(call["name"], call["arguments"]) for call in answer.tool_calls]


def in_marks(text):
    return read(f"{OPEN}{text}{CLOSE}")


@pytest.mark.parametrize(("source", "arguments"), [
    ("call:look()", {}),
    ("call:look{}", {}),
    ("call:look;", {}),
    ("call:look", {}),
    ("look", {}),
    ('"look"{}', {}),
    ("call:QlookQ{}", {}),
    ('call:look(q="a")', {"q": "a"}),
    ("look('a')", {"q": "a"}),
    ("look(QaQ)", {"q": "a"}),
    ("call:look('a',)", {"q": "a"}),
    ("call:look{q='a'}", {"q": "a"}),
    ("call:look{q = QaQ}", {"q": "a"}),
    ('call:look{q: "a"}', {"q": "a"}),
    ("call: look {q:QaQ}", {"q": "a"}),
    ("call :look:{q:QaQ}", {"q": "a"}),
    ("look{q:QaQ}", {"q": "a"}),
    ("look(q=QaQ)", {"q": "a"}),
    ("call:look(q: QaQ)", {"q": "a"}),
    ('look({"q": "a"})', {"q": "a"}),
    ('call:look{{"q": "a"}}', {"q": "a"}),
    ("call:look{q:QaQ", {"q": "a"}),
    ("call:look(q=QaQ", {"q": "a"}),
    ("call:look{q:QaQ}}", {"q": "a"}),
    ("call:look{q:QaQ});", {"q": "a"}),
    ("call:look{q:QaQn:3}", {"q": "a", "n": 3}),
    ('call:look{"q":"a" "n":3}', {"q": "a", "n": 3}),
    ("call:look{q:{a:1}n:[QaQ QbQ]}", {"q": {"a": 1}, "n": ["a", "b"]}),
    ("look(q='it's fine')", {"q": "it's fine"}),
    ("call:look{q:'rock 'n' roll'}", {"q": "rock 'n' roll"}),
    ('look(q="a\\n\\"b\\" \\u00e9\\ud83d\\ude42 C:\\\\x")', {"q": 'a\n"b" é🙂 C:\\x'}),
    ('look(q="""a "b"\nc""")', {"q": 'a "b"\nc'}),
    ("look(q=None, n=True, m=[1, 2.5, False,], d={'x': 'y', 'z': ()})", None),
    ("look(q=None, n=True, m=[1, 2.5, False,], d={'x': 'y', 'z': []})",
     {"q": None, "n": True, "m": [1, 2.5, False], "d": {"x": "y", "z": []}}),
    ("print(look(q='a'))", {"q": "a"}),
    ("default_api.look(q='a')", {"q": "a"}),
    ("functions.look(q='a')", {"q": "a"}),
    ('{"name": "look", "arguments": {"q": "a"}}', {"q": "a"}),
    ("call:look{q:007}", {"q": "007"}),  # a string it has to be, and no number it could be
    ("call:look{q:7}", {"q": 7}),  # but a number is what was written
    ("call:look(q=7)", {"q": 7}),
])
def test_forms_of_a_call(source, arguments):
    expected = [] if arguments is None else [("look", arguments)]
    text, _, calls = in_marks(source)
    assert calls == expected
    assert text == ("" if expected else marks(f"{OPEN}{source}{CLOSE}"))


@pytest.mark.parametrize(("source", "code"), [
    ("call:run_code{code:Qx(QhiQ)Q}", 'x("hi")'),
    ("call:run_code{code:Qprint(QaQ, QbQ)Q}", 'print("a", "b")'),
    ("call:run_code{code:Qprint(QaQ, end=QQ)Q}", 'print("a", end="")'),
    ("call:run_code{code:Qd = {Qa b, cQ: 1}Q}", 'd = {"a b, c": 1}'),
    ('call:run_code{"code":"print("hi")"}', 'print("hi")'),
    ('run_code(code="print("hi")")', 'print("hi")'),
    ("run_code(code='print('hi')')", "print('hi')"),
    ("run_code(code='print(\"hi\")')", 'print("hi")'),
    ("call:run_code{code:Qprint(1)\n}Q}", "print(1)\n}"),
    ("call:run_code{code:Qif (a) { b(); }Q,}", "if (a) { b(); }"),
    ("call:run_code{code:Qf('<tool_call|>')Q}", "f('<tool_call|>')"),
    ("call:run_code{code:Qprint(<tool_call|>)Q,}", "print(<tool_call|>)"),
    ("call:run_code{code:Qprint(Q<tool_call|>Q)Q}", 'print("<tool_call|>")'),
    ("call:run_code{code:Q<tool_call|><tool_call|>Q}", "<tool_call|><tool_call|>"),
    ('call:run_code{"code":"a<tool_call|>b"}', "a<tool_call|>b"),
    ("run_code('a<tool_call|>b')", "a<tool_call|>b"),
    ("call:run_code{code:Qa<channel|>bQ}", "a<channel|>b"),
    ("run_code('x')", "x"),  # the only parameter that has to be there
])
def test_what_stands_in_a_string_is_whole(source, code):
    assert in_marks(source) == ("", None, [("run_code", {"code": code})])
    for call in read(source)[2] if "<channel|>" not in source else ():  # without marks: this call, or text
        assert call == ("run_code", {"code": code})


@pytest.mark.parametrize(("source", "call"), [
    ("call:ns:tool{a:1}", ("ns:tool", {"a": 1})),
    ("call:ns:{a:1}", ("ns", {"a": 1})),
    ("call:ns{a:1}", ("ns", {"a": 1})),
    ("ns:tool(a=1)", ("ns:tool", {"a": 1})),
    ("call:my tool{a:1}", ("my tool", {"a": 1})),
    ('"my tool"(a=1)', ("my tool", {"a": 1})),
    ("call:a[0]{}", ("a[0]", {})),
    ("a[0]()", ("a[0]", {})),
    ("call:mcp__x.y{a key:QvQ}", ("mcp__x.y", {"a key": "v"})),
    ("call:x<y{<:Qa<bQ}", ("x<y", {"<": "a<b"})),
    ("call:it's{a:1}", ("it's", {"a": 1})),
    ('{"name": "my tool", "arguments": {}}', ("my tool", {})),
    ("add('x', 3)", ("add", {"a": "x", "b": 3})),  # as the types have it, not the order
    ("book({'a': 1})", ("book", {"order": {"a": 1}})),
    ("book(order={'a': 1})", ("book", {"order": {"a": 1}})),
])
def test_names_and_places(source, call):
    assert in_marks(source) == ("", None, [call])


@pytest.mark.parametrize("source", [
    "call:lookup{q:QaQ}", "call:look_up{}", "call:loo{}", "call:other.look{}", "call:look.x{}", "look up{}",
    '{"name": "lookup", "arguments": {}}', '{"name": "look up", "arguments": {}}', "lookup('a')",
    "{q='a'}", "('a')", "call:{q:QaQ}", "call:'{q:QaQ}", "call:look x{q:QaQ}",
    "look(a)", "look(q=f(x))", "look('a', 'b')", "look(q='a', 'b')", "look(q='a', q='b')", "add('x')", "bare('a')",
    "pair('x')", "pair('x', 'y')",  # either could be the first: the templates sort parameters
    "call:look{q:QaQ;n:3}", "call:look{q:QaQ} then more", "look(q=QaQ}", "call:look[q]",
    "call:run_code{code:Qsay(Qlang:Q)Q}",  # one argument, or two
    "call:look{q:Qa Q b Q c Q d}", "call:look{q:Qa", "",
])
def test_what_could_be_something_else_is_text(source):
    whole = marks(f"{OPEN}{source}")
    if source != "call:look{q:Qa":
        assert in_marks(source) == (whole + CLOSE, None, [])
    assert read(f"{OPEN}{source}") == (whole, None, [])


@pytest.mark.parametrize("between", ["", ",", ";", "\n", ", "])
def test_several_calls_in_one_pair_of_marks(between):
    expected = [("look", {"q": "a"}), ("run_code", {"code": "x"})]
    assert in_marks(f"call:look{{q:QaQ}}{between}call:run_code{{code:QxQ}}")[2] == expected
    if between.strip() == ",":
        assert in_marks(f"[look(q='a'){between}run_code('x')]")[2] == expected


def test_a_call_that_lacks_its_string_end_ends_at_the_first_closing_mark():
    text = f"{OPEN}call:look{{q:Qa}}{CLOSE} I looked for Qa b{CLOSE}."
    assert read(text) == (marks(f" I looked for Qa b{CLOSE}."), None, [("look", {"q": "a"})])
    text = f"{OPEN}call:look{{q:QaQ{CLOSE}Said QyesQ}}{CLOSE}"
    assert read(text) == (marks(f"Said QyesQ}}{CLOSE}"), None, [("look", {"q": "a"})])


def test_where_no_tools_are_declared_any_name_is_read():
    assert [call.name for call in read_calls("call:anything{}")] == ["anything"]
    assert read_calls("call:f(x)") == read_calls("call:f x{}") == read_calls('call:"f"g{}') == []


# ---- without an opening mark ----------------------------------------------------------------------------------------

THOUGHT = "<|channel>thought\nLet's go."
CALL = "call:look{q:QaQ}"
LOOK = ("look", {"q": "a"})


@pytest.mark.parametrize(("text", "expected"), [
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE}", ("", "Let's go.", [LOOK])),
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE}\n", ("", "Let's go.", [LOOK])),
    (f"{THOUGHT}{OPEN}{CALL}", ("", "Let's go.", [LOOK])),
    (f"{THOUGHT} {OPEN}{CALL}{CLOSE}{OPEN}look('a'){CLOSE}", ("", "Let's go.", [LOOK, LOOK])),
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE}So{OPEN}{CALL}{CLOSE}", ("", f"Let's go.{OPEN}{CALL}{CLOSE}So", [LOOK])),
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE} or not", ("", f"Let's go.{OPEN}{CALL}{CLOSE} or not", [])),
    (f"{THOUGHT}{OPEN}call:nope{{}}{CLOSE}", ("", f"Let's go.{OPEN}call:nope{{}}{CLOSE}", [])),
    (f"{THOUGHT}{OPEN}call:look{{q:Qa", ("", f"Let's go.{OPEN}call:look{{q:Qa", [])),
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE}<channel|>ok", ("ok", f"Let's go.{OPEN}{CALL}{CLOSE}", [])),
    (f"{THOUGHT}{OPEN}{CALL}{CLOSE}<|channel>thought\nb<channel|>ok",
     ("ok", f"Let's go.{OPEN}{CALL}{CLOSE}\n\nb", [])),
    (f"<|channel>{OPEN}{CALL}{CLOSE}", ("", None, [LOOK])),
])
def test_a_call_in_a_thought_that_is_never_closed(text, expected):
    said, thought, calls = expected
    assert read(text) == (said, thought and marks(thought), calls)


@pytest.mark.parametrize("before", ["", f"{THOUGHT}<channel|>", f"Hm.{THOUGHT}<channel|>\n"])
@pytest.mark.parametrize(("source", "calls"), [
    (CALL, [LOOK]), (f"{CALL}{CLOSE}", [LOOK]), (f"\n{CALL} \n", [LOOK]),
    (f"{CALL}{CLOSE}\n{CALL}{CLOSE}", [LOOK] * 2), (f"{CALL}{CLOSE}{OPEN}{CALL}{CLOSE}", [LOOK] * 2),
    ("call:look(q='a')", [LOOK]), ("look(q='a')", [LOOK]), ("look('a')", [LOOK]),
    ("[look('a'), look('a')]", [LOOK] * 2),
    ("look{q:QaQ}", [LOOK]), ("print(look(q='a'))", [LOOK]), ('"look"{q:QaQ}', [LOOK]),
    ("my tool(a=1)", [("my tool", {"a": 1})]), ('{"name": "look", "arguments": {"q": "a"}}', [LOOK]),
    ("call:look{q:Qa<tool_call|>bQ}", [("look", {"q": "a<tool_call|>b"})]),
    ("call:x<y{}", [("x<y", {})]),
])
def test_calls_without_an_opening_mark_are_calls_if_nothing_else_is_said(before, source, calls):
    text = before + source
    assert read(text)[2] == calls
    assert read(text)[0] == ("Hm." if "Hm" in before else "")
    assert read(f"Look: {source}")[2] == ([LOOK] if OPEN in source else [])
    assert read(f"{before}{source} and so on")[2] == (calls if OPEN in source else [])
    assert read(text, tools=[])[2] == []  # no tools, no calls
    assert read(text, form=True)[2] == ([LOOK] if OPEN in source else [])


@pytest.mark.parametrize("text", [
    "look", "call:look", "Look at that", "look;", "look at (this)", "looking(1)", "call:", "call me", "call:nope{}",
    "look(here, there)", "look(at the sky", "call:look{q:Qa", '["look"]', "[look]", "[", '"look"', "print(1)",
    "my tool is (a) good", "call:look{q:QaQ}, as I said", "```tool_code\nx = look\n```", "```tool_code\nlook(x)\n``` b",
    "```tool_code", "```tool_code\n", "```python\nlook(q='a')\n```", "```\nlook(q='a')\n```",
])
def test_what_is_said_stays_said(text):
    assert read(text) == (marks(text), None, [])


@pytest.mark.parametrize(("text", "said", "calls"), [
    ("```tool_code\nlook(q='a')\n```", "", [LOOK]),
    ("```tool_code\nprint(look(q='a'))\nlook('a')\n```", "", [LOOK] * 2),
    ("Now:\n```tool_call\ncall:look{q:QaQ}\n```\nDone.", "Now:\n\nDone.", [LOOK]),
    ("```tool_code\nrun_code('''```\nx''')\n``` ok", " ok", [("run_code", {"code": "```\nx"})]),
    ("```tool_code\nlook(q='a')", "", [LOOK]),
    ("```tool_calls\n[look('a')]\n```", "", [LOOK]),
])
def test_fences_that_say_they_hold_calls(text, said, calls):
    assert read(text) == (said, None, calls)


def test_marks_typed_as_text_are_no_marks_in_a_call_without_its_opening_mark():
    ids = [*TOKENIZER.encode(f"call:look{{q:{Q}a "), *TOKENIZER.encode(f"{Q} {CLOSE} <", specials=False),
           *TOKENIZER.encode(f"{Q}}}{CLOSE}")]
    (call,) = read_answer(TOKENIZER, [], ids, TOOLS).tool_calls
    assert call == {"name": "look", "arguments": {"q": f"a {Q} {CLOSE} <"}}


# ---- what always holds ----------------------------------------------------------------------------------------------

WORDS = st.text("abcxyzä ß.,:;!?-_()[]{}=+*/#\n", max_size=12)
VALUES = st.recursive(st.one_of(WORDS, st.integers(-999, 999), st.booleans(), st.none()), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), inner, max_size=3)),
    max_leaves=5)
ARGUMENTS = st.fixed_dictionaries({}, optional={"code": VALUES, "lang": VALUES, "q": VALUES})


def notation(value, colon=":", string=lambda text: f"{Q}{text}{Q}"):
    if isinstance(value, str):
        return string(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}{colon}{notation(item, colon, string)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(notation(item, colon, string) for item in value) + "]"
    return json.dumps(value)


FORMS = {
    "gemma": lambda name, given: f"call:{name}{notation(given)}",
    "equals": lambda name, given: f"call:{name}{notation(given, '=')}",
    "json": lambda name, given: f"call:{name}{json.dumps(given)}",
    "doubled": lambda name, given: f"call:{name}{{{json.dumps(given)}}}" if given else f"call:{name}{{}}",
    "openai": lambda name, given: json.dumps({"name": name, "arguments": given}),
    "python": lambda name, given: f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})",
    "parens": lambda name, given: f"call:{name}({', '.join(f'{key}: {notation(v)}' for key, v in given.items())})",
    "dict": lambda name, given: f"call:{name}{given!r}",
    "list": lambda name, given: f"[{name}({', '.join(f'{key}={json.dumps(v)}' for key, v in given.items())})]"
    .replace("null", "None"),
    "comma": lambda name, given: f"call:{name}{notation(given)}".removesuffix("}") + ("," if given else "") + "}",
    "open": lambda name, given: f"call:{name}{notation(given)}".removesuffix("}"),
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["look", "run_code", "my tool", "ns:tool", "a[0]"]), ARGUMENTS)
def test_every_form_is_read_as_it_was_meant(form, name, arguments):
    ((found, given_back),) = in_marks_raw(FORMS[form](name, arguments))
    assert found == name
    assert json.dumps(given_back, sort_keys=True) == json.dumps(arguments, sort_keys=True)


def in_marks_raw(source):
    return [(call["name"], call["arguments"]) for call in read_answer(
        TOKENIZER, [], TOKENIZER.encode(f"{OPEN}{source}{CLOSE}"), TOOLS).tool_calls]


def letters(value):
    if isinstance(value, dict):
        return "".join(letters(key) + letters(item) for key, item in value.items())
    if isinstance(value, list):
        return "".join(map(letters, value))
    return "".join(filter(str.isalnum, value if isinstance(value, str) else json.dumps(value)))


SIGNS = ["", Q, '"', "'", "{", "}", "[", "]", "(", ")", ",", ":", "=", " ", "\n", "x"]


LETTERS = st.text("abcxyz .,:;!?-_()[]{}=+*/#\n", max_size=12)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted({*FORMS} - {"openai"})), st.sampled_from(["look", "run_code", "my tool"]),
       st.fixed_dictionaries({}, optional={"code": LETTERS, "lang": LETTERS, "q": st.lists(LETTERS, max_size=2)}),
       st.lists(st.tuples(st.integers(0, 99), st.sampled_from(SIGNS), st.integers(0, 2)), min_size=1, max_size=3),
       st.booleans())
def test_damage_makes_no_other_name_and_cuts_nothing(form, name, arguments, damages, closed):
    source = FORMS[form](name, arguments)
    for at, put, lost in damages:
        at %= len(source) + 1
        source = source[:at] + put + source[at + lost:]
    calls = read_calls(source, closed, TOOLS)
    assert {call.name for call in calls} <= {declared["function"]["name"] for declared in TOOLS}
    if calls:  # every letter is there that was written, beside the names of parameters that were given by place
        missing = sorted(letters(source.replace("\\n", "")))
        for letter in "".join(letters(call.name) + letters(call.arguments) for call in calls):
            if letter in missing:
                missing.remove(letter)
        assert "".join(missing) in ("", "acll")  # the word "call"


BITS = ["<|channel>", "<channel|>", "thought\n", OPEN, CLOSE, "call:", "look", "my", " tool", "(", ")", "{", "}", "[",
        "]", "q", "=", ":", "'a'", Q, "hi", CALL.replace("Q", Q), "look('a')", "```", "tool_code\n", "\n", " ", "<",
        "print(", '"', "stop", "default_api.", ";", ",", "日"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(BITS), max_size=14), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_cuts_do_not_show_and_nothing_is_lost(bits, inside, form, chance):
    ids = TOKENIZER.encode("".join(bits))
    prompt = TOKENIZER.encode("<|channel>") if inside else []
    whole = read_answer(TOKENIZER, prompt, ids, TOOLS, form=form)
    reader, pieces, rest = ReplyReader(TOKENIZER, prompt, TOOLS, form=form), [], ids
    while rest:
        size = chance.randint(1, 7)
        pieces += reader.feed(rest[:size])
        rest = rest[size:]
    pieces += reader.finish().rest
    told = {"Said": "", "Thought": ""}
    calls = []
    for piece in pieces:
        if type(piece).__name__ in told:
            told[type(piece).__name__] += piece.text
        else:
            calls.append({"name": piece.name, "arguments": piece.arguments})
    assert (told["Said"], told["Thought"] or None, calls) == (whole.text, whole.reasoning, whole.tool_calls)
    if not calls:  # each character is there once, but for marks that mean something and white space around thoughts
        spoken = "".join(bits).replace("<|channel>thought\n", "").replace("<|channel>", "").replace("<channel|>", "")
        if "thought" not in spoken:
            told_all = (whole.text + (whole.reasoning or "")).replace("<channel|>", "")
            assert sorted(letters(told_all)) == sorted(letters(spoken))


def test_a_thousand_random_answers_only_ever_call_declared_tools():
    chance = random.Random(12)
    names = {declared["function"]["name"] for declared in TOOLS}
    called = 0
    for _ in range(1000):
        text = "".join(chance.choices(BITS, k=chance.randint(2, 12)))
        calls = read_answer(TOKENIZER, [], TOKENIZER.encode(text), TOOLS).tool_calls
        called += len(calls)
        assert {call["name"] for call in calls} <= names
        json.dumps(calls, allow_nan=False)
    assert called > 10
