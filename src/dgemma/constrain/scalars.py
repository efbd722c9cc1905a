"""JSON values: types, equality as JSON Schema means it, how they are written; strings and numbers as languages.

Knows nothing of schemas, automata and tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from dgemma.constrain.ecma import Ranges, complement
from dgemma.constrain.language import (
    ANY_CHAR,
    EMPTY,
    Alt,
    Both,
    Chars,
    Literal,
    Net,
    Node,
    Repeat,
    literal,
    optional,
    parse_regex,
    seq,
)

KINDS = ("object", "array", "string", "number", "boolean", "null")
COMMA, COLON = ", ", ": "
# Longer numbers would not survive being read as 64-bit integers and doubles.
INTEGER_DIGITS, FRACTION_DIGITS = 18, 15
WHOLE_DIGITS = 15  # before a number's decimal point
_PRECISE = Context(prec=60)
INT32 = (-(2**31), 2**31 - 1)

DIGIT = Chars(((48, 57),))
_ESCAPED = {8: b"b", 9: b"t", 10: b"n", 12: b"f", 13: b"r", 34: b'"', 92: b"\\"}
_UNQUOTED = complement([(0, 31), (34, 34), (92, 92), (127, 127)])  # what stands in a JSON string as it is


def dumps(value: Any) -> str:
    """A value in the one way in which it is written here."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(COMMA, COLON))


def kind_of(value: Any) -> str:
    """The JSON type of a value, integers being numbers; TypeError for what is none."""
    if value is None:
        return "null"
    for kind, types in (("boolean", bool), ("number", (int, float)), ("string", str), ("array", list),
                        ("object", Mapping)):
        if isinstance(value, types):
            return kind
    raise TypeError(f"{value!r} is no JSON value")


def identity(value: Any) -> Any:
    """Something hashable that is equal for two values exactly when JSON says so: 1 is 1.0 and is not true."""
    kind = kind_of(value)
    if kind == "number":
        return kind, exact(value)
    if kind == "array":
        return kind, tuple(identity(item) for item in value)
    if kind == "object":
        return kind, frozenset((name, identity(item)) for name, item in value.items())
    return kind, value


