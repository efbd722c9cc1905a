"""A network's passes, watched."""

from __future__ import annotations

import dataclasses

from dgemma.nn.passes import Passes


class Watched:
    """``passes`` are the network's own, and tell here every canvas that is denoised, and with what."""

    def __init__(self, network):
        self.canvases, self.soft = [], []
        own = Passes.of(network)

        def denoise(canvas, cache, soft=None):
            self.canvases.append(canvas.clone())
            self.soft.append(soft)
            return own.denoise(canvas, cache, soft)

        self.passes = dataclasses.replace(own, denoise=denoise)
