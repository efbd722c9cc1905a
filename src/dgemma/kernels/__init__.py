"""The arithmetic that decides the speed, behind plain functions: products with plain or packed weights, attention and
the mixture of experts.

Plain torch, and C++ beside it for packed weights on a CPU; knows nothing of the model.
"""

from dgemma.kernels.attention import grouped_attention
from dgemma.kernels.experts import expert_mlp
from dgemma.kernels.norm import norm_rotate, rms_norm
from dgemma.kernels.packed import PackedWeight
from dgemma.kernels.products import Weight, embedding, linear, mix_rows

__all__ = ["PackedWeight", "Weight", "embedding", "expert_mlp", "grouped_attention", "linear", "mix_rows",
           "norm_rotate", "rms_norm"]
