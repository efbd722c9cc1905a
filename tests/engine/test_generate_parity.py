"""Whole answers against transformers' `generate`, fed with the noise that our engine drew.

Our engine runs first; the canvases it opened, the tokens it sampled and the tokens it renoised with are recorded. The
reference then runs with `torch.randint` and `torch.multinomial` replaced by a replay of that record, so that every
step of its own (acceptance, renoising, stopping, commits) must lead to the same tokens.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from dgemma.config import GenerationConfig
from dgemma.diffusion.events import CanvasStarted, Denoised, Finished, Generation
from dgemma.diffusion.request import Request
from dgemma.diffusion.sequence import SequenceState
from dgemma.engine import Engine
from support.reference import SHAPES, network_like, reference_model

PAD = 0


@dataclass
class Record:
    """One request's noise, by canvas and step, and what came of it."""

    starts: list[list[int]] = field(default_factory=list)  # [canvas][C]
    samples: list[list[list[int]]] = field(default_factory=list)  # [canvas][step][C]
    fresh: list[list[list[int]]] = field(default_factory=list)
    accepted: list[list[list[bool]]] = field(default_factory=list)
    generation: Generation | None = None


@pytest.fixture
def ours(monkeypatch):
    return partial(run_ours, monkeypatch)


@pytest.fixture
def theirs(monkeypatch):
    return partial(run_theirs, monkeypatch)


def run_ours(monkeypatch, network, requests) -> list[Record]:
    """Run all requests in one batch and record their noise."""
    records = {request.id: Record() for request in requests}
    drawn, sampled = [], []
    draw_noise, head = SequenceState.draw_noise, network.head

    def spy_noise(row):
        uniform, fresh = draw_noise(row)
        drawn.append((row.request.id, fresh.tolist()))
        return uniform, fresh

    def spy_head(*arguments):
        stats = head(*arguments)
        sampled.extend(stats.sample.tolist())
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(SequenceState, "draw_noise", spy_noise)
        patch.setattr(network, "head", spy_head)
        for event in Engine(network).run(requests):
            record = records[event.request]
            if isinstance(event, CanvasStarted):
                record.starts.append(event.token_ids)
                for steps in (record.samples, record.fresh, record.accepted):
                    steps.append([])
            elif isinstance(event, Denoised):
                request, fresh = drawn.pop(0)
                assert request == event.request
                record.fresh[event.canvas].append(fresh)
                record.samples[event.canvas].append(sampled.pop(0))
                record.accepted[event.canvas].append(event.accepted)
            elif isinstance(event, Finished):
                record.generation = event.generation
    return [records[request.id] for request in requests]


class Replay:
    """Stands in for torch.randint and torch.multinomial in the reference's loop.

    A canvas is a randint, then multinomial and randint for every step: two randints in a row open the next canvas.
    A row that has finished already gets filler: nothing it makes counts any more.
    """

    def __init__(self, records: list[Record], canvas_length: int):
        self.records, self.length = records, canvas_length
        self.canvas, self.step, self.opening = -1, -1, True

    def _rows(self, pick) -> torch.Tensor:
        rows = []
        for record in self.records:
            try:
                rows.append(pick(record))
            except IndexError:
                assert len(self.records) > 1, "the reference takes a step that ours did not"
                rows.append([PAD] * self.length)
        return torch.tensor(rows)

    def randint(self, *_, **options):
        assert options["size"] == (len(self.records), self.length)
        if self.opening:
            self.canvas, self.step, self.opening = self.canvas + 1, -1, True
            tokens = self._rows(lambda record: record.starts[self.canvas])
        else:
            tokens = self._rows(lambda record: record.fresh[self.canvas][self.step])
        self.opening = True
        return tokens

    def multinomial(self, probabilities, num_samples):
        assert num_samples == 1
        self.step, self.opening = self.step + 1, False
        tokens = self._rows(lambda record: record.samples[self.canvas][self.step])
        return tokens.view(-1, 1)


