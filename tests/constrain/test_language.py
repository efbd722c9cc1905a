"""Regular expressions and byte automata, held against Python's own `re` and UTF-8."""

import random
import re

import pytest

from dgemma.constrain.automaton import compile_language, utf8_sequences
from dgemma.constrain.language import ANY_CHAR, Both, Chars, Repeat, complement, literal, parse_regex, seq, union
from dgemma.errors import DgemmaError

ALPHABET = "abcxyz019 é日\n.@_-"


def accepts(automaton, text):
    state = 0
    for byte in text if isinstance(text, bytes) else text.encode():
        state = automaton.next_byte(state, byte)
        if state < 0:
            return False
    return bool(automaton.accepts[state])


def texts(seed, count=400, longest=7):
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("pattern", [
    "", "a*b|c{2,4}", r"[^\d\s]+x?", "(ab|a)*?c", "é+|[à-ÿ日]{3}", "(a|b)*a(a|b){3}", "(a*)*b", "(a*b*)*c?", r"\d{2,}",
    ".*", "[^a]", "(?:x|)y{0,2}", r"\w+(-\w+)*", r"[\w-]+@", "a{0}b", r"(?P<n>x)|\.", "[a-c]{1,3}z?",
])
def test_a_regular_expression_means_what_it_means_to_python(pattern):
    whole, part = compile_language(parse_regex(pattern)), compile_language(parse_regex(pattern, search=True))
    near = [match[0] for text in texts(1) for match in re.finditer(pattern, text, re.ASCII)]
    for text in [*texts(2), *near]:
        ascii_meaning = re.fullmatch(pattern, text, re.ASCII) is not None
        assert accepts(whole, text) <= (re.fullmatch(pattern, text) is not None)
        if text.isascii():
            assert accepts(whole, text) == ascii_meaning
            assert accepts(part, text) == (re.search(pattern, text, re.ASCII) is not None)


@pytest.mark.parametrize("pattern", ["^a|b$", "^(a|b)c", "(^a|b)$", "a$|^b", "^$", "^a?$", "(a|^b)c*"])
def test_anchors_bind_a_search(pattern):
    automaton = compile_language(parse_regex(pattern, search=True))
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choice("abc") for _ in range(rng.randint(0, 5)))
        assert accepts(automaton, text) == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize("pattern", [
    "(?=a)b", "(?=a)ab", "(?!ab)[ab]+c?", "^(?=.*[0-9])(?=.*[a-c]).{2,4}$", "a(?!b)", "(?<=a)b", "(?<!a)b", r"\bab",
    r"b\b", r"\Ba", "a^b", "(?:^|a)b", "a(?=$|b)", "(?!a|b)", "(?=(?!a)b)b", "(?!(?=a)a)[ab]", "(a(?=b)|b)*",
    r"(?i)aB", "(?i:a)b", "(?i)[^a]b", "(?m)^b$", "(?s)a.b", "(?P<name>a)b",
])
def test_what_looks_around_means_what_it_means_to_python(pattern):
    whole, part = compile_language(parse_regex(pattern)), compile_language(parse_regex(pattern, search=True))
    wide = compile_language(parse_regex(pattern, search=True, wide=True))
    rng = random.Random(7)
    for _ in range(500):
        text = "".join(rng.choice("aabbABc1 ") for _ in range(rng.randint(0, 6)))
        assert accepts(whole, text) == (re.fullmatch(pattern, text) is not None), text
        assert accepts(part, text) == accepts(wide, text) == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize(("pattern", "found", "not_found"), [
    (r"^\p{L}+$", ["aé日"], ["1", "", "a1"]), (r"^\p{Lu}\p{Ll}$", ["Éa"], ["éa", "AA"]), 
    (r"^\P{L}$", ["1"], ["a", "日"]), (r"^[\p{L}\p{N}_-]+$", ["a_é9-"], [" ", "a b"]), (r"^\p{Letter}$", ["日"], ["1"]),
    (r"^\p{Script=Greek}$", ["α"], ["a"]), (r"^\p{gc=Nd}$", ["5"], ["a"]), (r"^\p{ASCII}$", ["a"], ["é"]),
    (r"^(?<year>\d{4})-(?<m>\d\d)$", ["2024-01"], ["24-1"]), (r"^\u{1F600}$", ["😀"], ["u"]),
    (r"^\cA$", ["\x01"], ["c"]),
    (r"^[^]$", ["\n", "a"], [""]), (r"^[\w-.]$", ["-", "."], ["+"]), (r"^\/$", ["/"], ["a"]),
])
def test_what_only_javascript_writes_is_read(pattern, found, not_found):
    automaton = compile_language(parse_regex(pattern, search=True))
    assert [accepts(automaton, text) for text in (*found, *not_found)] == [True] * len(found) + [False] * len(not_found)


def test_a_wide_reading_holds_all_that_a_narrow_one_does():
    for pattern in (r"^\d+$", r"\s", r"^\W$", "a$", "(?i)^k$", r"\bé", "."):
        narrow, wide = (compile_language(parse_regex(pattern, search=True, wide=wide)) for wide in (False, True))
        for text in ("1", "٣", " ", "\u00a0", "é", "K", "\u212a", "a", "a\n", "\r", "\u2028", "aé"):
            matched = re.search(pattern, text) is not None or re.search(pattern, text, re.ASCII) is not None
            assert accepts(narrow, text) <= matched <= accepts(wide, text), (pattern, text)


