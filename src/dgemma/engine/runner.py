"""Several requests at once through the network: what they read, and one denoising step of each one's canvas.

Works on tensors and sequences; knows nothing of queues or memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.cache.pages import PagedBatch
from dgemma.diffusion.constraint import Guide, Walk, held
from dgemma.diffusion.events import Denoised, TokenLogprob
from dgemma.diffusion.sampler import EntropyBoundSampler, Sampler, StepSettings
from dgemma.diffusion.sequence import SequenceState
from dgemma.engine.prefixes import Prefix
from dgemma.engine.step import StepState, denoising_step, forced
from dgemma.nn import CanvasStats, DiffusionTransformer
from dgemma.nn.distributions import Distributions, favoured, narrowed_stats
from dgemma.nn.passes import Passes

_STATS = ("argmax", "sample", "entropy", "soft")


@dataclass(eq=False)
class Slot:
    """A request that runs: its sequence, what it has read, and what its canvas carries from step to step."""

    sequence: SequenceState
    prefix: Prefix
    memory: int = 0  # bytes promised to it
    tokens: int = 0  # how many it may hold in these
    age: int = 0  # whoever came later has a larger one
    stalled: bool = False  # it cannot go on before others have given memory back
    guide: Guide | None = None
    soft: Tensor | None = None  # [C, D] self-conditioning; None while no canvas is open
    noise: tuple[Tensor, Tensor] | None = None  # drawn for the step that comes; kept if that has to be run again
    hidden: Tensor | None = None  # [C, D] of the last step
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None

    @property
    def unread(self) -> int:
        """Tokens that must be read before a canvas can be opened."""
        return len(self.sequence.context) - self.prefix.cache.length

    @property
    def reads_long(self) -> bool:
        """Whether it has to read a prompt, or again what it let go; else it is a canvas at most."""
        return self.unread > (self.sequence.config.canvas_length if self.sequence.canvas_index else 0)


@dataclass(frozen=True)
class Outcome:
    """What a step did to one sequence."""

    event: Denoised | None  # None when the request does not want to hear of drafts
    done: bool  # the canvas is finished
    finite: bool = True  # if not, the step has come to nothing: the slot is as it was


class Runner:
    """Takes sequences through the network.

    ``passes`` are the network's own, and ``sampler`` the reference's, unless others are handed in.
    """

    def __init__(self, network: DiffusionTransformer, sampler: Sampler | None = None, passes: Passes | None = None):
        self.network, self.sampler = network, sampler or EntropyBoundSampler()
        self.passes = passes or Passes.of(network)

    def read(self, work: Sequence[tuple[Slot, int]]) -> list[bool]:
        """A causal pass over the next so many tokens of each context.

        Returns for each whether its hidden states are finite; who has others has read nothing.
        """
        caches, counts = [slot.prefix.cache for slot, _ in work], [count for _, count in work]
        batch = PagedBatch(caches, counts)
        parts = [slot.sequence.piece(slot.prefix.cache.length, count) for slot, count in work]
        ids = torch.tensor([[token for part in parts for token in part.ids]], device=self.network.device)
        starts = [0, *itertools.accumulate(counts)]
        soft = [(0, start + begin, rows) for start, part in zip(starts, parts, strict=False)
                for begin, _, rows in part.soft]
        spans = [[(start, start + len(rows)) for _, start, rows in soft]] if soft else None
        hidden = self.passes.encode(ids, batch, spans=spans, seen=soft)
        fine = [bool(part.all()) for part in hidden[0].isfinite().all(-1).cpu().split(counts)]
        for index, good in enumerate(fine):
            if not good:
                batch.undo(index)
        return fine

    def denoise(self, slots: Sequence[Slot]) -> list[Outcome]:
        """One denoising step of every slot's canvas. Raises what goes wrong, and has changed no slot then."""
        state = self._state(slots)
        special = any(_narrows(slot) or slot.guide is not None for slot in slots)  # their choices are made on the host
        batch = PagedBatch([slot.prefix.cache for slot in slots])
        result = denoising_step(self.network, self.passes, self.sampler, batch, state,
                                partial(self._predicted, slots, state) if special else None)
        *columns, done, finite = [t.cpu() for t in (result.draft, result.canvas, result.entropy, result.accepted,
                                                    result.done, result.finite)]
        candidates = [_candidates(self.network, slot, result.hidden[index]) for index, slot in enumerate(slots)]
        outcomes = []
        for index, (slot, sound, ended) in enumerate(zip(slots, finite.tolist(), done.tolist(), strict=True)):
            if not sound:
                outcomes.append(Outcome(None, False, finite=False))
                continue
            slot.soft, slot.hidden, slot.noise = result.soft[index], result.hidden[index], None
            event = slot.sequence.advance(*(column[index] for column in columns), candidates=candidates[index])
            outcomes.append(Outcome(event, ended))
        return outcomes

    def _state(self, slots: Sequence[Slot]) -> StepState:
        sequences, device = [slot.sequence for slot in slots], self.network.device
        for slot in slots:
            slot.noise = slot.noise or slot.sequence.draw_noise()
        noise, random = (torch.stack(part).to(device) for part in
                         zip(*(slot.noise for slot in slots if slot.noise), strict=True))
        longest = max(len(sequence.history) for sequence in sequences)
        history = torch.stack([F.pad(sequence.history, (0, 0, longest - len(sequence.history), 0), value=-1)
                               for sequence in sequences], 1)
        pinned = None
        if any(sequence.pinned is not None for sequence in sequences):
            none = torch.zeros(self.network.config.canvas_length, dtype=torch.bool)
            pinned = torch.stack([none if sequence.pinned is None else sequence.pinned
                                  for sequence in sequences]).to(device)
        temperatures = [sequence.request.sampling.temperature for sequence in sequences]
        # A temperature of 0 draws nothing: any number will do.
        settings = StepSettings.of([sequence.settings for sequence in sequences],
                                   [sequence.step for sequence in sequences], device,
                                   [1 / (temperature or 1.0) for temperature in temperatures])
        greedy = torch.tensor([t == 0 for t in temperatures], device=device) if not all(temperatures) else None
        return StepState(torch.stack([sequence.canvas for sequence in sequences]).to(device),
                         torch.stack([slot.soft for slot in slots if slot.soft is not None]), noise, random,
                         history.to(device), settings, pinned, greedy)

    def _predicted(self, slots: Sequence[Slot], state: StepState, hidden: Tensor) -> CanvasStats:
        """Predictions where some choose for themselves: narrowed ones are not walked through the head."""
        finite = hidden.isfinite().flatten(1).all(1)
        sound = finite.tolist()
        narrow = [index for index, slot in enumerate(slots) if sound[index] and _narrows(slot)]
        if not narrow:
            stats = self.network.head(hidden, state.settings.temperature, state.noise, state.settings.sharpness)
        else:
            stats = self._partly_narrowed(slots, state, hidden, narrow)
        sound = (finite & stats.entropy.isfinite().all(1)).tolist()
        for index, slot in enumerate(slots):
            if slot.guide is not None and sound[index]:
                _guide(self.network, slot, hidden[index], stats, index)
        return stats

    def _partly_narrowed(self, slots: Sequence[Slot], state: StepState, hidden: Tensor,
                         narrow: list[int]) -> CanvasStats:
        """Predictions of rows of which some are narrowed, each by itself; the others go through the head together."""
        plain = [index for index in range(len(slots)) if index not in narrow]
        parts = [_narrowed(self.network, slots[index], hidden[index]) for index in narrow]
        if plain:
            sharpness = state.settings.sharpness
            parts.append(self.network.head(hidden[plain], state.settings.temperature[plain], state.noise[plain],
                                           None if sharpness is None else sharpness[plain]))
        order = torch.tensor([*narrow, *plain], device=hidden.device).argsort()
        return CanvasStats(*(torch.cat([getattr(part, name) for part in parts])[order] for name in _STATS))


