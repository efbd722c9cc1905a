"""The vision tower: patches of pictures in, soft tokens for the text network out.

Read `Vision` first, at the end. Pictures of any sizes go through together, their patches one after the other without
padding, and a block takes them a tile at a time, so that no more is there at once than has to be. Reference:
`transformers`, models/gemma4 (`Gemma4VisionModel`, the multimodal embedder). Knows nothing of files or of what a
picture is made from.
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
CPU_ROWS = 1024  # patches in a tile on a CPU: fewer are slower, more need more for an MLP, four times as wide


@dataclass(frozen=True)
class Tile:
    """Patches that go through a block together, which they see, and how many pictures both are of."""

    rows: slice
    seen: slice
    pictures: int


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

    def tiles(self, most: int) -> Iterator[Tile]:
        """The patches in order, at most ``most`` at a time: equal parts of a picture, or several of one size."""
        start = 0
        for count, same in groupby(self.counts):
            left = len(list(same))
            together = max(1, most // count)  # pictures
            while left:
                pictures = min(together, left)
                seen = slice(start, start + pictures * count)
                step = math.ceil(pictures * count / math.ceil(pictures * count / most))
                for first in range(seen.start, seen.stop, step):
                    yield Tile(slice(first, min(first + step, seen.stop)), seen, pictures)
                start, left = seen.stop, left - pictures


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

    def remember(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """x [N, D] -> keys and values [N, Hkv, d]."""
        return (_rotate(self.k_norm(self._heads(self.k_proj(x))), rope),
                rms_norm(self._heads(self.v_proj(x)), None, self.eps))

    def forward(self, x: Tensor, rope: Rope, key: Tensor, value: Tensor, pictures: int) -> Tensor:
        """x [N, D] of so many pictures, and the keys and values of all that they see -> [N, D]."""
        query = _rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        # Each picture's own: [pictures, H, n, d].
        query, key, value = (part.unflatten(0, (pictures, -1)).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=1.0, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2).flatten(0, 1))

    def _heads(self, x: Tensor) -> Tensor:
        """[N, H · d] -> [N, H, d]."""
        return x.unflatten(1, (-1, self.head_dim))


class VisionMLP(nn.Module):
    """down(gelu(gate(x)) · up(x)), gelu in its tanh form."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Projection(hidden, inner, config.use_clipped_linears)
        self.up_proj = Projection(hidden, inner, config.use_clipped_linears)
        self.down_proj = Projection(inner, hidden, config.use_clipped_linears)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D]."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class VisionBlock(nn.Module):
    """Attention, then the MLP; both normed before and after. Only keys and values are there of all patches at once."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, rope: Rope, tiles: Sequence[Tile]) -> Tensor:
        """x [N, D] -> [N, D]."""
        pairs = [self.self_attn.remember(self.input_layernorm(x[tile.rows]), _of(rope, tile.rows)) for tile in tiles]
        key, value = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        del pairs
        return torch.cat([self._tile(x[tile.rows], _of(rope, tile.rows), key[tile.seen], value[tile.seen],
                                     tile.pictures) for tile in tiles])

    def _tile(self, x: Tensor, rope: Rope, key: Tensor, value: Tensor, pictures: int) -> Tensor:
        """x [n, D] -> [n, D]."""
        seen = self.self_attn(self.input_layernorm(x), rope, key, value, pictures)
        x = self.post_attention_layernorm(seen, residual=x)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)), residual=x)


class VisionEncoder(nn.Module):
    """All blocks."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, positions: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """x [N, D], positions [N, 2] -> [N, D]; no norm at the end."""
        rope = axial_rope(positions, self.head_dim, self.theta, x.dtype)
        for block in self.layers:
            x = block(x, rope, tiles)
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
        tiles = list(layout.tiles(CPU_ROWS if patches.device.type == "cpu" else MOST_PATCHES))
        x = torch.cat([self.patch_embedder(patches[tile.rows], positions[tile.rows]) for tile in tiles])
        x = self.encoder(x, positions, tiles)
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


def _of(rope: Rope, rows: slice) -> Rope:
    return rope[0][rows], rope[1][rows]


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