def exact(value: float) -> Decimal:
    """A number as it is written, not as a double holds it."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def json_chars(ranges: Ranges) -> Node:
    """Characters as a JSON string spells them; of the control characters only those with a short escape."""
    plain = complement([*complement(ranges), *complement(_UNQUOTED)])
    letters = [letter[0] for code, letter in _ESCAPED.items() if any(low <= code <= high for low, high in ranges)]
    parts: list[Node] = [Chars(plain)] if plain else []
    if letters:
        parts.append(seq(Literal(b"\\"), Chars(tuple((letter, letter) for letter in sorted(letters)))))
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))


def text_chars(ranges: Ranges) -> Node:
    """The same characters as they are, where nothing is escaped."""
    letters = [(code, code) for code in _ESCAPED]
    return Chars(complement([*complement(ranges), *complement([*_UNQUOTED, *letters])]))


@dataclass(frozen=True)
class Notation:
    """How values are written. Numbers and words are as in JSON, without white space but that of the two separators."""

    comma: Literal
    colon: Literal
    quote: Literal
    chars: Callable[[Ranges], Node]  # one character of a string
    escape: Callable[[str], str]  # the text of a string
    bare: str | None = None  # the pattern of names that stand without quotes

    def string(self, text: Node) -> Node:
        """The string of a text."""
        return seq(self.quote, text, self.quote)

    def key(self, text: Node) -> Node:
        """The name of a property."""
        if self.bare is None:
            return self.string(text)
        return Alt((Both(text, self._names), self.string(Both(text, self._names, negated=True))))

    @functools.cached_property
    def _names(self) -> Node:
        """Those that stand without quotes."""
        assert self.bare is not None, "there are some"
        return parse_regex(self.bare, self.chars)

    def write(self, value: Any) -> bytes:
        """A value as it is written; raises DgemmaError for a lone surrogate."""
        if isinstance(value, str):
            return self.quote.data + literal(self.escape(value)).data + self.quote.data
        if isinstance(value, list):
            return b"[" + self.comma.data.join(map(self.write, value)) + b"]"
        if isinstance(value, Mapping):
            pairs = (self._name(name) + self.colon.data + self.write(item) for name, item in value.items())
            return b"{" + self.comma.data.join(pairs) + b"}"
        return dumps(value).encode()

    def _name(self, name: str) -> bytes:
        bare = self.bare is not None and re.fullmatch(self.bare, name)
        return literal(name).data if bare else self.write(name)


JSON = Notation(literal(COMMA), literal(COLON), Literal(b'"'), json_chars, lambda text: dumps(text)[1:-1])


def string(least: int = 0, most: int | None = None, patterns: Sequence[tuple[str, bool]] = (),
           forms: Sequence[str] = (), excluded: Sequence[str] = (), longest: int | None = None,
           wide: bool = False, notation: Notation = JSON) -> Node:
    """A string's text of ``least`` to ``most`` characters; each pattern, if it says so, matches somewhere, or nowhere.

    ``forms``: formats that it has; ``excluded``: what it is not; ``longest``: as in `parse_regex`; ``wide``: all that a
    pattern may, or may not, match, else only what it surely does.
    """
    if most is not None and most < least:
        return Alt(())
    chars = notation.chars
    parts = [parse_regex(pattern, chars, search=True, wide=wide, longest=longest)
             for pattern, matches in patterns if matches]
    parts += [parse_regex(FORMATS[form], chars) for form in forms if form in FORMATS]
    if least or most is not None or not parts:
        parts.append(Repeat(chars(ANY_CHAR), least, most))
    node = functools.reduce(Both, parts)
    for pattern, matches in patterns:
        if not matches:
            node = Both(node, parse_regex(pattern, chars, search=True, wide=not wide), negated=True)
    if excluded:
        node = Both(node, finite(literal(notation.escape(text)).data for text in excluded), negated=True)
    return node


def _bytes(data: list[int]) -> Node:
    """One of these bytes."""
    return Literal(bytes(data)) if len(data) == 1 else Alt(tuple(Literal(bytes([byte])) for byte in sorted(data)))


def finite(texts: Iterable[bytes]) -> Node:
    """One of these texts; those with a common beginning or end share it."""
    root: dict[int, Any] = {}
    for text in texts:
        node = root
        for byte in text:
            node = node.setdefault(byte, {})
        node[-1] = None
    if not root:
        return Alt(())
    numbers: dict[Any, int] = {}
    ways: list[tuple[int, Node, int]] = []

    def number(node: dict[int, Any]) -> int:
        """A state for each thing that may follow; the root comes last."""
        ahead: dict[int, list[int]] = {}
        for byte, following in node.items():
            if byte >= 0:
                ahead.setdefault(number(following), []).append(byte)
        key = (-1 in node, tuple(sorted((target, tuple(sorted(data))) for target, data in ahead.items())))
        if key not in numbers:
            numbers[key] = len(numbers) + 1
            for target, data in ahead.items():
                ways.append((numbers[key], _bytes(data), target))
        return numbers[key]

    first = number(root)
    ends = frozenset(state for (over, _), state in numbers.items() if over)
    return Net((*ways, (0, EMPTY, first)), ends)


_DAY = r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
_DATE = rf"[1-9]\d{{3}}-{_DAY}"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = rf"({_LABEL}\.)+[A-Za-z]{{2,18}}"
_URL_CHARS = r"[A-Za-z0-9_.~!$&'()*+,;=:@-]"
_HOURS = r"\d{1,4}(H(\d{1,4}M(\d{1,4}S)?)?|M(\d{1,4}S)?|S)"
_HEX = r"[0-9a-f]{1,4}"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Texts that have the format, not necessarily all of them: no 29 February, years of four digits.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "duration": rf"P(\d{{1,4}}D(T{_HOURS})?|T{_HOURS})",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": rf"({_HEX}:){{7}}{_HEX}",
    "uri": rf"https?://{_HOST}(:[1-9]\d{{0,3}})?(/{_URL_CHARS}*)*(\?{_URL_CHARS}*)?(#{_URL_CHARS}*)?",
}
_POINTER = r"(/[A-Za-z0-9_-]*)*"
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-%s[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_SCALAR = r'(true|false|null|-?(0|[1-9]\d{0,14})(\.\d{1,6})?|"[^"\\\x00-\x1f]*")'
_DEEPER = _SCALAR
for _ in range(2):
    _DEEPER = (rf'({_SCALAR}|\[({_DEEPER}(, {_DEEPER})*)?\]|'
               rf'\{{("[^"\\\x00-\x1f]*": {_DEEPER}(, "[^"\\\x00-\x1f]*": {_DEEPER})*)?\}})')
FORMATS |= {
    "iri": FORMATS["uri"], "uri-reference": FORMATS["uri"], "iri-reference": FORMATS["uri"],
    "uri-template": FORMATS["uri"], "url": FORMATS["uri"], "idn-email": FORMATS["email"],
    "idn-hostname": FORMATS["hostname"], "json-pointer": _POINTER,
    "relative-json-pointer": rf"(0|[1-9]\d{{0,3}})(#|{_POINTER})", "regex": r"[A-Za-z0-9 _^$.-]*",
    # Of other vocabularies: OpenAPI, pydantic, zod.
    "byte": r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "base64": r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?",
    "base64url": r"([A-Za-z0-9_-]{4})*([A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?",
    **{f"uuid{version}": _UUID % version for version in range(1, 9)},
    **dict.fromkeys(("ipvanyaddress", "ipvanyinterface"), FORMATS["ipv4"]),
    **dict.fromkeys(("ipvanynetwork", "ipv4network", "ipv4interface", "cidrv4"), rf"{_BYTE}(\.{_BYTE}){{3}}/32"),
    **dict.fromkeys(("ipv6network", "ipv6interface", "cidrv6"), rf"({_HEX}:){{7}}{_HEX}/128"),
    "e164": r"\+[1-9]\d{6,14}", "nanoid": r"[A-Za-z0-9_-]{21}", "ulid": r"[0-7][0-9A-HJKMNP-TV-Z]{25}",
    "color": r"#[0-9a-f]{6}",
    "json-string": _DEEPER}


def integer(low: int | None = None, high: int | None = None) -> Node:
    """The integers from low to high, in decimal, of at most 18 digits."""
    limit = 10**INTEGER_DIGITS - 1
    low, high = max(-limit, -limit if low is None else low), min(limit, limit if high is None else high)
    return Alt((*_whole(max(low, 0), high), *_signed(_whole(max(1, -high), -low))))


def number(low: Decimal | int | None = None, high: Decimal | int | None = None, above: bool = False,
           below: bool = False) -> Node:
    """Numbers from low to high (``above``, ``below``: not these themselves).

    Plain decimals of at most 15 digits on either side of the point; without any bound also with an exponent.
    """
    limit = 10**WHOLE_DIGITS
    if low is None and high is None:
        exponent = seq(Chars(((69, 69), (101, 101))), optional(Chars(((43, 43), (45, 45)))), Repeat(DIGIT, 1, 2))
        fraction = seq(literal("."), Repeat(DIGIT, 1, FRACTION_DIGITS))
        return seq(optional(literal("-")), Alt(_whole(0, limit - 1)), optional(fraction), optional(exponent))
    # Beside a bound that it must not reach, a number has no digits that a double would round away.
    places = min(FRACTION_DIGITS, *(WHOLE_DIGITS - len(str(abs(int(bound))))
                                    for bound, strict in ((low, above), (high, below)) if strict and bound is not None),
                 FRACTION_DIGITS)
    low, above = (-limit, True) if low is None or low < -limit else (low, above)
    high, below = (limit, True) if high is None or high > limit else (high, below)
    # A negative number's size lies between the bounds' sizes, the other way round.
    negative = _sizes(max(0, -high), below or high >= 0, -low, above, max(places, 0))
    return Alt((*_sizes(max(low, 0), above and low >= 0, high, below, max(places, 0)), *_signed(negative)))


def fraction(low: Decimal | None, high: Decimal | None, above: bool, below: bool) -> Node:
    """Numbers in a range that are no whole ones, with digits so few that a double keeps them."""
    return Both(number(low, high, above, below), parse_regex(r"-?\d{1,9}\.\d{0,5}[1-9]"))


_MOST_REST = 1000  # a divisor up to this is counted with states
_MOST_MULTIPLES, _MOST_ODD = 20_000, 1000  # of what is listed instead; of what shares few digits


def multiples(of: Sequence[float], not_of: Sequence[float], whole: bool, low: Decimal | None, high: Decimal | None,
              above: bool, below: bool) -> Node:
    """Numbers in a range that are multiples of all of these and of none of those.

    A fraction's multiples are those that doubles take for some, too: 19.99 is none of 0.01 to most validators.
    """
    floor_, ceiling = (None if bound is None else Fraction(bound) for bound in (low, high))
    units = [Fraction(exact(unit)) for unit in of] + ([Fraction(1)] if whole else [])
    others = [Fraction(exact(unit)) for unit in not_of]
    step = Fraction(lcm(*(unit.numerator for unit in units)), gcd(*(unit.denominator for unit in units))) if units \
        else min(others) / 2
    count = lcm(*(unit.numerator for unit in (*units, *others)))
    if all(unit.denominator == 1 for unit in (*units, *others)) and (units or count > 1) and count <= _MOST_REST:
        rests = [rest for rest in range(count) if all(rest % unit == 0 for unit in units)
                 and all(rest % unit for unit in others)]
        least = None if floor_ is None else -(-floor_ // 1) + (above and floor_.denominator == 1)
        most = None if ceiling is None else ceiling // 1 - (below and ceiling.denominator == 1)
        return Both(integer(least, most), _rest(count, frozenset(rests)))

    places = max(0, -int(_PRECISE.divide(Decimal(step.numerator), step.denominator).as_tuple().exponent))
    unit = int(step * 10**places)
    many = _MOST_MULTIPLES if unit < 1000 else _MOST_ODD
    first = -many // 2 if floor_ is None else -(-floor_ // step)
    if floor_ is None and ceiling is not None:
        first = min(first, ceiling // step - many // 2)
    last = first + many if ceiling is None else min(first + many, ceiling // step)
    first += above and floor_ == first * step
    last -= below and ceiling == last * step
    texts = []
    for index in range(first, last + 1):
        digits = f"{abs(index * unit):0{places + 1}d}"
        text = digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
        text = ("-" if index < 0 else "") + (text.rstrip("0").rstrip(".") if places else text)
        value = float(text)
        if len(digits) <= FRACTION_DIGITS and all((value / number_).is_integer() for number_ in of) and not any(
                (value / number_).is_integer() or (index * step / ratio).denominator == 1
                for number_, ratio in zip(not_of, others, strict=True)):
            texts.append(text.encode())
    return finite(texts)


def _rest(count: int, rests: frozenset[int]) -> Node:
    """Decimals whose rest after division by a number is one of these."""
    ways = [(1 + rest, Literal(b"%d" % digit), 1 + (10 * rest + digit) % count)
            for rest in range(count) for digit in range(10)]
    # Multiples lie on both sides of zero alike, so a sign changes nothing.
    return Net((*ways, (0, optional(literal("-")), 1)), frozenset(1 + rest for rest in rests))


def _sizes(low: Decimal | int, above: bool, high: Decimal | int, below: bool, places: int) -> tuple[Node, ...]:
    """Decimals from low to high, low being at least 0, with up to ``places`` digits behind the point."""
    if low > high or (low == high and (above or below)):
        return ()
    (least, least_rest), (most, most_rest) = _parts(low, places, up=True), _parts(high, places, up=False)
    any_rest = _behind_point(Repeat(DIGIT, 1, places)) if places else EMPTY
    from_low = Alt((seq(Alt(_whole(least + 1, 10**WHOLE_DIGITS)), any_rest),
                    seq(literal(str(least)), _rest_from(least_rest, above, places))))
    to_high = Alt((seq(Alt(_whole(0, most - 1)), any_rest),
                   seq(literal(str(most)), _rest_to(most_rest, below, places))))
    return (Both(from_low, to_high),)


def _parts(bound: Decimal | int, places: int, up: bool) -> tuple[int, str]:
    """A bound's whole number and the digits behind its point; more than ``places`` are rounded."""
    unit = Decimal(1).scaleb(-places)
    rounded = Decimal(bound).quantize(unit, ROUND_CEILING if up else ROUND_FLOOR, _PRECISE)
    whole, _, rest = f"{rounded:f}".partition(".")
    return int(whole), rest.rstrip("0")