def logprobs_of(network: DiffusionTransformer, slot: Slot, count: int) -> list[TokenLogprob] | None:
    """The log-probabilities of a closing canvas' first ``count`` tokens, if the request asks for them."""
    if slot.sequence.request.logprobs is None or slot.hidden is None:
        return None
    return token_logprobs(_distributions(network, slot, slot.hidden, 1.0), slot.sequence.draft,
                          slot.sequence.request.logprobs, count)


def token_logprobs(distributions: Distributions, token_ids: Tensor, top: int, upto: int) -> list[TokenLogprob]:
    """The log-probability of each of the first ``upto`` of token_ids [C], and the ``top`` best tokens at its place."""
    found: list[TokenLogprob] = []
    for positions, log_p in distributions.first(upto):
        ids = token_ids[positions].to(log_p.device)
        own = log_p.gather(1, ids.unsqueeze(1)).squeeze(1)
        best, tokens = log_p.topk(min(top, log_p.shape[1]))
        pairs = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), best.tolist(), strict=True)]
        found += map(TokenLogprob, ids.tolist(), own.tolist(), pairs)
    return found


def _candidates(network: DiffusionTransformer, slot: Slot, hidden: Tensor) -> list[list[tuple[int, float]]] | None:
    """The most probable tokens at every place and their probabilities, if the request wants to hear of them."""
    request = slot.sequence.request
    if not (request.candidates and request.drafts):
        return None
    found: list[list[tuple[int, float]]] = []
    for _, log_p in _distributions(network, slot, hidden, slot.sequence.temperature):
        best, tokens = log_p.topk(min(request.candidates, log_p.shape[1]))
        found += [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), best.exp().tolist(), strict=True)]
    return found


