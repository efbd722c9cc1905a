"""The whole network with pictures in its prompt, against transformers', from the pixels on.

The masks are handed to transformers: its `forward` makes none with pictures in them, and its `generate` lets a picture
see itself in full layers, too, which Google's own code does not.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dgemma.chat.media import Shown, place_media
from dgemma.chat.pictures import prepare
from dgemma.config import FULL, SLIDING, VisionConfig
from dgemma.nn.vision import Vision
from dgemma.weights.names import vision_name
from support.pictures import random_picture, reference_processor
from support.reference import SHAPES, RoutingMargin, network_like, reference_model
from support.vision import SMALL

TOKENS = VisionConfig(boi_token_id=90, image_token_id=91, eoi_token_id=92)
# Of 64, 63 and 70 soft tokens; the networks' windows are 12, 5 and 64 tokens.
PICTURES = [random_picture(60, 55), random_picture(400, 300), random_picture(6, 700)]
BUDGET = 70


@dataclass
class Seeing:
    """transformers' network and ours, of the same weights."""

    reference: Any
    network: Any
    vision: Vision

    @property
    def window(self):
        return self.network.config.sliding_window


@pytest.fixture(scope="module", params=["alternating", "five-to-one", "wide-window"])
def seeing(request):
    reference = reference_model(SHAPES[request.param], seed=list(SHAPES).index(request.param),
                                vision=SMALL | {"standardize": True, "position_embedding_size": 256})
    generator = torch.Generator().manual_seed(1)
    for name in ("std_bias", "std_scale"):
        getattr(reference.model.encoder.vision_tower, name).uniform_(0.5, 1.5, generator=generator)
    reference.model.encoder.config.image_token_id = TOKENS.image_token_id
    network = network_like(reference)
    vision = Vision(network.config.vision, network.config.hidden_size).eval().requires_grad_(False)
    vision.load_state_dict({ours: tensor for name, tensor in reference.state_dict().items()
                            if (ours := vision_name(name)) is not None})
    return Seeing(reference, network, vision)


