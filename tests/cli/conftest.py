"""A made-up denoising of a given text, for the terminal's tests: no model, but every kind of event.

And for the commands' tests a real model, tiny and random, and the command line run in this process.
"""

import math
import random
import re

import pytest
from rich.cells import cell_len

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Finished, Generation

SPECIALS = ["<pad>", "<eos>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
WORDS = "the of and to a in is that for it with as on be this by are from or an at was not"


class Fake:
    """A vocabulary of the given text's words (or bytes), and events that lead from noise to that text."""

    def __init__(self, text: str, words: bool = True, canvas: int = 256, steps: int = 16, seed: int = 0):
        self.random = random.Random(seed)
        self.canvas, self.steps = canvas, steps
        self.pieces: dict[int, tuple[bytes, bool]] = {i: (s.encode(), True) for i, s in enumerate(SPECIALS)}
        self.ids = {data: i for i, (data, _) in self.pieces.items()}
        special = "|".join(map(re.escape, SPECIALS))
        self.tokens: list[int] = []
        for part in re.findall(rf"{special}|\n+| ?[^\W\d]+| ?[^\w\n]|\d| +", text):
            if part in SPECIALS:
                self.tokens.append(SPECIALS.index(part))
            elif words and len(part.encode()) == len(part):
                self.tokens.append(self._id(part.encode()))
            else:
                self.tokens += [self._id(bytes([byte])) for byte in part.encode()]
        for word in WORDS.split() if words else []:
            self._id(f" {word}".encode())
        for byte in range(256) if not words else ():
            self._id(bytes([byte]))
        self.text = text

    def _id(self, data: bytes) -> int:
        if data not in self.ids:
            self.ids[data] = len(self.ids)
            self.pieces[self.ids[data]] = (data, False)
        return self.ids[data]

    def piece_of(self, token_id: int) -> tuple[bytes, bool]:
        return self.pieces[token_id]

    def noise(self) -> int:
        return self.random.randrange(len(SPECIALS), len(self.pieces))

    def events(self, step_seconds: float = 0.05, pinned=(), finish: bool = True):
        seconds, counts = 0.2, []
        for canvas, start in enumerate(range(0, len(self.tokens), self.canvas)):
            target = self.tokens[start : start + self.canvas]
            length = len(target)
            target = target + [2] * (length < self.canvas)
            target += [1] * (self.canvas - len(target))
            pins = [i in pinned for i in range(self.canvas)]
            noise = [t if pin else self.noise() for t, pin in zip(target, pins, strict=True)]
            yield CanvasStarted(0, canvas, noise, pins, 20 + start, 48)
            hard = [self.random.uniform(0.2, 1) if i < length else 0.3 for i in range(self.canvas)]
            draft: list[int] = []
            for step in range(1, self.steps + 1):
                seconds += step_seconds
                at = (step - 1) / max(self.steps - 1, 1)
                entropies = [5.0 / (1 + math.exp(18 * (at - 0.75 * h))) * self.random.uniform(0.7, 1.0) for h in hard]
                if step == self.steps:
                    entropies = [min(h, 0.003) for h in entropies]
                before = draft
                draft = [
                    t if pin or h < 0.05 or self.random.random() < math.exp(-h) else self.noise()
                    for t, h, pin in zip(target, entropies, pins, strict=True)
                ]
                total, accepted = 0.0, [False] * self.canvas
                for i in sorted(range(self.canvas), key=entropies.__getitem__):
                    accepted[i] = total <= 0.1
                    total += entropies[i]
                canvas_ids = [t if ok else self.noise() for t, ok in zip(draft, accepted, strict=True)]
                changed = [not before or t != before[i] for i, t in enumerate(draft)]
                yield Denoised(
                    0, canvas, step, draft, canvas_ids, entropies, accepted, changed, 0.8 - 0.4 * at, seconds
                )
            counts.append(self.steps)
            yield CanvasCommitted(0, canvas, target[:length], self.steps, seconds)
        if finish:
            total = len(self.tokens)
            yield Finished(
                0,
                Generation(
                    text=self.text,
                    reasoning=None,
                    tool_calls=[],
                    token_ids=self.tokens,
                    finish_reason="stop",
                    steps=counts,
                    tokens_per_forward=total / sum(counts),
                    prompt_tokens=20,
                    seconds=seconds,
                    stop_token_id=2,
                ),
            )


@pytest.fixture
def fake():
    return Fake


class Screen:
    """As much of a terminal as the live canvas uses: a screen, and the lines that scrolled off it."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]  # history and screen
        self.soft: set[int] = set()  # rows that went on in the next one by themselves
        self.x = self.y = 0
        self.autowrap = self.cursor = True

    @property
    def top(self) -> int:
        return max(0, len(self.rows) - self.height)

    def feed(self, data: str) -> None:
        for code, char in re.findall(r"(\x1b\[[^A-Za-z]*[A-Za-z])|([\s\S])", data):
            if code:
                self._control(code[2:-1], code[-1])
            elif char == "\r":
                self.x = 0
            elif char == "\n":
                self.x, self.y = 0, self.y + 1
                if self.y == len(self.rows):
                    self.rows.append([])
            else:
                self._put(char)

    def _put(self, char: str) -> None:
        width = cell_len(char)
        row = self.rows[self.y]
        if not width:
            while row[self.x - 1 :] and not row[self.x - 1]:
                self.x -= 1
            row[self.x - 1] += char
            self.x += cell_len(row[self.x - 1]) > 1
            return
        if self.x + width > self.width:
            assert self.autowrap, "a line of the live area is too long"
            self.soft.add(self.y)
            self.feed("\n")
            row = self.rows[self.y]
        row += [" "] * (self.x + width - len(row))
        row[self.x : self.x + width] = [char] + [""] * (width - 1)
        self.x += width

    def _control(self, argument: str, command: str) -> None:
        if command == "A":
            self.y = max(self.y - int(argument or 1), self.top)
        elif command == "B":
            self.y += int(argument or 1)
            assert self.y < len(self.rows)
        elif command == "K":
            self.rows[self.y] = self.rows[self.y][: 0 if argument == "2" else self.x]
        elif argument == "?7":
            self.autowrap = command == "h"
        elif argument == "?25":
            self.cursor = command == "h"
        else:
            assert command == "m" or argument == "?2026", (argument, command)

    def lines(self) -> list[str]:
        return ["".join(row) for row in self.rows]

    def copied(self) -> str:
        """The text as selecting it all would give it."""
        ends = ["" if i in self.soft else "\n" for i in range(len(self.rows))]
        return "".join(line + end for line, end in zip(self.lines(), ends, strict=True))


@pytest.fixture
def screen():
    return Screen


CHECKPOINT = {
    "model_type": "diffusion_gemma", "canvas_length": 16,
    "text_config": {
        "vocab_size": 288, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16,
        "num_global_key_value_heads": 1, "sliding_window": 32, "num_experts": 2, "top_k_experts": 1,
        "moe_intermediate_size": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny random model of bytes, canvas of 16; not to be written to."""
    from dgemma.config import model_config_from_dict
    from dgemma.train.data import tokenizer
    from dgemma.weights.save import save_checkpoint
    from support.reference import random_network

    folder = tmp_path_factory.mktemp("tiny")
    network = random_network(model_config_from_dict(CHECKPOINT))
    save_checkpoint(network, folder, CHECKPOINT, {"eos_token_id": [1, 106], "max_new_tokens": 40,
                                                  "max_denoising_steps": 4})
    tokenizer.save(folder)
    return folder


@pytest.fixture
def machine_memory(monkeypatch):
    """A function that lets the commands find so much memory, available and in all."""
    def have(available, total):
        for module in ("dgemma.cli.commands.models", "dgemma.cli.doctor", "dgemma.memory"):
            monkeypatch.setattr(f"{module}.machine_memory", lambda: (available, total))

    return have