@pytest.mark.parametrize(("pattern", "named"), [
    (r"(a)\1", "back reference"), (r"(?P<n>a)(?P=n)", "back reference"), ("(", "unterminated"), ("[a", "unterminated"),
    ("a*+", "possessive"), ("(?>a)b", "atomic"), (r"(?=a(?<=b))", "inside look-around"), (r"(?<=\bx)", "look-around"),
    (r"\p{Nonsense}", "Nonsense"), (r"\P{Script=Greek}", "Script=Greek"), (r"\u{110000}", "0x110000"), 
    ("(?<n", "no end"),
])
def test_what_no_automaton_knows_is_refused_by_name(pattern, named):
    with pytest.raises(DgemmaError, match=named):
        parse_regex(pattern)


@pytest.mark.parametrize("edge", [0, 0x7F, 0x7FF, 0xD7FF, 0xE000, 0xFFFF, 0x10FFFF])
def test_a_range_of_characters_is_exactly_its_utf8(edge):
    low, high = max(0, edge - 70), min(0x10FFFF, edge + 70)
    automaton = compile_language(Chars(union(part for part in complement(complement([(low, high)])))))
    for code in {0, 0x41, *range(max(0, low - 5), min(0x110000, high + 6))}:
        if not 0xD800 <= code <= 0xDFFF:
            assert accepts(automaton, chr(code)) == (low <= code <= high), hex(code)


def test_no_byte_string_is_accepted_that_is_not_utf8():
    automaton = compile_language(Repeat(Chars(ANY_CHAR), 0, None))
    rng = random.Random(0)
    for _ in range(2000):
        data = bytes(rng.choice([0x41, 0x80, 0xBF, 0xC1, 0xC3, 0xE0, 0xED, 0xA0, 0xF0, 0xF4, 0x90, 0xF5])
                     for _ in range(rng.randint(1, 4)))
        try:
            data.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        assert accepts(automaton, data) == valid, data
    assert all(len(sequence) <= 4 for sequence in utf8_sequences(ANY_CHAR))


def test_the_automaton_is_minimal():
    # The n-th letter from the end is an a: no automaton has fewer than 2^n states.
    assert len(compile_language(parse_regex("(a|b)*a(a|b){5}")).table) == 64
    assert len(compile_language(parse_regex("(abc|abd|xbc|xbd)")).table) == 4
    assert len(compile_language(Repeat(parse_regex("[ab]"), 0, 500)).table) == 501


def test_an_intersection_and_a_difference():
    words = parse_regex("[ab]{1,4}")
    both = compile_language(seq(literal("<"), Both(words, parse_regex(".*b.*")), literal(">")))
    without = compile_language(Both(words, parse_regex(".*b.*"), negated=True))
    for text in ["", "a", "ab", "aaa", "abab", "aaaaa", "bbbbb", "c"]:
        is_word, has_b = re.fullmatch("[ab]{1,4}", text) is not None, "b" in text
        assert accepts(both, f"<{text}>") == (is_word and has_b)
        assert accepts(without, text) == (is_word and not has_b)


def test_a_language_that_explodes_is_an_error_and_not_a_wait():
    with pytest.raises(DgemmaError, match="states"):
        compile_language(parse_regex("(a|b)*a(a|b){20}"))
    with pytest.raises(DgemmaError, match="too large"):
        compile_language(parse_regex("((a{100}){100}){100}"))
    with pytest.raises(DgemmaError, match="too large"):
        compile_language(parse_regex("(a?){9000}"))
    assert accepts(compile_language(parse_regex("(){0,4000000000}(){4000000000}")), "")


@pytest.mark.parametrize("pattern", [
    "[]a]", "[^]]?", "[a-]", "[-a]", r"[\]a]+", "a{,2}", "a{}b", "a{b}", "a{2", "{", r"\x61\u0062", r"\101\0?", r"[\b]",
    r"\N{DIGIT ONE}", "(?#aside)ab", "(?x) a b # so", "(?x:a b) c", "(?i:a(?-i:b))c", "(?:)a", "(a|)+?", "a??b",
    "[&&a]",
])
def test_the_odd_corners_of_pythons_syntax_are_read_as_python_reads_them(pattern):
    automaton = compile_language(parse_regex(pattern))
    wanted = re.compile("[\\s\\S]\\]?" if pattern == "[^]]?" else pattern)  # to ECMA [^] is any character
    rng = random.Random(11)
    for _ in range(400):
        text = "".join(rng.choice("aabbAB]-{},21\0\b &c") for _ in range(rng.randint(0, 4)))
        assert accepts(automaton, text) == (wanted.fullmatch(text) is not None), text


@pytest.mark.parametrize(("pattern", "named"), [
    ("*a", "nothing to repeat"), ("^*", "nothing to repeat"), ("a**", "multiple repeat"), ("a{2,1}", "min repeat"),
    ("a)", "unbalanced"), (r"a\q", "bad escape"), ("a\\", "end of pattern"), ("[z-a]", "bad character range"),
    (r"[a-\d]", "bad character range"), ("a(?i)", "global flags"), ("(?ii-i:a)", "flags"), ("(?P<1>a)", "group name"),
    (r"\2", "group reference"), ("(?#a", "no end"), (r"\N{NOBODY}", "NOBODY"), ("(?Q)", "flags"),
    ("(?+a)", "extension"),
    ("(" * 5000 + ")" * 5000, "too deeply"), (r"\x6", "bad escape"), (r"(?(1)a|b)", "back reference"),
])
def test_what_is_not_well_formed_is_refused(pattern, named):
    with pytest.raises(DgemmaError, match=named):
        parse_regex(pattern)
