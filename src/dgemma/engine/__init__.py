"""Requests, batching, reuse of what was read before. Knows nothing of HTTP."""

from dgemma.engine.engine import Engine
from dgemma.engine.prefixes import PrefixStore

__all__ = ["Engine", "PrefixStore"]
