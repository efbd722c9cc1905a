r"""Sets of characters, and those of Unicode's properties, which ECMA 262 names in regular expressions: `\p{…}`.

Knows nothing of patterns, languages, schemas.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterable

from dgemma.errors import DgemmaError

Ranges = tuple[tuple[int, int], ...]
LAST = sys.maxunicode
SURROGATES = (0xD800, 0xDFFF)  # no text holds these
_CATEGORIES = {
    "Letter": "L", "Cased_Letter": "LC", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt",
    "Modifier_Letter": "Lm", "Other_Letter": "Lo", "Mark": "M", "Combining_Mark": "M", "Nonspacing_Mark": "Mn",
    "Spacing_Mark": "Mc", "Enclosing_Mark": "Me", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd",
    "Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P", "Connector_Punctuation": "Pc",
    "Dash_Punctuation": "Pd", "Open_Punctuation": "Ps", "Close_Punctuation": "Pe", "Initial_Punctuation": "Pi",
    "Final_Punctuation": "Pf", "Other_Punctuation": "Po", "Symbol": "S", "Math_Symbol": "Sm", "Currency_Symbol": "Sc",
    "Modifier_Symbol": "Sk", "Other_Symbol": "So", "Separator": "Z", "Space_Separator": "Zs", "Line_Separator": "Zl",
    "Paragraph_Separator": "Zp", "Other": "C", "Control": "Cc", "cntrl": "Cc", "Format": "Cf", "Surrogate": "Cs",
    "Private_Use": "Co", "Unassigned": "Cn"}
_EMOJI: Ranges = (
    (0x231A, 0x231B), (0x23E9, 0x23EC), (0x2614, 0x2615), (0x2648, 0x2653), (0x26BD, 0x26BE), (0x2728, 0x2728),
    (0x274C, 0x274C), (0x2753, 0x2755), (0x2795, 0x2797), (0x2B50, 0x2B50), (0x1F300, 0x1F320), (0x1F330, 0x1F335),
    (0x1F337, 0x1F37C), (0x1F380, 0x1F393), (0x1F3A0, 0x1F3C4), (0x1F3E0, 0x1F3F0), (0x1F400, 0x1F43E),
    (0x1F440, 0x1F440), (0x1F442, 0x1F4FC), (0x1F500, 0x1F53D), (0x1F550, 0x1F567), (0x1F5FB, 0x1F64F),
    (0x1F680, 0x1F6C5), (0x1F910, 0x1F93A), (0x1F93C, 0x1F945), (0x1F947, 0x1F9AF), (0x1F9B4, 0x1F9FF))
_COMPONENT: Ranges = ((0x23, 0x23), (0x2A, 0x2A), (0x30, 0x39), (0x200D, 0x200D), (0x20E3, 0x20E3), (0xFE0F, 0xFE0F),
                      (0x1F1E6, 0x1F1FF), (0x1F3FB, 0x1F3FF), (0x1F9B0, 0x1F9B3), (0xE0020, 0xE007F))
_HEX: Ranges = ((48, 57), (65, 70), (97, 102))
_SYMBOLS: Ranges = ((0x23, 0x23), (0x2A, 0x2A), (0x30, 0x39), (0xA9, 0xA9), (0xAE, 0xAE), (0x200D, LAST))
# What Unicode's own tables hold and Python's do not: the characters surely in a property, those that may be.
_BINARY: dict[str, tuple[Ranges, Ranges]] = {
    "Any": (((0, LAST),), ((0, LAST),)), "ASCII": (((0, 127),), ((0, 127),)),
    "ASCII_Hex_Digit": (_HEX, _HEX), "AHex": (_HEX, _HEX),
    "White_Space": (((9, 13), (32, 32)), ((9, 13), (32, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680),
                                          (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F),
                                          (0x3000, 0x3000))),
    "Emoji": (_EMOJI, _SYMBOLS), "Emoji_Presentation": (_EMOJI, _SYMBOLS), "Extended_Pictographic": (_EMOJI, _SYMBOLS),
    "RGI_Emoji": (_EMOJI, _SYMBOLS), "Emoji_Component": (_COMPONENT, _COMPONENT),
    **{name: (ranges, ranges) for names, ranges in (
        (("Regional_Indicator", "RI"), ((0x1F1E6, 0x1F1FF),)), (("Emoji_Modifier", "EMod"), ((0x1F3FB, 0x1F3FF),)))
       for name in names}}
_BY_CATEGORY = {"Alphabetic": (("L", "Nl"), ("L", "Nl", "M", "So")), "Alpha": (("L", "Nl"), ("L", "Nl", "M", "So")),
                "Uppercase": (("Lu",), ("Lu", "Nl", "So")),
                "Lowercase": (("Ll",), ("Ll", "Lm", "Lo", "Nl", "So", "Mn")),
                "ID_Start": (("L", "Nl"), ("L", "Nl", "M", "S")), "XID_Start": (("L",), ("L", "Nl", "M", "S")),
                "ID_Continue": (("L", "Nl", "Mn", "Mc", "Nd", "Pc"), ("L", "N", "M", "P", "S")),
                "XID_Continue": (("L", "Mn", "Mc", "Nd", "Pc"), ("L", "N", "M", "P", "S"))}


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in any order, made ascending and apart."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Every character that is in none of the ranges."""
    gaps, start = [], 0
    for low, high in union([*ranges, SURROGATES]):
        if low > start:
            gaps.append((start, low - 1))
        start = high + 1
    return (*gaps, (start, LAST)) if start <= LAST else tuple(gaps)