def _behind_point(digits: Node) -> Node:
    return optional(seq(literal("."), digits))


def _rest_from(bound: str, above: bool, places: int) -> Node:
    """What may stand behind a whole number: a fraction of at least 0.``bound``, or (``above``) more."""
    if not bound and not above:
        return _behind_point(Repeat(DIGIT, 1, places)) if places else EMPTY
    parts = [seq(literal("." + bound[:place]), Chars(((ord(digit) + 1, 57),)), Repeat(DIGIT, 0, places - place - 1))
             for place, digit in enumerate(bound) if digit != "9"]
    if not above:
        parts.append(seq(literal("." + bound), Repeat(DIGIT, 0, places - len(bound))))
    elif places > len(bound):  # the bound itself only with something behind it
        parts.append(seq(literal("." + bound), Repeat(DIGIT, 0, places - len(bound) - 1), Chars(((49, 57),))))
    return Alt(tuple(parts))


def _rest_to(bound: str, below: bool, places: int) -> Node:
    """What may stand behind a whole number: a fraction of at most 0.``bound``, or (``below``) less."""
    if not bound:
        return Alt(()) if below else EMPTY
    parts = [EMPTY, *(literal("." + bound[:place]) for place in range(1, len(bound) + (not below)))]
    parts += [seq(literal("." + bound[:place]), Chars(((48, ord(digit) - 1),)), Repeat(DIGIT, 0, places - place - 1))
              for place, digit in enumerate(bound) if digit != "0"]
    return Alt(tuple(parts))


