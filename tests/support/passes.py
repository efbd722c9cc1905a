"""A network's passes with something of a test's own around them, to be handed to an engine."""

from dgemma.nn.passes import Passes


def watched(network, encode=None, denoise=None) -> Passes:
    """The network's passes; before each, ``encode(inputs, cache)`` or ``denoise(ids, cache, soft)`` is called."""
    def encoding(inputs, cache, *args, **kwargs):
        if encode is not None:
            encode(inputs, cache)
        return network.encode(inputs, cache, *args, **kwargs)

    def denoising(ids, cache, soft=None):
        if denoise is not None:
            denoise(ids, cache, soft)
        return network.denoise(ids, cache, soft)

    return Passes(encoding, denoising)


def texts_of(inputs, cache) -> list[list[int]]:
    """The tokens of each sequence in an encoder's pass."""
    return [part.tolist() for part in inputs[0].split(list(cache.counts))]
