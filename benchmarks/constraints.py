"""What a constraint costs: compiling it, and choosing a canvas at every denoising step.

    python benchmarks/constraints.py [--canvas 90 256] [--repeats 3]

On the bundled tokenizer (288 tokens, canvas 90) and on a synthetic vocabulary of 262144 (byte-level, random pieces of
2 to 16 bytes of letters, digits, punctuation and other scripts; canvas 256). "flat": a step whose distributions are
random, so that nearly everything is about as probable, which is the worst case; "sure": one whose distributions all but
name a valid text, as they do near the end of a canvas. "new" is the first choice after compiling, which also meets
states for the first time. Times are medians, on one thread.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse
import gc
import random
import statistics
import time

import torch
from machine import describe

from dgemma.chat.tokenizer import Tokenizer
from dgemma.constrain import constraint_of, made

ITEM = {"type": "object", "required": ["id", "label"],
        "properties": {"id": {"type": "integer", "minimum": 0}, "label": {"type": "string"},
                       "on": {"type": "boolean"}}}
SCHEMAS = {
    "flat schema": {"type": "object", "required": ["name", "age", "city"],
                    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                                   "city": {"type": "string"}, "kind": {"enum": ["human", "robot", "other"]},
                                   "score": {"type": "number"}}},
    "nested schema": {"type": "object", "required": ["title", "items", "when"],
                      "properties": {"title": {"type": "string", "maxLength": 40},
                                     "items": {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 8},
                                     "when": {"type": "string", "format": "date-time"},
                                     "owner": {"anyOf": [ITEM, {"type": "null"}]}}},
    "long strings": {"type": "object", "required": ["bio"],
                     "properties": {"bio": {"type": "string", "maxLength": 600}, "motto": {"type": "string"}}},
    "recursive": {"$ref": "#/$defs/node",
                  "$defs": {"node": {"type": "object", "required": ["value", "children"],
                                     "properties": {"value": {"type": "integer"},
                                                    "children": {"type": "array",
                                                                 "items": {"$ref": "#/$defs/node"}}}}}},
}
FORMATS = {
    "choice": {"type": "choice", "choice": ["positive", "negative", "neutral", "mixed"]},
    "regex": {"type": "regex", "regex": r"[A-Z][a-z]+ (\d{1,3}(,\d{3})*|none)( [a-z]+)*\."},
    **{name: {"type": "json_schema", "json_schema": {"schema": schema}} for name, schema in SCHEMAS.items()},
    "json_object": {"type": "json_object"},
}


def large_tokenizer(size: int = 262_144) -> Tokenizer:
    """A byte-level tokenizer of that size; it has no merges, so it encodes byte by byte."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from dgemma.train.data.tokenizer import SPECIAL_IDS, byte_symbols, vocabulary

    rng, symbols = random.Random(0), byte_symbols()
    known = vocabulary()
    alphabets = [("abcdefghijklmnopqrstuvwxyz", 8), ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1), ("0123456789", 1),
                 ('"{}[]:,. \n_-()\\/', 1),
                 ("абвгдежзиклмнопрстуфхцчшщыэюя", 3), ("的一是了我不人在他有这中大来上国", 3)]
    while len(known) < size:
        letters = rng.choices([text for text, _ in alphabets], [weight for _, weight in alphabets])[0]
        length = min(16, max(2, int(rng.gauss(6, 3))))
        piece = ("".join(rng.choices(letters, k=length)) if len(letters) < 60 else "")
        piece = (" " if rng.random() < 0.4 else "") + piece[: max(1, length // len(letters[0].encode()))]
        if rng.random() < 0.05:
            piece += rng.choice(['"', '",', '":', "}", ": ", '"}'])
        known.setdefault("".join(symbols[byte] for byte in piece.encode()), len(known))
    backend = Backend(models.BPE(vocab=known, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_IDS))
    return Tokenizer(backend, source="the synthetic vocabulary")


def walk(log_probs: torch.Tensor):
    for start in range(0, len(log_probs), 32):
        yield slice(start, min(start + 32, len(log_probs))), log_probs[start : start + 32]


def measure(form: dict, tokenizer: Tokenizer, canvas: int, repeats: int) -> tuple:
    made.clear()
    gc.collect()
    began = time.perf_counter()
    constraint = constraint_of(form, tokenizer, (1, 106))
    compiled = time.perf_counter() - began
    assert constraint is not None
    graph, generator = constraint._graph, torch.Generator().manual_seed(0)
    guide, room = constraint.guide(4 * canvas), 4 * canvas
    flat = torch.randn(canvas, tokenizer.vocab_size, generator=generator).mul_(2).log_softmax(-1)

    def choose(log_probs: torch.Tensor) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        chosen = guide.choose(walk(log_probs), canvas, room, torch.rand(canvas, generator=generator))
        return time.perf_counter() - began, chosen.draft

    new, draft = choose(flat)
    flat_times = [choose(flat)[0] for _ in range(repeats)]
    sure = flat.clone()
    sure[torch.arange(canvas), draft] += 20
    sure = sure.log_softmax(-1)
    sure_times = [choose(sure)[0] for _ in range(repeats + 1)][1:]
    reader = type(graph.reader).__name__.removesuffix("Reader").lower()
    return (reader, graph.size, len(graph.classes.starts), compiled, new, statistics.median(flat_times),
            statistics.median(sure_times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvas", type=int, nargs=2, default=(90, 256), help="of the small and the large vocabulary")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe())
    from dgemma.weights.hub.locate import locate

    for tokenizer, canvas in zip((Tokenizer.from_folder(locate("sudoku")), large_tokenizer()), options.canvas,
                                 strict=True):
        from dgemma.constrain.vocabulary import Vocabulary

        began = time.perf_counter()
        Vocabulary.of(tokenizer)
        print(f"\n{tokenizer.vocab_size} tokens, canvas {canvas}; the tokens' bytes, once per tokenizer: "
              f"{time.perf_counter() - began:.2f} s")
        print(f"{'':14} {'by':>6} {'states':>7} {'classes':>8} {'compile':>9} {'new':>9} {'flat':>9} {'sure':>9}")
        for name in options.only:
            reader, states, classes, *seconds = measure(FORMATS[name], tokenizer, canvas, options.repeats)
            print(f"{name:14} {reader:>6} {states:>7} {classes:>8} "
                  + " ".join(f"{1000 * value:6.1f} ms" for value in seconds), flush=True)


if __name__ == "__main__":
    main()
