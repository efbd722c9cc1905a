"""Pictures to soft tokens: the tower comes with the first picture, and what it saw of the last ones is kept.

Works on prepared pictures; knows nothing of where they come from or of prompts' text.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgemma.chat.pictures import Picture
from dgemma.config import VisionConfig
from dgemma.diffusion.prompt import SoftSpan
from dgemma.memory.inference import mapped_bytes
from dgemma.memory.vision import TowerSize
from dgemma.nn import DiffusionTransformer
from dgemma.nn.vision import Vision
from dgemma.weights.load import empty_vision, tensor_shapes

KEPT = 256 << 20  # bytes of soft tokens: some twenty pictures of 1,120 in float32, for the largest network


class PictureEncoder:
    """Makes the soft tokens of pictures for one network, from any thread.

    ``config`` is the tower's; ``load`` reads it when the first picture comes. ``kept`` bounds the bytes of soft tokens
    that are kept, those of the pictures asked for last; ``seen`` and ``reused`` count pictures that went through the
    tower and that did not. ``vision`` is the tower if it has been read already, ``nbytes`` what it takes, if that is
    known before (None: as many numbers of the network's type).
    """

    def __init__(self, network: DiffusionTransformer, config: VisionConfig, load: Callable[[], Vision],
                 kept: int = KEPT, *, vision: Vision | None = None, nbytes: int | None = None):
        self.network, self.config, self.load, self.kept, self.vision = network, config, load, kept, vision
        parameters = sum(math.prod(shape) for shape in
                         tensor_shapes(empty_vision(config, network.config.hidden_size)).values())
        item = network.dtype.itemsize
        self.size = TowerSize(config, parameters, parameters * item if nbytes is None else nbytes, item)
        self.seen = self.reused = 0
        self._soft: OrderedDict[bytes, Tensor] = OrderedDict()
        self._working = threading.Lock()

    @classmethod
    def of(cls, network: DiffusionTransformer) -> PictureEncoder:
        """One that sees by the network's own tower, which it must have."""
        vision, config = network.vision, network.config.vision  # whose tokens are the model's
        if vision is None or config is None:
            raise ValueError("this network has no vision tower")
        return cls(network, config, lambda: vision, vision=vision)

    @property
    def nbytes(self) -> int:
        """The memory of the soft tokens that are kept."""
        return sum(soft.nbytes for soft in list(self._soft.values()))  # a copy: others may be adding to them

    @property
    def ahead(self) -> int:
        """The memory that seeing has yet to take, bytes: of the tower, a pass through it, and soft tokens to keep.

        Of a tower that has been read, what is a file's is still to come: such memory counts as free.
        """
        if self.vision is None:
            weights = self.size.nbytes
        else:
            weights = 0 if self.vision is self.network.vision else mapped_bytes(self.vision)
        return weights + self.size.working(self.network.device) + max(self.kept - self.nbytes, 0)

    def spans(self, pictures: Sequence[Picture], starts: Sequence[int]) -> tuple[SoftSpan, ...]:
        """The pictures of a prompt as its spans, which start at these tokens."""
        return tuple(SoftSpan(start, soft, picture.digest)
                     for start, soft, picture in zip(starts, self.see(pictures), pictures, strict=True))

    def see(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The soft tokens [n, D] of each picture; the tower sees all new ones together."""
        with self._working:
            new = {picture.digest: picture for picture in pictures if picture.digest not in self._soft}
            fresh = dict(zip(new, self._see([picture.patches() for picture in new.values()]), strict=True))
            self.seen += len(new)
            self.reused += len(pictures) - len(new)
            found = [fresh[p.digest] if p.digest in fresh else self._soft[p.digest] for p in pictures]
            for picture, soft in zip(pictures, found, strict=True):
                self._soft[picture.digest] = soft
                self._soft.move_to_end(picture.digest)
            while self.nbytes > self.kept:
                self._soft.popitem(last=False)
        return found

    def _see(self, patches: Sequence[Tensor]) -> list[Tensor]:
        if not patches:
            return []
        if self.vision is None:
            self.vision = self.load()
        with torch.inference_mode(), torch.autocast(self.network.device.type, enabled=False):
            # A copy of each: the tower's are views of all that went through it together.
            return [soft.to(self.network.device, self.network.dtype, copy=True) for soft in self.vision(patches)]
