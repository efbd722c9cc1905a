"""Our network against transformers', weight for weight, over networks of many shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dgemma.cache import KVCache
from dgemma.config import model_config_from_dict
from dgemma.nn import DiffusionTransformer
from support.reference import SHAPES, RoutingMargin, config_dict, network_like, reference_model

TOLERANCE = 1e-4
# Inputs for which a router hangs in the balance say nothing: other inputs are drawn.
LEAST_MARGIN = 3e-5

Comparisons = Iterator[tuple[torch.Tensor, torch.Tensor]]  # (ours, theirs), …


@dataclass
class Pair:
    """The oracle and our network with its weights."""

    reference: Any
    network: DiffusionTransformer
    seed: int = 0

    @property
    def window(self) -> int:
        return self.network.config.sliding_window

    @property
    def canvas_length(self) -> int:
        return self.network.config.canvas_length

    def ids(self, rows: int, columns: int, turn: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + turn)
        return torch.randint(self.network.config.vocab_size, (rows, columns), generator=generator)

    def canvas(self, rows: int, turn: int = 1) -> torch.Tensor:
        return self.ids(rows, self.canvas_length, turn)

    def processed(self, rows: int, turn: int = 2) -> torch.Tensor:
        """Made-up logits of an earlier step, peaked enough that their softmax is far from uniform."""
        generator = torch.Generator().manual_seed(self.seed * 100 + turn)
        shape = (rows, self.canvas_length, self.network.config.vocab_size)
        return 3 * torch.randn(shape, generator=generator)

    def reference_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.reference.config.get_text_config(decoder=True))

    def agree(self, comparisons: Callable[[], Comparisons]) -> None:
        """Assert that all pairs are equal up to TOLERANCE, on inputs that leave no router undecided."""
        for self.seed in range(50):
            with RoutingMargin(self.network, self.network.config.top_k_experts) as margin:
                outcomes = list(comparisons())
            if margin.least > LEAST_MARGIN:
                break
        else:
            pytest.fail("no input leaves every router decided")
        for ours, theirs in outcomes:
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request):
    place = list(SHAPES).index(request.param)
    reference = reference_model(SHAPES[request.param], seed=place)
    # The two spellings of the full layers' geometry take turns.
    return Pair(reference, network_like(reference, ("per_layer_config", "global_head_dim")[place % 2]))


@pytest.fixture(params=["shorter", "equal", "longer"])
def prompt_length(request, pair):
    """Prompts shorter than, equal to and much longer than the sliding window."""
    return around(pair.window)[["shorter", "equal", "longer"].index(request.param)]


def around(window: int) -> list[int]:
    return [max(1, window - 3), window, 3 * window + 5]


def ragged(pair: Pair) -> list[torch.Tensor]:
    """Prompts of unequal length, around the window."""
    return [pair.ids(1, length, turn=30 + i)[0] for i, length in enumerate([*around(pair.window), 1])]


def pad_right(rows: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    lengths = [len(row) for row in rows]
    return torch.stack([F.pad(row, (0, max(lengths) - len(row)), value=3) for row in rows]), lengths


def test_both_spellings_of_the_full_layers_mean_the_same(pair):
    per_layer, by_kind = (model_config_from_dict(config_dict(pair.reference, spelling))
                          for spelling in ("per_layer_config", "global_head_dim"))
    assert per_layer == by_kind == pair.network.config


def test_the_two_passes_have_different_scalars(pair):
    for block in pair.network.layers:
        assert block.layer_scalar != block.encoder_layer_scalar


def test_prompt_and_first_step(pair, prompt_length):
    def comparisons():
        ids, canvas = pair.ids(2, prompt_length), pair.canvas(2)
        theirs = pair.reference(input_ids=ids, decoder_input_ids=canvas)
        cache = pair.network.new_cache(2)
        yield pair.network.encode(ids, cache), theirs.encoder_last_hidden_state
        yield pair.network.logits(pair.network.denoise(canvas, cache)), theirs.logits

    pair.agree(comparisons)


def test_step_with_self_conditioning(pair, prompt_length):
    def comparisons():
        ids, canvas, processed = pair.ids(2, prompt_length), pair.canvas(2), pair.processed(2)
        theirs = pair.reference(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=processed)
        cache = pair.network.new_cache(2)
        pair.network.encode(ids, cache)
        ours = pair.network.logits(pair.network.denoise(canvas, cache, pair.network.soft_embeddings(processed)))
        without = pair.network.logits(pair.network.denoise(canvas, cache))
        assert (ours - without).abs().max() > 0.01  # the soft embeddings count
        yield ours, theirs.logits

    pair.agree(comparisons)


def test_no_soft_embeddings_are_zeros(pair):
    cache = pair.network.new_cache(1)
    pair.network.encode(pair.ids(1, 9), cache)
    hidden = pair.network.denoise(pair.canvas(1), cache)
    assert torch.equal(hidden, pair.network.denoise(pair.canvas(1), cache, torch.zeros_like(hidden)))


def test_second_and_third_canvas(pair, prompt_length):
    """A finished canvas is committed by a causal pass over its tokens; the next one is denoised behind it."""

    def comparisons():
        ids, theirs_cache, cache = pair.ids(2, prompt_length), pair.reference_cache(), pair.network.new_cache(2)
        pair.reference(input_ids=ids, decoder_input_ids=pair.canvas(2), past_key_values=theirs_cache)
        pair.network.encode(ids, cache)
        for turn in (1, 2):
            committed, canvas, processed = (pair.canvas(2, turn=10 + turn), pair.canvas(2, turn=20 + turn),
                                            pair.processed(2, turn=turn))
            theirs = pair.reference(input_ids=committed, decoder_input_ids=canvas, past_key_values=theirs_cache)
            yield pair.network.encode(committed, cache), theirs.encoder_last_hidden_state
            yield pair.network.logits(pair.network.denoise(canvas, cache)), theirs.logits
            theirs = pair.reference(decoder_input_ids=canvas, past_key_values=theirs_cache,
                                    self_conditioning_logits=processed)
            soft = pair.network.soft_embeddings(processed)
            yield pair.network.logits(pair.network.denoise(canvas, cache, soft)), theirs.logits

    pair.agree(comparisons)


def test_unequal_rows_are_what_each_is_alone(pair):
    """One ragged batch of ours against the reference on each row by itself, over two canvases."""

    def comparisons():
        prompts = ragged(pair)
        first, second = pair.canvas(len(prompts), turn=1), pair.canvas(len(prompts), turn=2)
        tokens, lengths = pad_right(prompts)
        cache = pair.network.new_cache(len(prompts))
        encoded = pair.network.encode(tokens, cache, lengths)
        early = pair.network.logits(pair.network.denoise(first, cache))
        pair.network.encode(first, cache)
        late = pair.network.logits(pair.network.denoise(second, cache))
        for i, prompt in enumerate(prompts):
            theirs_cache, row = pair.reference_cache(), slice(i, i + 1)
            theirs = pair.reference(input_ids=prompt[None], decoder_input_ids=first[row], past_key_values=theirs_cache)
            yield encoded[row, : len(prompt)], theirs.encoder_last_hidden_state
            yield early[row], theirs.logits
            theirs = pair.reference(input_ids=first[row], decoder_input_ids=second[row], past_key_values=theirs_cache)
            yield late[row], theirs.logits

    pair.agree(comparisons)


def test_unequal_rows_are_those_of_the_left_padded_reference(pair):
    """The reference's own way to batch unequal prompts: padding in front, masked out."""

    def comparisons():
        prompts = ragged(pair)
        rows, width = len(prompts), max(len(prompt) for prompt in prompts)
        canvas, processed = pair.canvas(rows), pair.processed(rows)
        padded = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = torch.arange(width) >= width - lengths
        theirs = pair.reference(
            input_ids=padded, attention_mask=mask, decoder_input_ids=canvas, self_conditioning_logits=processed,
            position_ids=(torch.arange(width) - (width - lengths)).clamp(min=0),
            decoder_attention_mask=F.pad(mask, (0, pair.canvas_length), value=True),
            decoder_position_ids=lengths + torch.arange(pair.canvas_length))
        tokens, counts = pad_right(prompts)
        cache = pair.network.new_cache(rows)
        encoded = pair.network.encode(tokens, cache, counts)
        for i, prompt in enumerate(prompts):
            yield encoded[i, : len(prompt)], theirs.encoder_last_hidden_state[i, width - len(prompt) :]
        soft = pair.network.soft_embeddings(processed)
        yield pair.network.logits(pair.network.denoise(canvas, cache, soft)), theirs.logits

    pair.agree(comparisons)