def prompt_of(places, seed, length=20):
    """Random ids with image tokens at these places."""
    ids = torch.randint(80, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    for place in places:
        ids[place] = TOKENS.image_token_id
    return ids


def embedded(seeing, ids, images):
    """Our inputs [1, T, D] for a prompt, and where the pictures stand."""
    pictures = [prepare(image, BUDGET) for image in images]
    placed, starts = place_media(ids, [Shown((picture,)) for picture in pictures], TOKENS, list)
    inputs = seeing.network.embed(torch.tensor([placed]))
    spans = []
    for start, soft in zip(starts, seeing.vision([picture.patches() for picture in pictures]), strict=True):
        inputs[0, start : start + len(soft)] = soft
        spans.append((start, start + len(soft)))
    return placed, inputs, spans


def masks(seeing, past, width, spans, how="sliding"):
    """What transformers is to see, by kind of layer: additive, [1, 1, width, columns]; ``how`` pictures see all."""
    first = {FULL: 0, SLIDING: max(0, past - (seeing.window - 1))}  # its cache keeps no more of sliding layers
    found = {}
    for kind, begin in first.items():
        query = torch.arange(past, past + width).unsqueeze(1)
        key = torch.arange(begin, past + width).unsqueeze(0)
        seen = key <= query
        picture = torch.zeros_like(seen)
        for start, stop in spans:
            inside = [(part >= start) & (part < stop) for part in (query, key)]
            picture = picture | (inside[0] & inside[1])
        near = (key > query - seeing.window) | (kind == FULL)
        if how == "full":
            seen = (seen & near) | picture
        else:
            seen = (seen | picture if how == kind.removesuffix("_attention") else seen) & near
        found[kind] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    return found


def read_by_reference(seeing, placed, spans, images, cache, how="sliding"):
    inputs = {}
    if images:
        processed = reference_processor()(images, max_soft_tokens=BUDGET, return_tensors="pt")
        inputs = {"pixel_values": processed["pixel_values"], "image_position_ids": processed["image_position_ids"]}
    return seeing.reference.model.encoder(
        input_ids=torch.tensor([placed]), attention_mask=masks(seeing, cache.get_seq_length(), len(placed), spans, how),
        cache=cache, **inputs).last_hidden_state


@pytest.mark.parametrize(("places", "images"), [
    ([], []), ([3], PICTURES[:1]), ([0, 19], PICTURES[:2]), ([5, 6, 12], PICTURES), ([2, 9, 10], PICTURES[::-1]),
], ids=["none", "one", "first-and-last", "side-by-side", "the-other-way-round"])
def test_prompts_with_pictures_are_read_and_answered_as_in_transformers(seeing, places, images):
    """Two canvases' hidden states, a committed canvas between them."""
    network, canvas_length = seeing.network, seeing.network.config.canvas_length
    for seed in range(30):
        with RoutingMargin(network, network.config.top_k_experts) as margin:
            theirs_cache = DynamicCache(config=seeing.reference.config.get_text_config(decoder=True))
            ours_cache, pairs = network.new_cache(1), []
            placed, inputs, spans = embedded(seeing, prompt_of(places, seed), images)
            pairs.append((network.encode(inputs, ours_cache, spans=[spans]),
                          read_by_reference(seeing, placed, spans, images, theirs_cache)))
            for turn in range(2):
                generator = torch.Generator().manual_seed(100 * seed + turn)
                canvas = torch.randint(80, (1, canvas_length), generator=generator)
                theirs = seeing.reference.model.decoder(decoder_input_ids=canvas, cache=theirs_cache)
                pairs.append((network.denoise(canvas, ours_cache), theirs.last_hidden_state))
                pairs.append((network.encode(canvas, ours_cache),
                              read_by_reference(seeing, canvas[0].tolist(), [], [], theirs_cache)))
        if margin.least > 3e-5:
            break
    else:
        pytest.fail("no input leaves every router decided")
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["full", "causal"])
def test_other_masks_are_those_of_transformers_as_well(seeing, how):
    """"full" is what its `DiffusionGemma.generate` makes; the answer to what was read, too."""
    network = copy.deepcopy(seeing.network)
    network.config = dataclasses.replace(network.config, picture_attention=how)
    for seed in range(30):
        with RoutingMargin(network, network.config.top_k_experts) as margin:
            theirs_cache = DynamicCache(config=seeing.reference.config.get_text_config(decoder=True))
            ours_cache = network.new_cache(1)
            placed, inputs, spans = embedded(seeing, prompt_of([2, 9, 10], seed), PICTURES[::-1])
            ours = network.encode(inputs, ours_cache, spans=[spans])
            theirs = read_by_reference(seeing, placed, spans, PICTURES[::-1], theirs_cache, how)
            canvas = torch.arange(network.config.canvas_length).unsqueeze(0)
            answers = (network.denoise(canvas, ours_cache),
                       seeing.reference.model.decoder(decoder_input_ids=canvas, cache=theirs_cache).last_hidden_state)
        if margin.least > 3e-5:
            break
    else:
        pytest.fail("no input leaves every router decided")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)
    usual = seeing.network.encode(inputs, seeing.network.new_cache(1), spans=[spans])
    assert (usual - ours).abs().max() > 0.01


def test_the_mask_counts(seeing):
    """Read as plain text, the same soft tokens give other hidden states."""
    _, inputs, spans = embedded(seeing, prompt_of([5], 0), PICTURES[:1])
    seen = seeing.network.encode(inputs, seeing.network.new_cache(1), spans=[spans])
    causal = seeing.network.encode(inputs, seeing.network.new_cache(1))
    assert (seen - causal).abs().max() > 0.01


def test_rows_with_and_without_pictures_are_read_together_as_alone(seeing):
    network = seeing.network
    rows = [embedded(seeing, prompt_of(places, seed, length), images)[1:] for seed, (places, images, length) in
            enumerate([([3], PICTURES[:1], 20), ([], [], 33), ([0, 7], PICTURES[1:], 9)])]
    lengths = [inputs.shape[1] for inputs, _ in rows]
    together = torch.zeros(len(rows), max(lengths), network.config.hidden_size)
    for row, (inputs, _) in enumerate(rows):
        together[row, : lengths[row]] = inputs[0]
    cache = network.new_cache(len(rows))
    hidden = network.encode(together, cache, lengths, [spans for _, spans in rows])
    canvas = torch.arange(network.config.canvas_length).unsqueeze(0)
    denoised = network.denoise(canvas.expand(len(rows), -1), cache)
    for row, (inputs, spans) in enumerate(rows):
        alone = network.new_cache(1)
        torch.testing.assert_close(hidden[row, : lengths[row]], network.encode(inputs, alone, spans=[spans])[0],
                                   atol=1e-4, rtol=0)
        torch.testing.assert_close(denoised[row], network.denoise(canvas, alone)[0], atol=1e-4, rtol=0)
