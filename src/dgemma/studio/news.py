"""Something that changes while others watch: they wait for news, then look at it, as fast as they like.

Knows nothing of: what changes.
"""

from __future__ import annotations

import asyncio


class Watched:
    """For the event loop's thread."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    async def changed(self) -> None:
        """Wait for news; there may have been some before."""
        await self._news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