def property_of(name: str, absent: bool, wide: bool) -> Ranges:
    """The characters that have a property, or that do not; ``wide``: all that may be meant, else those surely meant.

    Raises DgemmaError for one that is not known.
    """
    ranges = characters(name, wide != absent)
    return complement(ranges) if absent else ranges


@functools.lru_cache(maxsize=64)
def characters(name: str, wide: bool) -> Ranges:
    """The characters of a Unicode property: those surely in it, or (``wide``) all that may be."""
    key, _, value = name.partition("=")
    if value and key in ("General_Category", "gc"):
        name = value
    elif value and key in ("Script", "sc", "Script_Extensions", "scx"):
        if wide:
            raise DgemmaError(f"the regular expression uses \\P{{{name}}}: this is not supported")
        return _script(value)
    if name in _BINARY:
        return _BINARY[name][wide]
    table = _categories()
    groups = _BY_CATEGORY[name][wide] if name in _BY_CATEGORY else (_CATEGORIES.get(name, name),)
    if groups == ("LC",):
        groups = ("Lu", "Ll", "Lt")
    found = [ranges for group in groups for category, ranges in table.items() if category.startswith(group)]
    if not found:
        raise DgemmaError(f"the regular expression uses \\p{{{name}}}: no such property of characters is known")
    return tuple(sorted(pair for ranges in found for pair in ranges))


@functools.cache
def _categories() -> dict[str, list[tuple[int, int]]]:
    """Every general category's characters."""
    table: dict[str, list[tuple[int, int]]] = {}
    start, before = 0, unicodedata.category(chr(0))
    for code in range(1, LAST + 2):
        category = unicodedata.category(chr(code)) if code <= LAST else ""
        if category != before:
            table.setdefault(before, []).append((start, code - 1))
            start, before = code, category
    return table


def _script(name: str) -> Ranges:
    """The letters that a script's name begins the name of."""
    prefix = {"Han": "CJK UNIFIED IDEOGRAPH", "Hani": "CJK UNIFIED IDEOGRAPH", "Latn": "LATIN", "Grek": "GREEK",
              "Cyrl": "CYRILLIC"}.get(name, name.upper().replace("_", " "))
    letters = [code for low, high in characters("L", False) for code in range(low, high + 1)
               if unicodedata.name(chr(code), "").startswith((prefix + " ", prefix + "-"))]
    if not letters:
        raise DgemmaError(f"the regular expression uses \\p{{Script={name}}}: no such script is known")
    return tuple((code, code) for code in letters)
