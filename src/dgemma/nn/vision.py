"""The vision tower: patches of pictures in, soft tokens for the text network out.

Read `Vision` first, at the end. Pictures of any sizes go through together, their patches one after the other without
padding: only attention and pooling ask where one ends and the next begins. Reference: `transformers`, models/gemma4
(`Gemma4VisionModel`, the multimodal embedder). Knows nothing of files or of what a picture is made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import VisionConfig
from dgemma.kernels import rms_norm
from dgemma.kernels.norm import Rope, rotate
from dgemma.nn.layers import Linear, RMSNorm

MOST_PATCHES = 10_080  # that go through together, unless one picture has more: those of 1,120 soft tokens
ROWS = 2048  # patches in an MLP at a time: what it needs in between is four times as wide as they are


@dataclass(frozen=True)
class Layout:
    """How pictures lie in N patches: ``shapes`` are their patches (rows, columns), in order."""

    shapes: tuple[tuple[int, int], ...]

    @property
    def counts(self) -> list[int]:
        return [rows * columns for rows, columns in self.shapes]

    def positions(self, device: torch.device) -> Tensor:
        """x (the column) and y (the row) of every patch [N, 2]."""
        return torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).flip(1)
                          for rows, columns in self.shapes]).to(device)

    def alike(self) -> Iterator[tuple[int, int]]:
        """Runs of neighbours with equally many patches: how many pictures, and the patches of each."""
        for count, same in groupby(self.counts):
            yield len(list(same)), count


class Projection(nn.Module):
    """A matrix product, its input and output held within the checkpoint's bounds if it has any (``clipped``)."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, inputs: int, outputs: int, clipped: bool):
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.clipped = clipped
        for name in ("input", "output") if clipped else ():
            self.register_buffer(f"{name}_min", torch.tensor(-math.inf))
            self.register_buffer(f"{name}_max", torch.tensor(math.inf))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, inputs] -> [N, outputs]."""
        if not self.clipped:
            return self.linear(x)
        return self.linear(x.clamp(self.input_min, self.input_max)).clamp(self.output_min, self.output_max)


class PatchEmbedder(nn.Module):
    """A patch's numbers projected, plus what its column and its row add."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding_table = nn.Parameter(torch.empty(2, config.position_embedding_size, config.hidden_size))

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [N, 3p²] between 0 and 1, positions [N, 2] -> [N, D]."""
        x = self.input_proj((2 * (patches - 0.5)).to(self.input_proj.weight.dtype))
        of_x, of_y = self.position_embedding_table
        return x + (F.embedding(positions[:, 0], of_x) + F.embedding(positions[:, 1], of_y)).to(x.dtype)


class VisionAttention(nn.Module):
    """Every patch of a picture sees all of them. Queries, keys and values are normed, the softmax scale is 1."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, self.head_dim, self.eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        width, kv_width = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.grouped = width != kv_width
        self.q_proj = Projection(hidden, width, config.use_clipped_linears)
        self.k_proj = Projection(hidden, kv_width, config.use_clipped_linears)
        self.v_proj = Projection(hidden, kv_width, config.use_clipped_linears)
        self.o_proj = Projection(width, hidden, config.use_clipped_linears)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)

    def forward(self, x: Tensor, rope: Rope, layout: Layout) -> Tensor:
        """x [N, D] -> [N, D]."""
        query = _rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        key = _rotate(self.k_norm(self._heads(self.k_proj(x))), rope)
        value = rms_norm(self._heads(self.v_proj(x)), None, self.eps)
        seen, start = [], 0
        for pictures, count in layout.alike():
            rows = slice(start, start := start + pictures * count)
            q, k, v = (part[rows].unflatten(0, (pictures, count)).transpose(1, 2) for part in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=self.grouped)  # [pictures, H, count, d]
            seen.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.o_proj(torch.cat(seen) if len(seen) > 1 else seen[0])

    def _heads(self, x: Tensor) -> Tensor:
        """[N, H · d] -> [N, H, d]."""
        return x.unflatten(1, (-1, self.head_dim))


class VisionMLP(nn.Module):
    """down(gelu(gate(x)) · up(x)), gelu in its tanh form, some patches at a time."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Projection(hidden, inner, config.use_clipped_linears)
        self.up_proj = Projection(hidden, inner, config.use_clipped_linears)
        self.down_proj = Projection(inner, hidden, config.use_clipped_linears)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D]."""
        return torch.cat([self.down_proj(F.gelu(self.gate_proj(some), approximate="tanh") * self.up_proj(some))
                          for some in x.split(ROWS)])


