"""What was read before, kept so that nobody reads it twice: a chat's next turn, a common system prompt, n samples.

A tree of pages (`dgemma.cache.pages`): a node is up to `PAGE` tokens, its children what followed on them. A new context
goes on from its longest common beginning with anything in the tree, to the token. What was read with an adapter is in
a tree of that adapter's own, and so is what was read by weights that have changed since. Works on token ids and pages;
knows nothing of requests.

What one tenant has read no other one finds, or he could guess at another's prompt by how fast his own is answered. The
beginning of a context may be open to all, a system prompt: whole pages of it, found only by who has each to the token.

Pages are shared, never copied, so what is in the tree and in use at the same time costs its memory once, and that is
its user's. Two things are let go when the rest is too much: single pages' sliding layers (most of a page's memory, and
needed only by contexts that end within a window behind it), and whole nodes that nothing follows on. The least recently
used go first.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.cache.pages import PAGE, Page, Paged, PageFormat
from dgemma.engine.fingerprint import fingerprint
from dgemma.nn.transformer import DiffusionTransformer

Top = tuple[bytes, object]  # what a tree was read by: the network's fingerprint, the adapter (None: none)
_NEAR = 4  # how many neighbours on either side are looked at


@dataclass(eq=False)
class _Node:
    tokens: tuple[int, ...]
    page: Page
    lighter: Page  # the same without its sliding layers
    siblings: _Children  # where it stands itself
    children: _Children  # what follows, read by the same tenant; behind what all may find also by tenant
    holders: int = 0  # contexts in use that go through this node
    used: int = 0  # when the node was last part of a context
    known: bool = True  # whether it stands in the tree
    seen: int = 0  # when its sliding layers were last in a context's reach

    @property
    def spare(self) -> int:
        """Bytes that nobody uses: holders need a node's full layers, and have of its sliding ones what they need."""
        return self.page.nbytes - (self.lighter.nbytes if self.holders else 0)


