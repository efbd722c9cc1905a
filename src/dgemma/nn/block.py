"""One transformer block: attention, a dense MLP and the experts beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dgemma.config import LayerConfig, ModelConfig
from dgemma.kernels import expert_mlp, norm_rotate, rms_norm
from dgemma.nn.layers import GatedMLP, Linear, Packable, RMSNorm

# Queries [B, T, Hq, d], keys and values of this pass [B, Hkv, T, d] -> what they see, in sum [B, T, Hq · d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values and a softmax scale of 1."""

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        hidden, self.head_dim, self.eps = config.hidden_size, layer.head_dim, config.rms_norm_eps
        kv_width = layer.num_key_value_heads * layer.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * layer.head_dim)
        self.k_proj = Linear(hidden, kv_width)
        self.v_proj = Linear(hidden, kv_width) if layer.has_v_proj else None
        self.o_proj = Linear(config.num_attention_heads * layer.head_dim, hidden)
        self.q_norm = RMSNorm(layer.head_dim, self.eps)
        self.k_norm = RMSNorm(layer.head_dim, self.eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [B, T, D] -> [B, T, D]; ``attend`` knows the cached keys and values, and who sees which."""
        split = (*x.shape[:2], -1, self.head_dim)
        query = norm_rotate(self.q_proj(x).view(split), self.q_norm.weight, self.eps, rope)
        raw_key = self.k_proj(x).view(split)
        key = norm_rotate(raw_key, self.k_norm.weight, self.eps, rope)
        # Full layers have no V projection: the value is the key before its norm and rotation.
        raw_value = raw_key if self.v_proj is None else self.v_proj(x).view(split)
        value = rms_norm(raw_value, None, self.eps)
        return self.o_proj(attend(query, key.transpose(1, 2), value.transpose(1, 2)))


class Router(nn.Module):
    """Chooses each token's experts from the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.eps = config.top_k_experts, config.rms_norm_eps
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> weights [N, K] (float32) and expert indices [N, K]."""
        scaled = rms_norm(x, None, self.eps) * self.scale * x.shape[-1] ** -0.5
        weights, experts = self.proj(scaled).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Experts(Packable):
    """The experts' weights, gate and up fused: gate_up_proj [E, 2I, D], down_proj [E, D, I].

    ``adapter``, if there is one, computes with what it adds to them (`dgemma.nn.adapters`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, inner, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.adapter(x, self.gate_up_proj, self.down_proj, weights, experts)
        return expert_mlp(x, self.gate_up_proj, self.down_proj, weights, experts)


class Block(nn.Module):
    """Attention, then the dense MLP and the experts in parallel; every branch normed before and after."""

    layer_scalar: Tensor
    encoder_layer_scalar: Tensor

    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(hidden, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        # The only weights that differ between the two passes.
        self.register_buffer("layer_scalar", torch.ones(1))
        self.register_buffer("encoder_layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, encoding: bool) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, attend), residual=x)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        flat = x.flatten(0, 1)
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).view_as(x)
        both = self.post_feedforward_layernorm_2(mixed, residual=dense)
        x = self.post_feedforward_layernorm(both, residual=x)
        return x * (self.encoder_layer_scalar if encoding else self.layer_scalar)
