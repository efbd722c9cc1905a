"""Tokenizers to constrain with, and a stand-in for the denoising loop."""

import torch

from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data.tokenizer import byte_symbols

STOPS = (1, 106, 50)


def byte_level(known, specials):
    """A byte-level tokenizer of these spellings and ids, without merges: it encodes byte by byte."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=known, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return Tokenizer(backend, source="a test")


def spelling(piece):
    """Text or bytes as a byte-level vocabulary spells them."""
    symbols = byte_symbols()
    return "".join(symbols[byte] for byte in (piece if isinstance(piece, bytes) else piece.encode()))


def tokenizer_of(pieces, specials=("<stop>", "<end>", "<|channel>", "<channel|>")):
    """A tokenizer of exactly these pieces of text (or bytes) behind the special tokens."""
    return byte_level({token: i for i, token in enumerate([*specials, *map(spelling, pieces)])}, specials)


def walk(log_probs, step=7):
    for start in range(0, len(log_probs), step):
        yield slice(start, min(start + step, len(log_probs))), log_probs[start : start + step]


def random_log_probs(canvas, vocab, generator, sharpness=4.0):
    return (torch.randn(canvas, vocab, generator=generator) * sharpness).log_softmax(-1)


def denoise(constraint, tokenizer, room, canvas, seed, sharpness=4.0, drawn=False, stops=STOPS, log_probs=None):
    """An answer's token ids under random distributions, made as the loop does it: a few steps a canvas."""
    generator = torch.Generator().manual_seed(seed)
    guide = constraint.guide(room)
    answer = []
    while len(answer) < room:
        left = room - len(answer)
        known = guide.template(canvas, left)
        for _ in range(2):
            given = log_probs or random_log_probs
            scores = given(canvas, tokenizer.vocab_size, generator, sharpness)
            chosen = guide.choose(walk(scores), canvas, left, torch.rand(canvas, generator=generator))
            for tokens in (chosen.draft.tolist(), chosen.sample.tolist()):
                assert all(want is None or want == token for want, token in zip(known, tokens, strict=True))
        tokens = (chosen.sample if drawn else chosen.draft).tolist()
        end = next((place for place, token in enumerate(tokens) if token in stops), canvas)
        stopped = end < canvas and end <= left
        kept = tokens[: min(end, left)]
        answer += kept
        guide.commit(kept)
        assert guide.finished or not stopped
        if stopped or guide.finished:
            break
    assert guide.finished
    return answer
