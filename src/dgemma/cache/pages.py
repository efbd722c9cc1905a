"""Many sequences in one forward: each has a table of pages, which any number of sequences can share.

A `Page` is memory for the keys and values of some tokens, at an address that never changes: what is read is written
where it stays, and whoever goes on from somebody else's tokens has the same pages in his table. `Paged` is what one
sequence has read. `PagedBatch` takes several of them through the network together (read, their tokens stand behind one
another in one row; denoised, they are a row each): a pass uses every weight once for all of them, and attention looks
at each by itself, or at small ones in one padded call. Nothing is reserved or copied when a sequence comes or goes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dgemma.cache import visibility
from dgemma.cache.store import NAMES, Block, check_cache_type, joined, stored
from dgemma.cache.visibility import Spans
from dgemma.config import SLIDING, ModelConfig
from dgemma.kernels import grouped_attention
from dgemma.kernels.attention import COLUMNS, Visible, attends_natively

PAGE = 256  # tokens of a page
# Queries times columns times heads of a sequence's attention below which several are attended to in one padded call.
SMALL = 1 << 19
_FILLING = threading.Lock()  # engines of several threads share pages


@dataclass(frozen=True)
class PageFormat:
    """What the pages of a network are like: ``size`` tokens each, kept in ``cache_type`` as in `KVCache`."""

    config: ModelConfig
    device: torch.device
    cache_type: str | None = None
    size: int = PAGE

    def __post_init__(self) -> None:
        check_cache_type(self.cache_type)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of layers that there are."""
        return frozenset(layer.kind for layer in self.config.layers)


class _Memory:
    """Keys and values [1, Hkv, size, d] of a page in all layers of one kind, in one piece; made for the first of them.

    The system gives memory of that size only where it is written to.
    """

    def __init__(self, form: PageFormat, kind: str):
        self._form, self._kind = form, kind
        self._all: Tensor | None = None  # [2 · all layers' Hkv, size, d]
        self.blocks: dict[int, Block] = {}
        self.token_bytes = 0  # of a token's keys and values, once there is a block

    def block(self, layer: int, like: Tensor) -> Block:
        """The block of a layer, for numbers as ``like``'s."""
        if not self.blocks:
            self._make(like)
        return self.blocks[layer]

    def _make(self, like: Tensor) -> Tensor:
        form = self._form
        width = like.shape[-1]  # one for all layers of a kind
        heads = {index: known.num_key_value_heads for index, known in enumerate(form.config.layers)
                 if known.kind == self._kind}
        with torch.inference_mode(False):  # it may be written to in any mode
            self._all = torch.empty(2 * sum(heads.values()), form.size, width, dtype=like.dtype, device=form.device)
            parts = self._all.split([count for n in heads.values() for count in (n, n)])
        self.token_bytes = self._all[:, 0].nbytes
        sides = iter(part.unsqueeze(0) for part in parts)
        self.blocks = {index: (next(sides), next(sides)) for index in heads}
        return self._all

    def beginning(self, count: int) -> _Memory:
        other = _Memory(self._form, self._kind)
        if self._all is not None:
            other._make(self._all)[:, :count] = self._all[:, :count]
        return other


@dataclass
class _Filled:
    """How many tokens of a page's memory are somebody's."""

    count: int


@dataclass(frozen=True, eq=False)
class Page:
    """The first ``count`` tokens of a page's memory, which are never written to again; what follows may be another's.

    ``memories`` has that of the sliding layers only as long as something can see it.
    """

    form: PageFormat
    count: int
    memories: Mapping[str, _Memory]
    filled: _Filled = field(repr=False)

    @classmethod
    def empty(cls, form: PageFormat) -> Page:
        return cls(form, 0, {kind: _Memory(form, kind) for kind in form.kinds}, _Filled(0))

    @cached_property
    def nbytes(self) -> int:
        """Memory of the tokens, in bytes; off the CPU that of a whole page, which is taken at once there."""
        tokens = self.count if self.form.device.type == "cpu" else self.form.size
        return tokens * sum(memory.token_bytes for memory in self.memories.values())

    def has_all(self) -> bool:
        """Whether the sliding layers' keys and values are there, too."""
        return len(self.memories) == len(self.form.kinds)

    def without_sliding(self) -> Page:
        """The same page, its sliding layers' memory let go (itself if there is none)."""
        if SLIDING not in self.memories:
            return self
        return Page(self.form, self.count, {kind: memory for kind, memory in self.memories.items() if kind != SLIDING},
                    self.filled)

    def beginning(self, count: int) -> Page:
        """The first ``count`` tokens, in memory of their own."""
        return Page(self.form, count, {kind: memory.beginning(count) for kind, memory in self.memories.items()},
                    _Filled(count))

    def longer(self, count: int) -> Page:
        """The page with memory for ``count`` tokens more: its own where nobody has gone on there yet."""
        with _FILLING:
            if self.filled.count == self.count:
                self.filled.count += count
                return Page(self.form, self.count + count, self.memories, self.filled)
        return self.beginning(self.count).longer(count)


