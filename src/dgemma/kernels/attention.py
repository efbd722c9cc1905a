"""Grouped-query attention over an optional mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention with scale 1.0, each key-value head shared by a group of query heads.

    query [B, T, Hq, d]; key and value [B, Hkv, S, d]; visible is a boolean mask [B or 1, T or 1, S] (True: may be
    seen), None when everything may. Returns [B, T, Hq * d].

    The group is folded into the query rows, so keys and values are never repeated in memory.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.view(batch, length, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, group * length, dim)
    mask = None
    if visible is not None:
        mask = visible.unsqueeze(1)  # one mask for every head
        if mask.shape[2] != 1 and group > 1:
            mask = mask.repeat(1, 1, group, 1)
        mask = mask.expand(-1, -1, group * length, -1)
    if torch.is_grad_enabled() and query.requires_grad and query.device.type == "cpu":
        # Training on a CPU: the fused kernel's backward is several times slower than two plain products.
        scores = folded @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1) @ value
    else:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=1.0)
    out = out.view(batch, kv_heads, group, length, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * dim)