class _Children(dict[tuple[int, ...], _Node]):
    """Nodes by their tokens, which stand in order, too: whoever shares most with a text is next to its place there.

    ``tenants``: what follows and only its tenant may find. None of these is empty: ``home`` is where this one stands.
    """

    def __init__(self, home: tuple[dict[Any, _Children], Any, _Children | None] | None = None) -> None:
        self.order: list[tuple[int, ...]] = []
        self.tenants: dict[str, _Children] = {}
        self.home = home

    def line(self, tenant: str) -> _Children:
        """What follows and the tenant has read; empty, and not kept, if he has read nothing."""
        found = self.tenants.get(tenant)
        return _Children((self.tenants, tenant, self)) if found is None else found

    def settle(self) -> None:
        """Keep this one where it stands from now on, or keep it no longer if it is empty."""
        at: _Children | None = self
        while at is not None and at.home is not None:
            place, key, outer = at.home
            if at or at.tenants:
                place[key] = at
            else:
                place.pop(key, None)
            at = outer

    def add(self, node: _Node) -> None:
        self[node.tokens] = node
        insort(self.order, node.tokens)

    def take(self, tokens: tuple[int, ...]) -> _Node:
        del self.order[bisect_left(self.order, tokens)]
        return self.pop(tokens)

    def closest(self, text: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The node with the longest common beginning (one with all its layers if there are several), that length."""
        place = bisect_left(self.order, text)
        near = [self[tokens] for tokens in self.order[max(place - _NEAR, 0) : place + _NEAR]]
        return max(((node, _common(node.tokens, text)) for node in near),
                   key=lambda pair: (pair[1], pair[0].page.has_all()), default=(None, 0))

    def shorter(self, text: tuple[int, ...]) -> tuple[int, ...] | None:
        """The tokens of a node that ``text`` begins with and goes on from."""
        place = bisect_left(self.order, text)
        before = self.order[place - 1] if place else ()
        return before if before and text[: len(before)] == before else None


class PrefixStore:
    """Contexts read before: up to ``budget`` bytes of keys and values that nobody uses, ``lent`` of which others have.

    For several threads. ``page`` is how many tokens a page has.
    ``hits`` counts the contexts that began with something known, ``hit_tokens`` these tokens. ``nbytes`` is the memory
    of all that is known, ``spare`` of what nobody uses.
    """

    def __init__(self, budget: int = 1 << 30, page: int = PAGE):
        self.budget, self.lent, self.page = budget, 0, page
        self.nbytes = self.spare = self.hits = self.hit_tokens = 0
        self.version = 0  # of what is known: what has not changed need not be looked up again
        self._tops: dict[Top, _Children] = {}
        self._clock = itertools.count(1)
        self._lock = threading.RLock()

    def open(self, context: Sequence[int], network: DiffusionTransformer, adapter: object = None, tenant: str = "",
             shared: int = 0, weights: bytes | None = None) -> Prefix:
        """A cache that holds as much of the beginning of ``context`` as is known, read with ``adapter`` (None: none).

        Two adapters are the same if they are the same object. What this one reads only its ``tenant`` finds again, but
        for the whole pages of its first ``shared`` tokens. ``weights`` is the network's `fingerprint`, if it is known.
        """
        weights = fingerprint(network) if weights is None else weights
        with self._lock:
            form = PageFormat(network.config, network.device, network.cache_type, self.page)
            prefix = Prefix(self, Paged(form), (weights, adapter), tenant, shared)
            prefix.extend(context)
            return prefix

    def clear(self) -> None:
        """Forget everything (what is in use stays with those who use it)."""
        with self._lock:
            for _, adapter in list(self._tops):
                self.forget(adapter)

    def forget(self, adapter: object) -> None:
        """Forget what was read with an adapter (what is in use stays with those who use it)."""
        with self._lock:
            for top in [top for top in self._tops if top[1] is adapter]:
                for node in _below(self._tops.pop(top)):
                    self._count(node, -1)
                    node.known = False
            self.version += 1

    def resize(self, budget: int) -> None:
        """Have so many bytes from now on."""
        self.budget = budget
        self.trim()

    def lend(self, nbytes: int) -> None:
        """Do with so many bytes less than the budget until the next call."""
        self.lent = nbytes
        self.trim()

    def trim(self) -> None:
        """Come back within the budget, and some more, so that the next one need not."""
        budget = self.budget - self.lent
        if self.spare > budget:
            self.shrink(budget - budget // 10)

    def shrink(self, budget: int) -> None:
        """Let go of what was used least recently until no more than ``budget`` bytes are left that nobody uses."""
        with self._lock:
            if self.spare <= budget:
                return
            things = [(node.seen, True, node) for node in self._nodes() if node.page.has_all()]
            things += [(node.used, False, node) for node in self._nodes()]
            things.sort(key=lambda thing: thing[:2])
            again = True
            while again and self.spare > budget:  # a node may go once its children have gone
                again = False
                for _, sliding, node in things:
                    if self.spare <= budget:
                        return
                    again |= self._forget_sliding(node) if sliding else self._forget(node)

    def _forget_sliding(self, node: _Node) -> bool:
        if node.page is node.lighter or not node.known:
            return False
        self._count(node, -1)
        node.page = node.lighter
        self._count(node, 1)
        return True

    def _forget(self, node: _Node) -> bool:
        if node.children or node.children.tenants or node.holders or not node.known:
            return False
        node.siblings.take(node.tokens)
        node.siblings.settle()
        self._count(node, -1)
        node.known = False
        return True

    def _count(self, node: _Node, sign: int) -> None:
        """Add a node's memory to the sums, or take it off before it changes."""
        self.nbytes += sign * node.page.nbytes
        self.spare += sign * node.spare

    def _nodes(self) -> Iterator[_Node]:
        for top in self._tops.values():
            yield from _below(top)

    def _top(self, top: Top) -> _Children:
        found = self._tops.get(top)
        return _Children((self._tops, top, None)) if found is None else found

    def _find(self, context: Sequence[int], top: Top, tenant: str, shared: int) -> list[tuple[_Node, int]]:
        """The nodes along ``context`` and how many tokens of each agree with it; only the last may agree in part.

        The first ``shared`` pages are those that all may find.
        """
        path: list[tuple[_Node, int]] = []
        children, position = self._top(top), 0
        while position < len(context):
            children = children.line(tenant) if len(path) == shared else children
            rest = tuple(context[position : position + self.page])
            node, count = children.get(rest), len(rest)
            if node is None and len(path) < shared:
                break
            if node is None:
                node, count = children.closest(rest)
            if node is None or not count:
                break
            path.append((node, count))
            if count < self.page:
                break
            position += count
            children = node.children
        return path


class Prefix:
    """What one request has read, and its hold on the tree: what it uses is not let go. `close` ends it."""

    def __init__(self, store: PrefixStore, cache: Paged, top: Top, tenant: str, shared: int):
        self._store, self.cache, self._top = store, cache, top
        self._tenant, self._shared = tenant, shared // store.page
        self._held: list[_Node] = []
        self._asked, self._hit = (-1, 0), False

    def extend(self, context: Sequence[int]) -> int:
        """Take over what others have read of ``context`` beyond this cache's end; how many tokens it is longer now."""
        store, cache = self._store, self.cache
        with store._lock:
            if self._asked == (store.version, len(context)):
                return 0  # nothing new is known
            self._asked = (store.version, len(context))
            path = store._find(context, self._top, self._tenant, self._shared)
            while path and not self._usable(path):
                path.pop()
            known = sum(count for _, count in path)
            gain = known - cache.length
            if gain <= 0:
                return 0
            now = next(store._clock)
            pages = []
            first = known - min(known, cache.form.config.sliding_window - 1)
            for index, (node, count) in enumerate(path):
                node.used = now
                page = node.page if count == node.page.count else node.page.beginning(count)
                if index >= first // store.page:
                    node.seen = now
                elif page.has_all():
                    page = page.without_sliding()
                pages.append(page)
            cache.pages = pages
            self._hold([node for node, _ in path])
            store.hits += not self._hit
            store.hit_tokens += gain
            self._hit = True
            return gain

    def _usable(self, path: list[tuple[_Node, int]]) -> bool:
        """Whether all that a token behind this path sees is still there."""
        known = sum(count for _, count in path)
        first = known - min(known, self.cache.form.config.sliding_window - 1)
        return all(node.page.has_all() for node, _ in path[first // self._store.page :])

    def keep(self, context: Sequence[int]) -> None:
        """Remember this cache, which has read ``context`` up to its length."""
        store, cache = self._store, self.cache
        with store._lock:
            now = next(store._clock)
            children, path = store._top(self._top), []
            for index, page in enumerate(cache.pages):
                if index < self._shared and page.count < store.page:
                    break  # nobody else may see where it ends
                children = children.line(self._tenant) if index == self._shared else children
                tokens = tuple(context[index * store.page : index * store.page + page.count])
                node = children.get(tokens)
                if node is None:
                    # A shorter end that this page goes on from becomes this page.
                    shorter = children.shorter(tokens)
                    node = _Node(tokens, page, page, children, _Children()) if shorter is None else (
                        children.take(shorter))
                    if shorter is not None:
                        store._count(node, -1)
                    node.tokens, node.page, node.lighter = tokens, page, page.without_sliding()
                    children.add(node)
                    children.settle()
                    store._count(node, 1)
                    store.version += 1
                    node.seen = now
                elif page.has_all():
                    if not node.page.has_all():
                        store._count(node, -1)
                        node.page, node.lighter = page, page.without_sliding()
                        store._count(node, 1)
                        store.version += 1
                    node.seen = now
                node.used = now
                path.append(node)
                children = node.children
            self._hold(path)
            store.trim()

    def close(self) -> None:
        """Give up the hold."""
        with self._store._lock:
            self._hold([])
            self._store.trim()

    def _hold(self, nodes: list[_Node]) -> None:
        for node, more in [*((node, 1) for node in nodes), *((node, -1) for node in self._held)]:
            before = node.spare
            node.holders += more
            if node.known:
                self._store.spare += node.spare - before
        self._held = nodes


def _below(top: _Children) -> Iterator[_Node]:
    """All nodes of a tree."""
    waiting = [top]
    while waiting:
        children = waiting.pop()
        waiting += children.tenants.values()
        waiting += (node.children for node in children.values())
        yield from children.values()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two contexts have in common at their beginning."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
