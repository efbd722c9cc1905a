"""The network's passes as compiled code, for the batches whose shape is worth the minutes that compiling takes.

Works on a network and collated batches; knows nothing of losses, steps and recipes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.train.batch import Batch


class CompiledPasses:
    """A network's two passes compiled, each by itself: the time that takes does not grow with the passes of a loss.

    Every shape is compiled anew, for minutes (so is a pass without gradients, and a second reading for a causal loss):
    only one is, that at least half of ``batches`` have. What is of another shape or padded runs as it is. ``shape`` is
    that of contexts and canvases; None: nothing is compiled.
    """

    def __init__(self, network: DiffusionTransformer, batches: Iterable[Batch]):
        self._network = network
        self._encode = torch.compile(network.encode, dynamic=False)
        self._denoise = torch.compile(network.denoise, dynamic=False)
        shapes = Counter(map(_shape, batches))
        shape, count = shapes.most_common(1)[0]
        self.shape = shape if 2 * count >= shapes.total() else None

    @contextmanager
    def calls(self, batch: Batch) -> Iterator[None]:
        """While this lasts the network reads and denoises by compiled code, if that is there for the batch's shape."""
        if self.shape is None or _shape(batch) != self.shape:
            yield
            return
        own = vars(self._network)
        own.update(encode=self._encode, denoise=self._conditioned)
        try:
            yield
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            raise DgemmaError(f"torch.compile failed ({str(error).strip().splitlines()[0]}): it needs a C++ compiler; "
                              "without one set compile: false in the recipe") from error
        finally:
            del own["encode"], own["denoise"]

    def _conditioned(self, tokens: Tensor, cache: KVCache, soft: Tensor | None = None) -> Tensor:
        """`DiffusionTransformer.denoise`, always conditioned (zeros are none), in one precision: one piece of code."""
        if soft is None:
            soft = torch.zeros(*tokens.shape, self._network.config.hidden_size, device=tokens.device)
        return self._denoise(tokens, cache, soft.float())


def _shape(batch: Batch) -> tuple[torch.Size, torch.Size] | None:
    """What code is compiled for: the shapes of contexts and canvases; None where rows are padded or shared."""
    return (batch.context.shape, batch.canvas.shape) if batch.lengths is None and batch.owners is None else None