def test_padding_tokens_do_not_matter(pair):
    def comparisons():
        tokens, lengths = pad_right(ragged(pair))
        other = tokens.clone()
        for row, length in enumerate(lengths):
            other[row, length:] = 5
        outcomes = []
        for ids in (tokens, other):
            cache = pair.network.new_cache(len(lengths))
            pair.network.encode(ids, cache, lengths)
            outcomes.append(pair.network.denoise(pair.canvas(len(lengths)), cache))
        yield outcomes[0], outcomes[1]

    pair.agree(comparisons)


@pytest.mark.parametrize("chunk", [5, 16])
def test_reading_in_pieces_changes_nothing(pair, chunk):
    def outcome(pieces: int):
        tokens, lengths = pad_right(ragged(pair)[1:])
        canvas = pair.canvas(len(lengths))
        even, uneven = (KVCache(pair.network.config, rows, pair.network.device, piece=pieces)
                        for rows in (1, len(lengths)))
        rows = [pair.network.encode(tokens[1:2], even)[0]]
        encoded = pair.network.encode(tokens, uneven, lengths)
        rows += [row[:n] for row, n in zip(encoded, lengths, strict=True)]
        return torch.cat(rows), pair.network.denoise(canvas[:1], even), pair.network.denoise(canvas, uneven)

    pair.agree(lambda: zip(outcome(chunk), outcome(10_000), strict=True))
