"""Requests to the tiny network, and what is compared of their answers."""

from support.reference import tiny_config

C = tiny_config().canvas_length
PROMPT = [5, 6, 7, 8, 9]


def tokens_of(generations):
    return [(generation.token_ids, generation.steps, generation.finish_reason) for generation in generations]


def mixed_requests(ask):
    """Requests that differ in prompt length, length limit, every sampler setting, stop tokens and pins."""
    return [
        ask(PROMPT, id=0, seed=10, max_tokens=C),
        ask([3], id=1, seed=11, max_tokens=2 * C + 3, max_denoising_steps=6, entropy_bound=0.05),
        ask(range(1, 30), id=2, seed=12, max_tokens=C + 1, t_min=0.2, t_max=3.0),
        ask(PROMPT, id=3, seed=13, max_tokens=3 * C, max_denoising_steps=2, stability_threshold=0),
        ask([9, 8], id=4, seed=14, max_tokens=2 * C, confidence_threshold=100.0, max_denoising_steps=6),
        ask(range(20, 40), id=5, seed=15, max_tokens=5, canvas=[1, 2, None, 4], pinned=[True, True, False, False]),
        ask([7] * 11, id=6, seed=16, max_tokens=4 * C, eos_token_id=tuple(range(10))),
    ]