def _signed(parts: tuple[Node, ...]) -> tuple[Node, ...]:
    return (seq(literal("-"), Alt(parts)),) if parts else ()


def _whole(low: int, high: int) -> tuple[Node, ...]:
    """The numbers from low (at least 0) to high, without leading zeros; nothing if there are none."""
    parts: list[Node] = []
    start = low
    while start <= high:
        digits, full = len(str(start)), len(str(high + 1)) - 1  # all numbers of up to ``full`` digits are there
        if start == 10 ** (digits - 1) and full > digits:
            parts.append(seq(Chars(((49, 57),)), Repeat(DIGIT, digits - 1, full - 1)))
            start = 10**full
            continue
        end = min(high, 10 ** len(str(start)) - 1)
        parts.append(_same_length(str(start), str(end)))
        start = end + 1
    return tuple(parts)


def _same_length(low: str, high: str) -> Node:
    """The numbers between two of as many digits; leading zeros stay."""
    if not low:
        return EMPTY
    if low == "0" * len(low) and high == "9" * len(high):
        return Repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return seq(literal(low[0]), _same_length(low[1:], high[1:]))
    rest = len(low) - 1
    parts = [seq(literal(low[0]), _same_length(low[1:], "9" * rest)),
             seq(literal(high[0]), _same_length("0" * rest, high[1:]))]
    if ord(high[0]) - ord(low[0]) > 1:
        parts.append(seq(Chars(((ord(low[0]) + 1, ord(high[0]) - 1),)), Repeat(DIGIT, rest, rest)))
    return Alt(tuple(parts))
