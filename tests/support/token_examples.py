"""An example of nothing but numbers, for tests of what works on token ids."""

from dataclasses import dataclass

import torch


@dataclass
class Example:
    context_ids: list[int]
    canvas_ids: list[int]
    weights: list[float]
    prompt_length: int
    real_length: int
    sights: tuple = ()


def random_example(context: int, canvas: int, vocab: int, real: int, prompt: int, fill_weight: float,
                   seed: int = 0) -> Example:
    """A context of so many random tokens, of which ``prompt`` are the prompt, and a canvas of which ``real`` count in
    full."""
    generator = torch.Generator().manual_seed(100 * context + seed)
    return Example(torch.randint(vocab, (context,), generator=generator).tolist(),
                   torch.randint(vocab, (canvas,), generator=generator).tolist(),
                   [1.0] * real + [fill_weight] * (canvas - real), prompt, real)
