"""The network as readable torch modules: one set of weights, run as a causal encoder or as a canvas decoder.

Knows nothing of files or of the tokens' text.
"""

from dgemma.cache import KVCache
from dgemma.nn.head import CanvasStats, canvas_stats
from dgemma.nn.transformer import DiffusionTransformer

__all__ = ["CanvasStats", "DiffusionTransformer", "KVCache", "canvas_stats"]
