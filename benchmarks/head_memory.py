"""The head's working memory at full size: vocabulary 262144, hidden 2816, canvas 256, bf16.

    python benchmarks/head_memory.py [--canvases 1]

Argmax, sample, entropy and soft embedding in one walk over the vocabulary, against the logits that are never made.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse

import torch
from machine import describe, median_seconds, peak_bytes, reset_peak, resident_bytes

from dgemma.nn.head import canvas_stats, vocab_tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvases", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe())
    vocab, hidden, canvas, batch = 262_144, 2816, 256, arguments.canvases
    table = torch.empty(vocab, hidden, dtype=torch.bfloat16).normal_(std=0.02)
    states = torch.randn(batch, canvas, hidden).bfloat16()
    temperature, noise = torch.full((batch,), 0.8), torch.rand(batch, canvas, vocab_tiles(vocab), 2)

    def step() -> None:
        canvas_stats(states, table, temperature, noise, 30.0, hidden**0.5)

    step()  # libraries allocate their own buffers once
    before = resident_bytes()
    reset_peak()
    step()
    extra = peak_bytes() - before
    seconds = median_seconds(step, repeats=3)
    print(f"{batch} x {canvas} positions: {extra / 1e6:.0f} MB extra, {seconds:.2f} s; "
          f"one float32 [canvas, vocab] tensor would be {batch * canvas * vocab * 4 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
