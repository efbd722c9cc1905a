"""The arithmetic that decides the speed, behind plain functions of tensors and packed weights.

Plain torch, and C++ beside it on a CPU: for products with packed weights, and for attention, norms, rotary embedding
and the head's sums of plain tensors. Knows nothing of the model.
"""

from dgemma.kernels.attention import grouped_attention
from dgemma.kernels.experts import expert_mlp
from dgemma.kernels.norm import norm_rotate, rms_norm
from dgemma.kernels.packed import PackedWeight
from dgemma.kernels.products import Weight, embedding, linear, mix_rows

__all__ = ["PackedWeight", "Weight", "embedding", "expert_mlp", "grouped_attention", "linear", "mix_rows",
           "norm_rotate", "rms_norm"]
