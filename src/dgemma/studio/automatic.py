"""What an answer is made with where nobody said it: thinking and length, from what is asked.

Works on: the words of a question. Knows nothing of: models, pages. The picture budget is chosen where pictures are made
ready (`dgemma.chat.media.budget_for`).

The rules, in this order, each looking at the last question alone:

1. Thinking is on where one of the words of `_HARD` is in it, or it is longer than `LONG` characters.
2. "in one sentence", "briefly", "yes or no" … bound the answer to `SHORT` tokens; "300 words" to twice so many, and a
   thought, which comes before the answer, has `THOUGHT` tokens more.
"""

from __future__ import annotations

import re
from typing import Any

LONG = 1500  # characters
SHORT, THOUGHT = 256, 4096  # tokens: a canvas, sixteen
_PER_WORD = 2  # tokens; English has 1.3, other languages more
_HARD = re.compile(
    r"\b(prove|proof|derive|why (?:does|do|is|are)|step by step|reason(?:ing)?|think|calculat\w+|comput\w+|solve"
    r"|how many|optimi[sz]e|debug|bug|algorithm|complexity|compare|trade-?offs?|plan|puzzle|riddle"
    r"|beweise?|berechne|löse|warum|vergleiche?|schritt für schritt)\b", re.IGNORECASE)
_SHORT = re.compile(
    r"\b(briefly|in short|one[- ]word|(?:in )?(?:one|a single|two) (?:word|sentence|line)s?|yes or no|just the answer"
    r"|kurz|in einem (?:wort|satz)|ja oder nein)\b", re.IGNORECASE)
_WORDS = re.compile(r"\b(\d{1,5})[ -](?:words?|wörter[n]?)\b", re.IGNORECASE)


def chosen_for(question: str) -> dict[str, Any]:
    """Options for an answer to a question: those that the rules have something to say of."""
    made: dict[str, Any] = {}
    if len(question) > LONG or _HARD.search(question):
        made["thinking"] = True
    extra = THOUGHT if made.get("thinking") else 0
    if found := _WORDS.search(question):
        made["max_tokens"] = max(SHORT, int(found[1]) * _PER_WORD) + extra
    elif _SHORT.search(question):
        made["max_tokens"] = SHORT + extra
    return made