class Paged:
    """What one sequence has read, as a table of pages: page i holds the tokens from i times the size on.

    Only the last one may be short. Full layers keep all tokens, sliding layers those that can still be seen.
    """

    def __init__(self, form: PageFormat, pages: Sequence[Page] = ()):
        self.form, self.pages = form, list(pages)

    @property
    def length(self) -> int:
        """The tokens read so far."""
        return self.form.size * (len(self.pages) - 1) + self.pages[-1].count if self.pages else 0

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes, shared pages included."""
        return sum(page.nbytes for page in self.pages)

    def reach(self, kind: str) -> int:
        """How many of the last tokens a canvas, or the next token, sees in layers of this kind."""
        return visibility.reach(self.form.config, kind, self.length)

    def with_room(self, count: int) -> list[Page]:
        """A table with ``count`` tokens more, yet to be written; the sequence stays as it is."""
        pages, size = list(self.pages), self.form.size
        if pages and pages[-1].count < size:
            more = min(count, size - pages[-1].count)
            pages[-1] = pages[-1].longer(more)
            count -= more
        for start in range(0, count, size):
            pages.append(Page.empty(self.form).longer(min(size, count - start)))
        return pages

    def take_over(self, pages: list[Page]) -> None:
        """Have this table from now on.

        What no later token can see of the sliding layers is let go with the pass after the one that brought it: until
        then whoever keeps these pages has them whole, and others can go on from any of their tokens.
        """
        first = self.length - self.reach(SLIDING)
        for index in range(first // self.form.size - 1, -1, -1):
            if not pages[index].has_all():
                break
            pages[index] = pages[index].without_sliding()
        self.pages = pages


_Columns = list[tuple[_Memory, int, int]]  # where some tokens are, in order: a memory, and its tokens [start, stop)


def columns_of(pages: Sequence[Page], kind: str, first: int) -> _Columns:
    """Where the tokens of a table from ``first`` on are, for layers of a kind."""
    if not pages:
        return []
    size = pages[0].form.size
    start, found = first % size, pages[first // size :]
    return [(page.memories[kind], 0 if index else start, page.count) for index, page in enumerate(found)]


def _blocks(columns: _Columns, layer: int) -> list[Block]:
    """A layer's keys and values of all these tokens."""
    blocks = []
    for memory, start, stop in columns:
        key, value = memory.blocks[layer]
        if stop - start < key.shape[2]:
            key, value = key[:, :, start:stop], value[:, :, start:stop]
        blocks.append((key, value))
    return blocks


class PagedBatch:
    """Several sequences as a cache (`dgemma.cache.Cache`).

    To be read they are one row, in which ``counts[i]`` tokens of each stand behind one another; to be denoised they
    are a row each. Sequences with so little to attend to (``small``) are attended to in one padded call. Without
    gradients.
    """

    def __init__(self, sequences: Sequence[Paged], counts: Sequence[int] | None = None, small: int = SMALL):
        self.sequences, self.counts, self.small = list(sequences), counts, small
        self._before = [sequence.pages for sequence in self.sequences]

    @property
    def batch_size(self) -> int:
        return len(self.sequences) if self.counts is None else 1

    def reading(self, width: int, lengths: Sequence[int] | None,
                spans: Spans | None) -> Iterator[tuple[slice, _Reading]]:
        """One causal pass over all tokens. Until it is finished the sequences are as they were."""
        if self.counts is None or lengths is not None or sum(self.counts) != width:
            raise ValueError(f"{self.counts} tokens are to be read, got {width}")
        yield slice(0, width), _Reading(self, self.counts, spans)

    def denoising(self, width: int) -> _Attention:
        """A pass over the canvases."""
        return _Attention(self.sequences, [width] * len(self.sequences), self.small)

    def undo(self, index: int) -> None:
        """Let a sequence have read nothing in this batch."""
        self.sequences[index].pages = self._before[index]


