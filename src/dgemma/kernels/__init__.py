"""The arithmetic that decides the speed, behind plain functions: attention and the mixture of experts.

Plain torch; knows nothing of the model.
"""

from dgemma.kernels.attention import grouped_attention
from dgemma.kernels.experts import expert_mlp

__all__ = ["expert_mlp", "grouped_attention"]
