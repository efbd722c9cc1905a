"""The DiffusionGemma text network: the same blocks run as a causal encoder and as a bidirectional decoder.

Start here to read the model: `encode` fills a cache, `denoise` refines a canvas against it, `head` turns hidden
states into what the sampler needs. Reference: `transformers`, models/diffusion_gemma.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgemma.cache import Cache, KVCache, Pass, Spans
from dgemma.config import ModelConfig
from dgemma.kernels import PackedWeight, embedding, linear
from dgemma.nn.block import Block
from dgemma.nn.head import CanvasStats, canvas_stats, soft_cap
from dgemma.nn.layers import Embedding, RMSNorm, SelfConditioning, rope_tables
from dgemma.nn.vision import Vision


class DiffusionTransformer(nn.Module):
    """One set of weights, two passes."""

    def __init__(self, config: ModelConfig, cache_type: str | None = None):
        """``cache_type``: what caches keep keys and values in (`CACHE_TYPES`; None: the dtype they are computed in)."""
        super().__init__()
        self.config, self.cache_type = config, cache_type
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # What sees pictures, where it is trained with the network or adapted; else it stays beside it.
        self.vision: Vision | None = None
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

    def new_cache(self, batch_size: int = 1, spare: int = 0, **settings: Any) -> KVCache:
        """An empty cache for ``batch_size`` rows, of the network's ``cache_type``; the rest as `KVCache` has it."""
        return KVCache(self.config, batch_size, self.device, self.cache_type, spare, **settings)

    def attach_vision(self, vision: Vision) -> None:
        """Make a tower a part of the network, to be trained, adapted or saved with it."""
        self.vision = vision

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings times √D, [B, T, D]."""
        return embedding(token_ids, self.embed_tokens.weight) * self.embed_scale

    def embed_seen(self, token_ids: Tensor, seen: Sequence[tuple[int, int, Tensor]]) -> Tensor:
        """`embed`, with pictures' soft tokens [n, D] in the place of ids, each from a row's column on."""
        x = self.embed(token_ids)
        for row, start, soft in seen:
            x[row, start : start + len(soft)] = soft.to(x)
        return x

    def encode(self, inputs: Tensor, cache: Cache, lengths: Sequence[int] | None = None,
               spans: Spans | None = None, seen: Sequence[tuple[int, int, Tensor]] = ()) -> Tensor:
        """Causal pass over token ids [B, T], or what they are embedded as [B, T, D]; the cache takes them in.

        Returns hidden states [B, T, D]. ``lengths`` says how many leading tokens of each row are real; the rest is
        padding, which no token sees and the cache does not keep (its hidden states mean nothing). None: all of them.
        ``spans`` are the columns of each row that are pictures, whose soft tokens are in the embeddings or, with token
        ids, ``seen`` as in `embed_seen`. Raises ValueError when the batch sizes differ.
        """
        batch, width = inputs.shape[:2]
        if batch != cache.batch_size:
            raise ValueError(f"token_ids have {batch} rows, the cache {cache.batch_size}")
        inputs = self.embed_seen(inputs, seen) if seen else inputs
        outputs = []
        for columns, reading in cache.reading(width, lengths, spans):
            piece = inputs[:, columns]
            x = piece if piece.is_floating_point() else self.embed(piece)
            outputs.append(self._layers(x, reading, encoding=True))
            reading.finish()
        if not outputs:
            return self.embed(inputs)  # no tokens, no hidden states: [B, 0, D]
        return self.norm(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0])

    def denoise(self, canvas_ids: Tensor, cache: Cache, soft: Tensor | None = None) -> Tensor:
        """Bidirectional pass over a canvas [B, C], reading the cache and leaving it as it is -> hidden [B, C, D].

        ``soft`` [B, C, D] are the soft embeddings of the previous step; None means the first step (zeros).
        """
        batch, width = canvas_ids.shape
        if batch != cache.batch_size:
            raise ValueError(f"canvas_ids have {batch} rows, the cache {cache.batch_size}")
        x = self.embed(canvas_ids)
        x = self.self_conditioning(x, torch.zeros_like(x) if soft is None else soft.to(x.dtype))
        return self.norm(self._layers(x, cache.denoising(width), encoding=False))

    def _layers(self, x: Tensor, run: Pass, encoding: bool) -> Tensor:
        """Every layer over x [B, T, D]; checkpointed ones keep their input only and run again for gradients."""
        ropes = self._ropes(run.positions)
        for index, (block, layer) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            arguments = (x, ropes[layer.kind], partial(run.attend, index), encoding)
            again = index in run.checkpointed and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return x

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