@dataclass(frozen=True)
class _Group:
    """Sequences whose attention is one call: their places, and per kind of layer what their queries see."""

    places: list[int]
    visible: dict[str, Visible | None]
    contexts: dict[str, list[_Columns]]  # what each has read, within reach
    widths: dict[str, int]  # columns of context, padding in front included


class _Attention:
    """A pass over ``counts[i]`` tokens of each sequence; the queries are one row of them all, or a row of each."""

    checkpointed: Collection[int] = ()  # there are no gradients

    def __init__(self, sequences: Sequence[Paged], counts: Sequence[int], small: int, causal: bool = False,
                 spans: Spans | None = None):
        self.sequences, self.counts, self._small, self._causal = sequences, counts, small, causal
        self.config, self.cache_type = sequences[0].form.config, sequences[0].form.cache_type
        device = sequences[0].form.device
        self.spans = [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]
        own = [torch.arange(sequence.length, sequence.length + count, device=device)
               for sequence, count in zip(sequences, counts, strict=True)]
        self.positions = torch.cat(own).unsqueeze(0) if causal else torch.stack(own)
        self._pictures = spans
        self._groups: list[_Group] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kind = self.config.layers[layer].kind
        groups = self._groups = self._groups or self._grouped(query, key)
        out = query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])
        for group in groups:
            if len(group.places) == 1:
                place = group.places[0]
                blocks = _runs(self._columns(place, kind, layer, key, value), query)
                found = grouped_attention(self._own(query, place, 1), blocks, group.visible[kind])
                self._own(out, place, 1)[:] = found
                continue
            whole = not self._causal and len(group.places) == len(self.sequences)
            sides = [side if whole else torch.cat([self._own(side, place, 2) for place in group.places])
                     for side in (key, value)]
            queries = query if whole else torch.cat([self._own(query, place, 1) for place in group.places])
            block = _stacked(sides, group.contexts[kind], layer, group.widths[kind])
            answers = grouped_attention(queries, [block], group.visible[kind])
            if whole:
                return answers
            for place, answer in zip(group.places, answers, strict=True):
                self._own(out, place, 1)[0] = answer
        return out

    def finish(self) -> None:
        """Nothing stays of a canvas."""

    def _own(self, tensor: Tensor, place: int, axis: int) -> Tensor:
        """What of a pass' tensor, with its tokens along ``axis``, is one sequence's: [1, …]."""
        return tensor.narrow(axis, self.spans[place].start, self.counts[place]) if self._causal else (
            tensor[place : place + 1])

    def _columns(self, place: int, kind: str, layer: int, key: Tensor, value: Tensor) -> list[Block]:
        """All columns that one sequence's queries can see, its own last."""
        sequence = self.sequences[place]
        columns = columns_of(sequence.pages, kind, sequence.length - sequence.reach(kind))
        return [*_blocks(columns, layer), (self._own(key, place, 2), self._own(value, place, 2))]

    def _grouped(self, query: Tensor, key: Tensor) -> list[_Group]:
        """Sequences with little to attend to, of one count, together; every other one by itself."""
        together: dict[int, list[int]] = {}
        groups = []
        for place, (sequence, count) in enumerate(zip(self.sequences, self.counts, strict=True)):
            little = count * (sequence.length + count) * query.shape[2] <= self._small
            if little and self.cache_type in (None, NAMES.get(key.dtype)):
                together.setdefault(count, []).append(place)
            else:
                groups.append(self._group([place]))
        return groups + [self._group(places) for places in together.values()]

    def _group(self, places: list[int]) -> _Group:
        lengths, count = [self.sequences[place].length for place in places], self.counts[places[0]]
        spans = [self._pictures_of(place) for place in places] if self._pictures else None
        visible: dict[str, Visible | None] = {}
        widths: dict[str, int] = {}
        contexts: dict[str, list[_Columns]] = {}
        for kind in self.sequences[0].form.kinds:
            reaches = [self.sequences[place].reach(kind) for place in places]
            widths[kind] = width = max(reaches)
            contexts[kind] = [columns_of(self.sequences[place].pages, kind, length - reach)
                              for place, length, reach in zip(places, lengths, reaches, strict=True)]
            context = visibility.behind(lengths, width, self.positions.device) - width
            if len(set(reaches)) > 1:
                empty = torch.arange(-width, 0, device=context.device) < -torch.tensor(
                    reaches, device=context.device).unsqueeze(1)
                context = context.masked_fill(empty, -1)
            if not self._causal:
                visible[kind] = visibility.canvas(self.config, kind, lengths, context, count)
                continue
            own = visibility.behind(lengths, count, context.device)
            visible[kind] = visibility.causal(self.config, kind, own, torch.cat([context, own], dim=1), spans)
        return _Group(places, visible, contexts, widths)

    def _pictures_of(self, place: int) -> Sequence[tuple[int, int]]:
        return (visibility.within(self.spans[place], self._pictures) or [[]])[0]


