"""What a half-denoised canvas looks like: token ids and entropies to characters, each with how sure it is.

Works on: drafts, and the bytes of their tokens. Knows nothing of: terminals, widths, colours.

A position that is close to noise is a row of dots in the shape of its token; then its token, faint; then solid.
Nothing that could steer a terminal gets through: what comes out is printable, or a line break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len

from dgemma.chat.thoughts import CLOSE, HEADER, OPEN
from dgemma.cli.terminal.console import harmless, printable
from dgemma.diffusion.events import Denoised
from dgemma.tokenizer_files import STOPS

PieceOf = Callable[[int], tuple[bytes, bool]]
Glyph = tuple[str, str]  # one character, and its look

# Looks, from the least to the most certain. A character made of several tokens looks like the least certain one.
LOOKS = ("noise", "vague", "leaning", "marker", "fixed", "new", "pinned", "thought", "settled")
_RANK = {look: rank for rank, look in enumerate(LOOKS)}
_FIRM = _RANK["leaning"]  # from here on a token may shape the layout: break lines, end the text

SETTLED, LEANING, VAGUE = 0.1, 0.7, 2.0  # nats, at most; above VAGUE the best token has perhaps 1 chance in 8
DOT, RETURN = "·", "↵"
TAB = "    "
_LONGEST_SHAPE = 8  # dots


@dataclass(frozen=True)
class Place:
    """Where in the answer the next canvas goes on."""

    thinking: bool = False
    header: str = ""  # what is still to come of the thought's header
    begun: bool = False  # this section (thought or answer) has said something
    line_start: bool = True
    bytes: bytes = b""  # the beginning of a character


@dataclass(frozen=True)
class Spelling:
    """A canvas as characters."""

    glyphs: list[Glyph]
    after: Place
    ended: bool  # at a stop token; what follows it is left out
    length: int  # positions before that, and before the padding that stands there


def looks_of(event: Denoised, pinned: Sequence[bool], before: Denoised | None) -> list[str]:
    """How sure each position is; `before` is the last step that was shown, None for a new canvas."""
    looks = []
    for i, entropy in enumerate(event.entropies):
        accepted = event.accepted[i]
        was_accepted = before is not None and before.accepted[i]
        if pinned[i]:
            look = "pinned"
        elif accepted and not was_accepted:
            look = "new"
        elif was_accepted and before and before.token_ids[i] != event.token_ids[i] and entropy <= LEANING:
            look = "fixed"
        elif accepted or entropy <= SETTLED:
            look = "settled"
        else:
            look = "leaning" if entropy <= LEANING else "vague" if entropy <= VAGUE else "noise"
        looks.append(look)
    return looks


def spell(tokens: Iterable[tuple[int, str]], place: Place, piece_of: PieceOf, committed: bool = False) -> Spelling:
    """The characters of a canvas, from its tokens and their looks.

    Committed tokens are text, all of them; in a draft, what follows a stop token that is no longer vague is not.
    """
    speller = _Speller(place, piece_of, committed)
    length = 0
    for position, (token_id, look) in enumerate(tokens, start=1):
        if speller.token(token_id, look):
            return Spelling(speller.glyphs, speller.place, True, length)
        if piece_of(token_id) != (b"<pad>", True):
            length = position
    speller.flush(last=True)
    return Spelling(speller.glyphs, speller.place, False, length)


class _Speller:
    """The state of `spell`."""

    def __init__(self, place: Place, piece_of: PieceOf, committed: bool) -> None:
        self.glyphs: list[Glyph] = []
        self.place = replace(place, bytes=b"")
        self._piece_of = piece_of
        self._committed = committed
        # Bytes that wait to be decoded together, each with its look and the token it is from.
        self._bytes: list[tuple[int, str, int]] = [(byte, "settled", -1) for byte in place.bytes]
        self._count = 0

    def token(self, token_id: int, look: str) -> bool:
        """Add a token; True if it ends the text."""
        data, special = self._piece_of(token_id)
        self._count += 1
        if look != "noise" and not special:
            self._bytes += [(byte, look, self._count) for byte in data]
            return False
        self.flush()
        if look == "noise":
            self._shape("" if special else data.decode(errors="replace"))
        else:
            return self._special(data.decode(errors="replace"), look)
        return False

    def flush(self, last: bool = False) -> None:
        """Decode the bytes so far; at the `last` of a committed canvas half a character waits for the next."""
        raw = bytes(byte for byte, _, _ in self._bytes)
        dotted: set[int] = set()
        start = 0
        while start < len(raw):
            try:
                text, bad = raw[start:].decode(), 0
            except UnicodeDecodeError as error:
                text, bad = raw[start : start + error.start].decode(), error.end - error.start
                if error.reason == "unexpected end of data" and last and self._committed:
                    self.place = replace(self.place, bytes=raw[start + error.start :])
                    bad = -1
            for char in text:
                size = len(char.encode())
                self._char(char, min((look for _, look, _ in self._bytes[start : start + size]), key=_RANK.__getitem__))
                start += size
            if bad < 0:
                break
            if bad and self._committed:
                self._put("�", "settled")
            elif bad:
                for token in sorted({token for _, _, token in self._bytes[start : start + bad]} - dotted):
                    self._put(DOT, "noise")  # one for each token
                    dotted.add(token)
            start += bad
        self._bytes.clear()

    def _special(self, name: str, look: str) -> bool:
        firm = _RANK[look] >= _FIRM
        if firm and name in STOPS and not self._committed:
            return True
        if firm and name == OPEN:
            if self.place.begun:
                self._new_paragraph()
            self.place = replace(self.place, thinking=True, header=HEADER, begun=False)
        elif firm and name == CLOSE:
            if self.place.thinking and self.place.begun:
                self._new_paragraph()
            self.place = replace(self.place, thinking=False, header="", begun=False)
        elif firm and name == '<|"|>':  # a quotation mark in a tool call
            self._put('"', "marker")
        elif firm and name not in STOPS and name != "<pad>":
            for char in printable(name):
                self._put(char, "marker")
        else:
            self._put(DOT, "noise")
        return False

    def _new_paragraph(self) -> None:
        if not self.place.line_start:
            self._put("\n", "settled")
        self._put("\n", "settled")

    def _shape(self, text: str) -> None:
        body = text.lstrip(" ")
        if body and body != text and self.place.begun:
            self._put(" ", "noise")
        for _ in range(min(max(cell_len(body) if body.isprintable() else 1, 1), _LONGEST_SHAPE)):
            self._put(DOT, "noise")

    def _char(self, char: str, look: str) -> None:
        header = self.place.header
        if header:
            if char == header[0]:
                self.place = replace(self.place, header=header[1:])
                return
            self.place = replace(self.place, header="")
            for missed in HEADER[: -len(header)]:
                self._char(missed, look)
        if self.place.thinking and look == "settled":
            look = "thought"
        if char in "\n\u2028\u2029":
            if _RANK[look] < _FIRM:
                self._put(RETURN, look)
            elif self.place.begun:  # line breaks before anything is said would only waste the screen
                if look in ("new", "fixed"):
                    self._put(RETURN, look)
                self._put("\n", look)
        elif char == "\t":
            for space in TAB:
                self._put(space, look)
        elif char < " " and _RANK[look] < _RANK["fixed"]:
            self._put(DOT, look)
        else:
            for shown in harmless(char):
                self._put(shown, look)

    def _put(self, char: str, look: str) -> None:
        self.glyphs.append((char, look))
        line_start, begun = char == "\n", self.place.begun or char != "\n"
        if (line_start, begun) != (self.place.line_start, self.place.begun):
            self.place = replace(self.place, line_start=line_start, begun=begun)
