"""The DiffusionGemma text network: the same blocks run as a causal encoder and as a bidirectional decoder.

Start here to read the model: `encode` fills a cache, `denoise` refines a canvas against it, `head` turns hidden
states into what the sampler needs. Reference: `transformers`, models/diffusion_gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.kernels import PackedWeight, embedding, grouped_attention, linear
from dgemma.kernels.attention import LAST, Visible
from dgemma.nn.block import Block
from dgemma.nn.cache import KVCache
from dgemma.nn.head import CanvasStats, canvas_stats, soft_cap
from dgemma.nn.layers import RMSNorm, SelfConditioning, rope_tables
from dgemma.nn.rows import Page, Passes, RowCache

# The encoder reads long prompts in pieces, so that no mask or score matrix is quadratic in the prompt.
ENCODE_CHUNK = 1024


class DiffusionTransformer(nn.Module):
    """One set of weights, two passes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # What new caches keep keys and values in (`CACHE_TYPES`); None: the dtype they are computed in.
        self.cache_type: str | None = None
        # Activation checkpointing: with gradients, only every block's input is kept, the rest is made again. A set of
        # layers: in these only.
        self.checkpointing: bool | frozenset[int] = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The first layer of each kind: its geometry gives that kind's rotary tables.
        self._kinds = {layer.kind: layer for layer in reversed(config.layers)}
        # The reference keeps √D in the weights' dtype, and bf16 rounds it.
        self._scales = {dtype: torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()
                        for dtype in (torch.float32, torch.bfloat16, torch.float16)}

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def new_cache(self, batch_size: int = 1, spare: int = 0) -> KVCache:
        """An empty cache for ``batch_size`` rows, of the network's ``cache_type``; ``spare`` as there."""
        return KVCache(self.config, batch_size, self.device, self.cache_type, spare)

    def new_row(self, pages: Iterable[Page] = ()) -> RowCache:
        """The cache of one request for `encode_rows` and `denoise_rows`; it may begin with pages read before."""
        return RowCache(self.config, self.cache_type, pages)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings times √D, [B, T, D]."""
        return embedding(token_ids, self.embed_tokens.weight) * self.embed_scale

    def encode(self, token_ids: Tensor, cache: KVCache, lengths: Sequence[int] | None = None) -> Tensor:
        """Causal pass over token ids [B, T]; appends them to the cache and returns hidden states [B, T, D].

        ``lengths`` says how many leading tokens of each row are real; the rest is padding, which no token sees and
        the cache does not keep (its hidden states mean nothing). None: all of them.
        Raises ValueError when the batch sizes differ.
        """
        batch, width = token_ids.shape
        if batch != cache.batch_size:
            raise ValueError(f"token_ids have {batch} rows, the cache {cache.batch_size}")
        counts = [width] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or any(not 0 <= n <= width for n in counts):
            raise ValueError(f"lengths must be {batch} numbers between 0 and {width}, got {counts}")
        outputs = []
        for start in range(0, width, ENCODE_CHUNK):
            piece = token_ids[:, start : start + ENCODE_CHUNK]
            used = [min(max(n - start, 0), piece.shape[1]) for n in counts]
            outputs.append(self._encode_piece(piece, cache, used))
        if not outputs:
            return self.embed(token_ids)  # no tokens, no hidden states: [B, 0, D]
        return self.norm(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0])

    def _encode_piece(self, token_ids: Tensor, cache: KVCache, counts: list[int]) -> Tensor:
        plan, positions = cache.begin(counts, token_ids.shape[1])
        visible = {kind: self._causal(kind, positions, seen) for kind, seen in plan.positions.items()}

        before = cache.snapshot() if self.checkpointing else cache
        read: set[int] = set()

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # A checkpointed block runs again for its gradient: on the cache as it was, and leaving it as it is by now.
            into = before.snapshot() if layer in read else cache
            read.add(layer)
            blocks = into.extend(plan, layer, key, value)
            return grouped_attention(query, blocks, visible[self.config.layers[layer].kind])

        x = self._blocks(self.embed(token_ids), positions, attend, encoding=True)
        cache.finish(plan)
        return x

    def encode_rows(self, rows: Sequence[tuple[Sequence[int], RowCache]]) -> list[bool]:
        """Causal pass over the tokens of several requests at once, appended to each one's own cache.

        Returns for each whether its hidden states are finite; a cache whose are not stays as it was.
        """
        passes = Passes([cache for _, cache in rows], [len(ids) for ids, _ in rows], self.device, causal=True)
        token_ids = torch.tensor([[token for ids, _ in rows for token in ids]], device=self.device)
        hidden = self._blocks(self.embed(token_ids), passes.positions, passes.attend, encoding=True)
        return passes.finish(hidden[0].isfinite().all(-1))

    def denoise(self, canvas_ids: Tensor, cache: KVCache, soft: Tensor | None = None) -> Tensor:
        """Bidirectional pass over a canvas [B, C], reading the cache and leaving it as it is -> hidden [B, C, D].

        ``soft`` [B, C, D] are the soft embeddings of the previous step; None means the first step (zeros).
        """
        batch, width = canvas_ids.shape
        if batch != cache.batch_size:
            raise ValueError(f"canvas_ids have {batch} rows, the cache {cache.batch_size}")
        x = self.embed(canvas_ids)
        x = self.self_conditioning(x, torch.zeros_like(x) if soft is None else soft.to(x.dtype))
        if self.checkpointing:
            cache = cache.snapshot()  # a block that runs again later must see what it saw
        lengths = torch.tensor(cache.lengths, device=self.device).unsqueeze(1)
        visible = {kind: self._canvas_rectangle(cache, kind, lengths, width) for kind in cache.positions}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            blocks = cache.with_canvas(layer, key, value)
            return grouped_attention(query, blocks, visible[self.config.layers[layer].kind])

        positions = lengths + torch.arange(width, device=self.device)
        return self.norm(self._blocks(x, positions, attend, encoding=False))

    def denoise_rows(self, canvas_ids: Tensor, caches: Sequence[RowCache], soft: Tensor) -> Tensor:
        """`denoise` of several requests' canvases [B, C] at once, each reading its own cache -> hidden [B, C, D]."""
        batch, width = canvas_ids.shape
        passes = Passes(caches, [width] * batch, self.device, causal=False)
        x = self.embed(canvas_ids)
        x = self.self_conditioning(x, soft.to(x.dtype)).view(1, batch * width, -1)
        return self.norm(self._blocks(x, passes.positions, passes.attend, encoding=False)).view(batch, width, -1)

    def _blocks(self, x: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
                encoding: bool) -> Tensor:
        """Every layer over x [B, T, D] at ``positions`` [B, T]; ``attend`` is told the layer's index."""
        ropes = self._ropes(positions)
        for index, (block, layer) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            arguments = (x, ropes[layer.kind], partial(attend, index), encoding)
            chosen = self.checkpointing
            again = (chosen if isinstance(chosen, bool) else index in chosen) and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return x

    def _causal(self, kind: str, positions: Tensor, seen: Tensor) -> Visible:
        """What tokens at ``positions`` [B, T] see of the columns at ``seen`` [B, S + T]."""
        reach = self.config.sliding_window if kind == SLIDING else LAST
        padding = positions < 0  # sees everything: an empty softmax is NaN
        first = (positions - (reach - 1)).clamp(min=0).masked_fill(padding, -1)
        return Visible(first, positions.masked_fill(padding, LAST), seen)

    def _canvas_rectangle(self, cache: KVCache, kind: str, lengths: Tensor, width: int) -> Visible | None:
        """The canvas and the rectangle of context that every one of its tokens sees; None for all columns."""
        positions = cache.positions[kind]
        reach = max(cache.lengths) if kind == FULL else min(max(cache.lengths), self.config.sliding_window - 1)
        if len(set(cache.lengths)) == 1 and positions.shape[1] == reach:
            return None
        canvas = lengths + torch.arange(width, device=self.device)
        first = (lengths - reach).clamp(min=0)
        return Visible(first, torch.full_like(first, LAST), torch.cat([positions, canvas], dim=1))

    def head(self, hidden: Tensor, temperature: Tensor, noise: Tensor,
             sharpness: Tensor | None = None) -> CanvasStats:
        """What the sampler needs of hidden states [B, C, D], without ever holding [C, V]; see `canvas_stats`."""
        return canvas_stats(hidden, self.embed_tokens.weight, temperature, noise, self.config.final_logit_softcapping,
                            self.embed_scale, sharpness)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, C, D] -> soft-capped logits [B, C, V], float32; for tests and training, never the hot path."""
        return soft_cap(linear(hidden, self.embed_tokens.weight).float(), self.config.final_logit_softcapping)

    def soft_embeddings(self, logits: Tensor) -> Tensor:
        """Processed logits [B, C, V] -> the expected embeddings under their softmax, times √D, [B, C, D]."""
        weight = self.embed_tokens.weight
        if isinstance(weight, PackedWeight):
            weight = weight.dequantize()
        return (logits.softmax(-1, dtype=torch.float32).to(weight.dtype) @ weight) * self.embed_scale

    @property
    def embed_scale(self) -> float:
        return self._scales[self.dtype]

    def _ropes(self, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: rope_tables(positions.clamp(min=0), layer, self.dtype) for kind, layer in self._kinds.items()}