def _narrows(slot: Slot) -> bool:
    # Under a guide the sample is another one.
    return bool(slot.sequence.request.sampling.logit_bias) or (slot.guide is None and _draws_narrowed(slot))


def _draws_narrowed(slot: Slot) -> bool:
    sampling = slot.sequence.request.sampling
    return bool(sampling.temperature and (sampling.top_k or sampling.top_p < 1))


def _distributions(network: DiffusionTransformer, slot: Slot, hidden: Tensor, temperature: float) -> Distributions:
    bias = None
    if slot.sequence.request.sampling.logit_bias:
        tokens, values = zip(*slot.sequence.request.sampling.logit_bias, strict=True)
        bias = torch.zeros(network.config.vocab_size, device=hidden.device)
        bias[list(tokens)] = torch.tensor(values, dtype=torch.float32, device=hidden.device)
    return Distributions(hidden, network.embed_tokens.weight, network.config.final_logit_softcapping, temperature, bias)


def _narrowed(network: DiffusionTransformer, slot: Slot, hidden: Tensor) -> CanvasStats:
    sampling, noise = slot.sequence.request.sampling, slot.noise
    assert noise is not None
    return narrowed_stats(_distributions(network, slot, hidden, slot.sequence.temperature), network.embed_tokens.weight,
                          network.embed_scale, noise[0][:, 0, 0].to(hidden.device), sampling.top_k, sampling.top_p,
                          1 / (sampling.temperature or 1.0))


def _guide(network: DiffusionTransformer, slot: Slot, hidden: Tensor, stats: CanvasStats, index: int) -> None:
    """Put what the constraint chooses in the place of the sequence's argmax and sample."""
    sequence, noise = slot.sequence, slot.noise
    assert slot.guide is not None and noise is not None
    pinned = sequence.asked
    if pinned is not None:
        pinned, canvas = pinned.to(hidden.device), sequence.canvas.to(hidden.device)
        for tokens in (stats.argmax, stats.sample):
            tokens[index] = torch.where(pinned, canvas, tokens[index])
    # What is valid as it was predicted is the most probable canvas, and a draw as good as one among the valid ones.
    if slot.guide.may_be_empty and not _draws_narrowed(slot) and all(
            slot.guide.takes(tokens[index].tolist(), network.config.canvas_length, sequence.room)
            for tokens in (stats.argmax, stats.sample)):
        return
    # The most probable path is the same at any temperature, so the walk is at the draw's.
    sampling = sequence.request.sampling
    walk: Walk = _distributions(network, slot, hidden, sequence.temperature * (sampling.temperature or 1.0))
    if _draws_narrowed(slot):
        walk = ((place, favoured(log_p, sampling.top_k, sampling.top_p)) for place, log_p in walk)
    if pinned is not None:
        walk = held(walk, sequence.canvas.to(hidden.device), pinned, sequence.settings.eos_token_id, sequence.room)
    chosen = slot.guide.choose(walk, network.config.canvas_length, sequence.room, noise[0][:, 0, 0])
    stats.argmax[index] = chosen.draft.to(hidden.device)
    stats.sample[index] = chosen.sample.to(hidden.device)
    one = CanvasStats(*(getattr(stats, name)[index : index + 1] for name in _STATS))
    one = forced(network, one, chosen.fixed.to(hidden.device).unsqueeze(0), one.argmax)
    stats.entropy[index], stats.soft[index] = one.entropy[0], one.soft[0]