def run_theirs(monkeypatch, reference, prompts, records, settings):
    """The reference's `generate` on the recorded noise."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    values = {name: getattr(settings, name) for name in ("max_denoising_steps", "t_min", "t_max",
                                                         "stability_threshold", "confidence_threshold")}
    config = DiffusionGemmaGenerationConfig(
        sampler_config=EntropyBoundSamplerConfig(settings.entropy_bound), max_new_tokens=settings.max_tokens,
        eos_token_id=list(settings.eos_token_id) or None, pad_token_id=PAD, **values)
    replay = Replay(records, reference.config.canvas_length)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", replay.randint)
        patch.setattr(torch, "multinomial", replay.multinomial)
        return reference.generate(torch.tensor(prompts), generation_config=config)


def assert_same_answer(generation, tokens, settings):
    """The reference writes whole canvases and pads behind the stop token; ours ends before it, or at the limit."""
    tokens = tokens.tolist()
    limit = len(generation.token_ids)
    assert generation.token_ids == tokens[:limit]
    if generation.finish_reason == "stop":
        assert tokens[limit] == generation.stop_token_id
        assert set(tokens[limit + 1 :]) <= {PAD}
    else:
        assert limit == settings.max_tokens
        assert not set(generation.token_ids) & set(settings.eos_token_id)


# How much a layer changes is chosen so that canvases settle, but not at once.
NETWORKS = {"alternating": 0.28, "five-to-one": 0.22, "last-layer-forced-full": 0.6}


@pytest.fixture(scope="module", params=NETWORKS, ids=str)
def pair(request):
    # Peaked as a trained network is; with weak self-conditioning, since random ones otherwise amplify rounding errors.
    reference = reference_model(SHAPES[request.param], seed=5, peak=8.0, feedback=0.15, change=NETWORKS[request.param])
    return reference, network_like(reference)


def prompt_of(length: int, seed: int, vocab: int = 160) -> list[int]:
    return torch.randint(2, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SETTINGS = {
    "never-settled": GenerationConfig(max_denoising_steps=6, confidence_threshold=1e-9, eos_token_id=()),
    "accepting-more": GenerationConfig(max_denoising_steps=6, entropy_bound=2.0, confidence_threshold=1e-9,
                                       eos_token_id=()),
    "settled": GenerationConfig(max_denoising_steps=20, confidence_threshold=0.5, eos_token_id=()),
    "three-agree": GenerationConfig(max_denoising_steps=20, confidence_threshold=0.5, stability_threshold=3,
                                    eos_token_id=()),
    "none-need-agree": GenerationConfig(max_denoising_steps=9, confidence_threshold=0.1, stability_threshold=0,
                                        t_min=0.05, t_max=1.5, eos_token_id=()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_of_several_canvases_are_the_reference_s(pair, name, ours, theirs):
    reference, network = pair
    canvas = network.config.canvas_length
    settings = SETTINGS[name].replace(max_tokens=3 * canvas - list(SETTINGS).index(name))
    prompt = prompt_of(network.config.sliding_window + 4, seed=len(name))
    (record,) = ours(network, [Request(0, prompt, settings, seed=11)])
    found = theirs(reference, [prompt], [record], settings)
    tokens = found.sequences[0, len(prompt) :]
    assert len(tokens) == 3 * canvas
    assert_same_answer(record.generation, tokens, settings)
    # Both took the same number of steps.
    forwards = sum(record.generation.steps)
    assert found.tokens_per_forward.item() == pytest.approx((tokens != PAD).sum().item() / forwards)
    # The comparison means something: many tokens, partly accepted canvases, and adaptive stops where there should be.
    assert len(set(record.generation.token_ids)) > canvas
    assert 0 < min(sum(mask) for steps in record.accepted for mask in steps) < canvas
    steps = record.generation.steps
    if name in ("never-settled", "accepting-more"):
        assert steps == [6, 6, 6]
    else:
        assert settings.stability_threshold < min(steps) < settings.max_denoising_steps


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_an_answer_with_a_stop_token_is_the_reference_s(pair, turn, ours, theirs):
    """The stop token is one that the free answer has in canvas `turn` and not before."""
    reference, network = pair
    canvas, settings = network.config.canvas_length, SETTINGS["settled"]
    prompt = prompt_of(9, seed=3)
    settings = settings.replace(max_tokens=4 * canvas)
    (free,) = ours(network, [Request(0, prompt, settings, seed=2)])
    tokens = free.generation.token_ids
    place = next(i for i in range(turn * canvas + canvas // 3, (turn + 1) * canvas) if tokens[i] not in tokens[:i])
    settings = settings.replace(eos_token_id=(159 if tokens[place] != 159 else 158, tokens[place]))
    (record,) = ours(network, [Request(0, prompt, settings, seed=2)])
    found = theirs(reference, [prompt], [record], settings)
    assert record.generation.finish_reason == "stop"
    assert found.sequences.shape == (1, len(prompt) + (len(record.generation.token_ids) // canvas + 1) * canvas)
    assert_same_answer(record.generation, found.sequences[0, len(prompt) :], settings)


def test_a_batch_is_the_reference_s(pair, ours, theirs):
    """Rows that settle and stop at different times: frozen in the reference, gone on or left in ours."""
    reference, network = pair
    canvas = network.config.canvas_length
    settings = SETTINGS["settled"].replace(max_tokens=3 * canvas)
    prompts = [prompt_of(13, seed=seed) for seed in (21, 22, 23)]
    free = ours(network, [Request(i, p, settings, seed=i) for i, p in enumerate(prompts)])
    stop = free[0].generation.token_ids[canvas + 1]  # ends the first row in its second canvas, at the latest
    settings = settings.replace(eos_token_id=(stop,))
    records = ours(network, [Request(i, p, settings, seed=i) for i, p in enumerate(prompts)])
    found = theirs(reference, prompts, records, settings)
    assert len({tuple(record.generation.steps) for record in records}) > 1
    for record, row in zip(records, found.sequences, strict=True):
        assert_same_answer(record.generation, row[13:], settings)