class _Reading(_Attention):
    """A causal pass: its keys and values are written to the pages they stay in."""

    def __init__(self, batch: PagedBatch, counts: Sequence[int], spans: Spans | None):
        super().__init__(batch.sequences, counts, batch.small, causal=True, spans=spans)
        self._tables = [sequence.with_room(count) for sequence, count in zip(self.sequences, counts, strict=True)]
        # Where each stretch of tokens goes: a page, its tokens, and the columns of the pass.
        self._places: list[tuple[Page, slice, slice]] = []
        for sequence, table, span in zip(self.sequences, self._tables, self.spans, strict=True):
            size, length = sequence.form.size, sequence.length
            for number in range(length // size, len(table)):
                page = table[number]
                skip = max(length - number * size, 0)
                start = span.start + number * size + skip - length
                self._places.append((page, slice(skip, page.count), slice(start, start + page.count - skip)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.is_grad_enabled() and key.requires_grad:
            raise ValueError("pages keep no gradients: train with network.new_cache()")
        kind = self.config.layers[layer].kind
        kept = stored(key, self.cache_type), stored(value, self.cache_type)
        for page, tokens, columns in self._places:
            for side, new in zip(page.memories[kind].block(layer, kept[0]), kept, strict=True):
                side[:, :, tokens] = new[:, :, columns]
        return super().attend(layer, query, *kept)

    def _columns(self, place: int, kind: str, layer: int, key: Tensor, value: Tensor) -> list[Block]:
        sequence = self.sequences[place]
        return _blocks(columns_of(self._tables[place], kind, sequence.length - sequence.reach(kind)), layer)

    def finish(self) -> None:
        """The tokens are part of the past of all sequences."""
        for sequence, table in zip(self.sequences, self._tables, strict=True):
            sequence.take_over(table)


def _stacked(own: Sequence[Tensor], contexts: Sequence[_Columns], layer: int, width: int) -> Block:
    """Contexts, padded in front to ``width`` columns, and the rows' own keys and values [n, Hkv, T, d]: one block."""
    rows, heads, count, dim = own[0].shape
    sides = [new.new_zeros(rows, heads, width + count, dim) for new in own]
    for side, new in zip(sides, own, strict=True):
        side[:, :, width:] = new
    for row, context in enumerate(contexts):
        end = width
        for memory, start, stop in reversed(context):
            begin = end - (stop - start)
            for side, known in zip(sides, memory.blocks[layer], strict=True):
                side[row, :, begin:end] = known[0, :, start:stop]
            end = begin
    return sides[0], sides[1]


def _runs(blocks: list[Block], query: Tensor) -> list[Block]:
    """The same columns in blocks as wide as attention's tiles, where it wants them so and their types allow it."""
    if attends_natively(query, blocks[0][0].dtype):
        return blocks
    runs: list[list[Block]] = []
    width = 0
    for block in blocks:
        columns = block[0].shape[2]
        if runs and width + columns <= COLUMNS and runs[-1][0][0].dtype == block[0].dtype:
            runs[-1].append(block)
            width += columns
        else:
            runs.append([block])
            width = columns
    return [joined(run) for run in runs]