class VisionBlock(nn.Module):
    """Attention, then the MLP; both normed before and after."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rope: Rope, layout: Layout) -> Tensor:
        """x [N, D] -> [N, D]."""
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, layout), residual=x)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)), residual=x)


class VisionEncoder(nn.Module):
    """All blocks."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """x [N, D], positions [N, 2] -> [N, D]; no norm at the end."""
        rope = axial_rope(positions, self.head_dim, self.theta, x.dtype)
        for block in self.layers:
            x = block(x, rope, layout)
        return x


class VisionTower(nn.Module):
    """Patches in, one vector for every ``pooling_kernel_size``² of them out."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.pooling, self.standardize = config.pooling_kernel_size, config.standardize
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if self.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, patches: Tensor, layout: Layout) -> Tensor:
        """patches [N, 3p²] -> [n, D], float32: the magnitudes are beyond float16 until they are standardised."""
        positions = layout.positions(patches.device)
        x = self.encoder(self.patch_embedder(patches, positions), positions, layout)
        pooled = torch.cat([_pool(part, shape, self.pooling)
                            for part, shape in zip(x.split(layout.counts), layout.shapes, strict=True)])
        pooled = pooled * pooled.shape[-1] ** 0.5
        return (pooled - self.std_bias.float()) * self.std_scale.float() if self.standardize else pooled


class VisionEmbedder(nn.Module):
    """Takes what the tower sees to the text network's embeddings."""

    def __init__(self, config: VisionConfig, text_width: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embedding_projection = Linear(config.hidden_size, text_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, D], float32 -> [n, text width]."""
        return self.embedding_projection(rms_norm(x, None, self.eps).to(self.embedding_projection.weight.dtype))


class Vision(nn.Module):
    """The tower and the embedder behind it. Names of weights are those of a checkpoint within ``model.encoder``."""

    def __init__(self, config: VisionConfig, text_width: int):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.embed_vision = VisionEmbedder(config, text_width)

    @property
    def device(self) -> torch.device:
        return self.vision_tower.patch_embedder.position_embedding_table.device

    def forward(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Pictures as patches [rows, columns, 3p²] between 0 and 1 -> of each its soft tokens [n, text width].

        A patch's numbers are in the order pixel row, pixel column, colour. The soft tokens stand in the order of the
        rows, n = rows · columns / ``pooling_kernel_size``²; they take the place of embeddings and are not scaled by √D.
        Raises ValueError for a picture whose sides the tower cannot take.
        """
        for picture in pictures:
            self._check(picture)
        found: dict[int, Tensor] = {}
        # Pictures of equal size side by side go through attention together.
        order = sorted(range(len(pictures)), key=lambda place: pictures[place].shape[:2].numel())
        for places in _packs(order, [picture.shape[:2].numel() for picture in pictures]):
            layout = Layout(tuple((pictures[place].shape[0], pictures[place].shape[1]) for place in places))
            patches = torch.cat([pictures[place].to(self.device).flatten(0, 1) for place in places])
            soft = self.embed_vision(self.vision_tower(patches, layout))
            counts = [count // self.config.pooling_kernel_size**2 for count in layout.counts]
            found |= zip(places, soft.split(counts), strict=True)
        return [found[place] for place in range(len(pictures))]

    def _check(self, picture: Tensor) -> None:
        config, width = self.config, 3 * self.config.patch_size**2
        if picture.ndim != 3 or picture.shape[2] != width:
            raise ValueError(f"a picture is patches [rows, columns, {width}], got {list(picture.shape)}")
        for side in picture.shape[:2]:
            if not side or side % config.pooling_kernel_size or side > config.position_embedding_size:
                raise ValueError(f"a picture's sides are multiples of {config.pooling_kernel_size} patches and at most "
                                 f"{config.position_embedding_size}, got {list(picture.shape[:2])}")


def axial_rope(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin [N, 1, 2, d/2] for positions [N, 2]: a head's first half turns with x, the other with y.

    Frequencies are θ^(-2i / (d/2)), halves repeated (the half-split layout).
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [N, H, d], either half of every head by itself."""
    return rotate(x.unflatten(-1, (2, -1)), rope).flatten(-2)


def _pool(x: Tensor, shape: tuple[int, int], pooling: int) -> Tensor:
    """The patches [rows · columns, D] of a picture -> the mean of every square of them [n, D], float32."""
    rows, columns = (side // pooling for side in shape)
    return x.float().view(rows, pooling, columns, pooling, -1).mean(dim=(1, 3)).flatten(0, 1)


def _packs(order: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """Places of pictures that go through the tower together, in this order; ``counts`` are every picture's patches."""
    pack: list[int] = []
    total = 0
    for place in order:
        if pack and total + counts[place] > MOST_PATCHES:
            yield pack
            pack, total = [], 0
        pack.append(place)
        total += counts[place]
    if pack:
        yield pack
