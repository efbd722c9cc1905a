"""The head's single walk over the vocabulary against the plain computation on whole rows of logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgemma.nn.head import canvas_stats, vocab_tiles

CAP = 30.0
SCALE = 5.0


@pytest.fixture(params=[13, 16, 1000], ids=["ragged-tiles", "whole-tiles", "one-tile"])
def tile(request):
    """How many tokens of the vocabulary are looked at together."""
    return request.param


def inputs(tile, batch=3, canvas=7, width=12, vocab=48, size=1.0, seed=0):
    """hidden [B, C, D], embedding [V, D], noise for tiles of this width; logits have deviation ``size``·√D."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, canvas, width, generator=generator)
    embedding = size * torch.randn(vocab, width, generator=generator)
    noise = torch.rand(batch, canvas, vocab_tiles(vocab, tile), 2, generator=generator)
    return hidden, embedding, noise


def stats_of(tile, hidden, embedding, temperature, noise, sharpness=None):
    sharpness = None if sharpness is None else torch.tensor(sharpness)
    return canvas_stats(hidden, embedding, torch.tensor(temperature), noise, CAP, SCALE, sharpness, tile=tile)


def plain(hidden, embedding, temperature):
    """Processed logits [B, C, V], their softmax and their entropy, all at once and in float64."""
    logits = (hidden @ embedding.T).double()
    processed = CAP * torch.tanh(logits / CAP) / torch.tensor(temperature).double().view(-1, 1, 1)
    p = processed.softmax(-1)
    return processed, p, -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("size", [0.05, 1.0, 10.0], ids=["flat", "moderate", "saturated"])
@pytest.mark.parametrize("temperature", [[0.8, 0.8, 0.8], [0.4, 1.0, 2.5]], ids=["one", "per-row"])
def test_the_plain_computation(tile, size, temperature):
    hidden, embedding, noise = inputs(tile, size=size)
    stats = stats_of(tile, hidden, embedding, temperature, noise)
    processed, p, entropy = plain(hidden, embedding, temperature)
    # Two capped logits may be equal but for rounding: the choice must be a maximum, not one particular maximum.
    chosen = processed.gather(-1, stats.argmax.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, processed.amax(-1), atol=1e-4, rtol=0)
    if size < 10:
        assert torch.equal(stats.argmax, processed.argmax(-1))
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.soft.double() / (SCALE * size), p @ embedding.double() / size, atol=1e-5, rtol=0)
    assert ((stats.sample >= 0) & (stats.sample < embedding.shape[0])).all()


def test_the_first_of_equal_tokens_is_the_argmax(tile):
    """The lowest id wins, as torch.argmax has it, in one tile and over several; whole numbers make exact ties."""
    hidden, embedding, noise = inputs(tile)
    hidden, embedding = hidden.round(), embedding.round()
    embedding[24:] = embedding[:24].clone()
    stats = stats_of(tile, hidden, embedding, [0.5] * 3, noise)
    assert torch.equal(stats.argmax, (hidden @ embedding.T).argmax(-1))
    assert (stats.argmax < 24).all()


@pytest.mark.parametrize("level", [-30.0, 30.0])
def test_extreme_rows_stay_exact(tile, level):
    """All logits near the cap's end at a low temperature: the largest exponent is ±300."""
    _, embedding, noise = inputs(tile)
    embedding = torch.nn.functional.pad(0.01 * embedding, (1, 0), value=1.0)
    hidden = torch.nn.functional.pad(inputs(tile, seed=1)[0], (1, 0), value=level * 3)
    stats = stats_of(tile, hidden, embedding, [0.1] * 3, noise)
    _, p, entropy = plain(hidden, embedding, [0.1] * 3)
    assert stats.entropy.isfinite().all()
    assert stats.soft.isfinite().all()
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=1e-3, rtol=0)  # float32 near 300
    torch.testing.assert_close(stats.soft.double(), SCALE * (p @ embedding.double()), atol=1e-3, rtol=0)


def test_a_certain_row_has_no_entropy_and_draws_its_token(tile):
    _, _, noise = inputs(tile)
    embedding = torch.eye(48)
    wanted = torch.arange(21).view(3, 7) * 2
    stats = stats_of(tile, 100.0 * embedding[wanted], embedding, [0.1] * 3, noise)
    assert torch.equal(stats.argmax, wanted)
    assert torch.equal(stats.sample, wanted)
    assert (stats.entropy == 0).all()
    torch.testing.assert_close(stats.soft, SCALE * embedding[wanted])


def test_noise_at_its_ends_draws_a_token(tile):
    """Uniform numbers of exactly 0 and the largest below 1 are valid draws of a probable token."""
    hidden, embedding, noise = inputs(tile, size=0.3)
    _, p, _ = plain(hidden, embedding, [1.0] * 3)
    for end in (0.0, 1.0 - 2**-24):
        sample = stats_of(tile, hidden, embedding, [1.0] * 3, torch.full_like(noise, end)).sample
        assert (p.gather(-1, sample.unsqueeze(-1)) > 0).all()


