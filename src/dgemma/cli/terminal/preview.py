"""What training will see, for a person to check: every token, whether it has loss, and how much it counts.

Works on: examples and a tokenizer. Knows nothing of: files, networks, the command line. On a terminal the context is
dim, loss is green and fill yellow; the words beside them say the same without colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data.examples import Example

if TYPE_CHECKING:
    from rich.text import Text

CONTEXT_SHOWN = 600  # tokens; of a longer context the middle is left out
CONTEXT, LOSS, FILL, SPECIAL, BORDER = "dim", "green", "yellow", "bold", "cyan"


def preview(examples: Sequence[Example], tokenizer: Tokenizer, count: int = 3) -> Iterator[Text]:
    """The first ``count`` turns among the examples, each with all its canvases."""
    for number, (_, canvases) in enumerate(groupby(examples, key=lambda example: id(example.turn))):
        if number == count:
            return
        yield _turn(list(canvases), tokenizer)


def summary(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """What there is in numbers: lines of a name and a value."""
    turns = list({id(example.turn): example.turn for example in examples}.values())
    real = sum(example.real_length for example in examples)
    fill = sum(len(example.canvas_ids) - example.real_length for example in examples)
    read = sum(example.context_length for example in examples)
    weights = sum(sum(example.weights) for example in examples)
    with_loss = sum(weight > 0 for example in examples for weight in example.weights)
    longest = max(examples, key=lambda example: example.context_length)
    size, all_tokens = len(examples[0].canvas_ids), read + real + fill
    canvases = [-(-len(turn.response_ids) // size) for turn in turns]
    of_response = f"; {real / weights:.1%} of their weight is response" if weights else ""
    lines = [
        ("turns", f"{len(turns):,} of {len({turn.row for turn in turns}):,} conversations"),
        ("canvases", f"{len(examples):,} of {size} tokens; {sum(canvases) / len(canvases):.1f} a turn, "
                     f"{max(canvases)} at most"),
        ("tokens", f"{all_tokens:,}: {read:,} context, {real:,} response, {fill:,} fill"),
        ("with loss", f"{with_loss:,} ({with_loss / all_tokens:.1%}){of_response}"),
        ("longest response", f"{max(len(turn.response_ids) for turn in turns):,} tokens"),
        ("longest context", f"{longest.context_length:,} tokens ({longest.turn.where})"),
    ]
    shortened = sum(turn.dropped > 0 for turn in turns)
    return lines + ([("shortened contexts", f"{shortened:,}")] if shortened else [])


def _turn(canvases: list[Example], tokenizer: Tokenizer) -> Text:
    from rich.text import Text

    turn = canvases[0].turn
    text = Text()
    thinking = ", thinking on" if turn.thinking else ""
    dropped = f", {turn.dropped} earlier messages left out" if turn.dropped else ""
    text.append(f"── {turn.where} ──\n", BORDER)
    text.append(f"context: {len(turn.context_ids):,} tokens, no loss{thinking}{dropped}\n", BORDER)
    for sight in turn.sights:
        width, height = sight.size
        text.append(f"picture at {sight.start:,}: {sight.medium.label}, seen as {width} × {height} pixels in "
                    f"{sight.tokens:,} soft tokens\n", BORDER)
    start = 0
    for sight in (*turn.sights, None):  # soft tokens are as many lines of one token
        stop = len(turn.context_ids) if sight is None else sight.start
        _write(text, turn.context_ids[start:stop], tokenizer, CONTEXT, CONTEXT_SHOWN)
        if sight is not None:
            text.append(f"[{sight.tokens:,} soft tokens]\n", BORDER)
            start = sight.stop
    for example in canvases:
        real, size = example.real_length, len(example.canvas_ids)
        text.append(f"canvas {example.canvas_index + 1} of {len(canvases)}: {real} of {size} tokens are the response\n",
                    BORDER)
        at = 0
        for (weight, filling), run in groupby(enumerate(example.weights), key=lambda item: (item[1], item[0] >= real)):
            length = len(list(run))
            tokens, at = example.canvas_ids[at : at + length], at + length
            if filling:
                name = tokenizer.id_to_token(tokens[0]) or str(tokens[0])
                text.append(f"[fill, weight {weight:g}: {length} × {name}]\n", FILL if weight else CONTEXT)
            else:
                text.append(f"[loss, weight {weight:g}] " if weight else "[no loss] ", BORDER)
                _write(text, tokens, tokenizer, LOSS if weight else CONTEXT)
    return text


def _write(text: Text, token_ids: Sequence[int], tokenizer: Tokenizer, style: str, shown: int | None = None) -> None:
    """Tokens as they are spelt, line breaks visible; of more than ``shown`` the middle is left out."""
    cut = len(token_ids) - shown if shown is not None and len(token_ids) > shown else 0
    head = len(token_ids) if not cut else (shown or 0) // 2
    for piece, special in _pieces(token_ids[:head], tokenizer):
        text.append(piece, f"{style} {SPECIAL}" if special else style)
    if cut:
        text.append(f"\n[… {cut:,} tokens …]\n", BORDER)
        for piece, special in _pieces(token_ids[head + cut :], tokenizer):
            text.append(piece, f"{style} {SPECIAL}" if special else style)
    if not text.plain.endswith("\n"):
        text.append("\n")


def _pieces(token_ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Stretches of ordinary text, and special tokens by name. Text that only spells a special token has a backslash
    before it, since the model reads it as letters."""
    for special, run in groupby(token_ids, key=tokenizer.is_special):
        if special:
            yield from ((tokenizer.id_to_token(token) or str(token), True) for token in run)
            continue
        # By bytes, since decoding a part may drop its first space; a canvas may end within a character.
        text = b"".join(map(tokenizer.token_bytes, run)).decode("utf-8", "replace")
        yield "".join(_visible(char) for char in _escaped(text, tokenizer)), False


def _escaped(text: str, tokenizer: Tokenizer) -> str:
    if "<" not in text:
        return text
    ids = tokenizer.encode(text)
    names = {tokenizer.id_to_token(token) for token in ids if tokenizer.is_special(token)}
    for name in names:
        text = text.replace(name or "", f"\\{name}")
    return text


def _visible(char: str) -> str:
    """A line break with its mark; nothing that could steer a terminal."""
    if char == "\n":
        return "↵\n"
    return char if char.isprintable() or char == "\t" else repr(char)[1:-1]