@pytest.mark.parametrize(("temperature", "sharpness"), [(0.5, None), (1.5, None), (0.5, 0.4), (1.5, 2.5)])
def test_samples_follow_the_softmax(tile, temperature, sharpness):
    """Chi-square over many draws of one row; the threshold is five deviations above what chance gives."""
    draws, vocab = 40_000, 48
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 1, 12, generator=generator)
    embedding = 0.4 * torch.randn(vocab, 12, generator=generator)
    noise = torch.rand(1, draws, vocab_tiles(vocab, tile), 2, generator=generator)
    sample = stats_of(tile, hidden.expand(1, draws, 12), embedding, [temperature], noise,
                      sharpness and [sharpness]).sample
    expected = plain(hidden, embedding, [temperature / (sharpness or 1)])[1].flatten() * draws
    counts = torch.bincount(sample.flatten(), minlength=vocab).double()
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) < 20]  # counted together: too few of each for the statistic
    common = order[len(rare) :]
    expected = torch.cat([expected[common], expected[rare].sum(0, keepdim=True)])
    counts = torch.cat([counts[common], counts[rare].sum(0, keepdim=True)])
    freedom = len(common)
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_positions_are_sampled_independently(tile):
    """Two positions with the same softmax agree as often as two independent draws do."""
    draws, vocab = 20_000, 48
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 1, 12, generator=generator)
    embedding = 0.3 * torch.randn(vocab, 12, generator=generator)
    noise = torch.rand(draws, 2, vocab_tiles(vocab, tile), 2, generator=generator)
    sample = stats_of(tile, hidden.expand(draws, 2, 12), embedding, [1.0] * draws, noise).sample
    together = (sample[:, 0] == sample[:, 1]).double().mean()
    chance = plain(hidden, embedding, [1.0])[1].square().sum()
    assert (together - chance).abs() < 5 * (chance * (1 - chance) / draws) ** 0.5


def test_sharpness_is_for_the_draw_alone_and_each_row_s_own(tile):
    hidden, embedding, noise = inputs(tile)
    usual, sharp = (stats_of(tile, hidden, embedding, [0.8] * 3, noise, power) for power in (None, [1.0, 0.3, 1e4]))
    for name in ("argmax", "entropy", "soft"):
        torch.testing.assert_close(getattr(sharp, name), getattr(usual, name))
    assert torch.equal(sharp.sample[0], usual.sample[0])
    assert not torch.equal(sharp.sample[1], usual.sample[1])
    assert torch.equal(sharp.sample[2], usual.argmax[2])


def test_rows_have_their_own_temperature(tile):
    hidden, embedding, noise = inputs(tile)
    together = stats_of(tile, hidden, embedding, [0.4, 1.0, 2.5], noise)
    for row, temperature in enumerate([0.4, 1.0, 2.5]):
        alone = stats_of(tile, hidden[row : row + 1], embedding, [temperature], noise[row : row + 1])
        assert torch.equal(alone.argmax[0], together.argmax[row])
        assert torch.equal(alone.sample[0], together.sample[row])
        torch.testing.assert_close(alone.entropy[0], together.entropy[row], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alone.soft[0], together.soft[row], atol=1e-5, rtol=1e-5)


def test_bfloat16_is_close_to_float32(tile):
    hidden, embedding, noise = (tensor.bfloat16() for tensor in inputs(tile, width=64, size=0.25))
    narrow = stats_of(tile, hidden, embedding, [0.6] * 3, noise.float())
    wide = stats_of(tile, hidden.float(), embedding.float(), [0.6] * 3, noise.float())
    assert narrow.soft.dtype == torch.bfloat16
    assert narrow.entropy.dtype == torch.float32
    torch.testing.assert_close(narrow.entropy, wide.entropy, atol=0.03, rtol=0)
    torch.testing.assert_close(narrow.soft.float(), wide.soft, atol=0.05, rtol=0.02)
    logits = plain(hidden.float(), embedding.float(), [0.6] * 3)[0]
    chosen = logits.gather(-1, narrow.argmax.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen < 0.1).all()  # at most a rounding error away from the best


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor had that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_row_of_logits_is_ever_whole():
    tile, canvas, vocab, width = 64, 32, 64 * 20 + 7, 16
    hidden, embedding, noise = inputs(tile, batch=2, canvas=canvas, vocab=vocab, width=width)
    with LargestTensor() as largest:
        stats_of(tile, hidden, embedding, [0.5, 0.8], noise)
    assert largest.numel <= 2 * canvas * 64  # one tile of the batch
    assert largest.numel < canvas * vocab
