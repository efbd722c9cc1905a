"""What training takes of a device: weights and what goes with those that are trained, and the widest moment of a step.

Works on a model's shape, on how its weights are held and on how it is trained (`TrainingRun`); makes no tensor with
memory behind it. What one step holds beside the weights is counted in `activations`. Knows nothing of recipes, data
and printing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dgemma.config import ModelConfig
from dgemma.errors import DgemmaError
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.kernels.attention import fast_bf16
from dgemma.memory.activations import Step, widest
from dgemma.memory.machine import program_bytes
from dgemma.memory.vision import tower_kept_bytes, tower_working_bytes
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import AdapterConfig, adaptable
from dgemma.nn.layers import multiplies
from dgemma.nn.vision import CPU_ROWS, MOST_PATCHES
from dgemma.weights.load import DTYPES, Shape, empty_network, empty_vision, tensor_shapes

OPTIMIZERS = ("adamw", "muon")
_NEWTON_SCHULZ = 18  # bytes a number: updates, their copy in one batch, three matrices in bf16, the directions
_CUDA_RUNTIME = 700_000_000  # of the GPU's memory: a context and cuBLAS' workspace
_SLACK = 0.05  # of what comes and goes: what the allocator holds beyond what it was asked for


@dataclass(frozen=True)
class TrainingRun:
    """What is trained, and how. ``weights`` are ggml's or safetensors' types by our names of the tensors.

    ``adapter`` None trains everything. ``context`` and ``micro_batch`` are those of the largest micro-batch,
    ``passes`` and ``causal_canvas`` say what the objective does with it. ``autocast`` is bf16 products over float32
    weights. ``ranks`` processes share what FSDP2 shards. ``patches`` are those of the pictures in the largest
    micro-batch, and ``tower`` says whether the tower learns, too. Raises DgemmaError for what cannot be.
    """

    config: ModelConfig
    weights: Mapping[str, str]
    adapter: AdapterConfig | None
    context: int
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = True
    passes: int = 1
    causal_canvas: bool = True
    optimizer: str = "adamw"
    ema: bool = False
    autocast: bool = False
    device: str = "cpu"
    ranks: int = 1
    patches: int = 0
    tower: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "micro_batch", "accumulation", "ranks"):
            if (value := getattr(self, name)) < 1:
                raise DgemmaError(f"memory plan: {name} must be at least 1, got {value}")
        if self.optimizer not in OPTIMIZERS:
            raise DgemmaError(f"memory plan: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if unknown := sorted(set(self.weights.values()) - set(BLOCK_TYPES)):
            raise DgemmaError(f"memory plan: there is no weight type {unknown[0]!r}; there are "
                              f"{', '.join(BLOCK_TYPES)}")

    @property
    def packed(self) -> bool:
        return any(kind not in DTYPES for kind in self.weights.values())

    @property
    def on_gpu(self) -> bool:
        return not self.device.startswith("cpu")


@dataclass(frozen=True)
class Use:
    """One use of memory, in bytes."""

    name: str
    nbytes: int
    reason: str


def training_memory(run: TrainingRun) -> tuple[Use, ...]:
    """The memory of one process (of ``run.ranks``) of a training run, at its widest moment, by what it is for."""
    network = network_of(run.config, run.patches > 0)
    shapes = tensor_shapes(network)
    held = {name: BLOCK_TYPES[run.weights[name]].tensor_bytes(shape) for name, shape in shapes.items()}
    low_rank = {} if run.adapter is None else _adapter_shapes(network, run.adapter)
    trained = ({name: tuple(parameter.shape) for name, parameter in network.named_parameters()
                if run.tower or not name.startswith("vision.")} if run.adapter is None else low_rank)
    numbers = _count(trained.values())
    uses = _weights(run, shapes, held)
    if run.adapter is None:
        narrow = _count(shape for name, shape in trained.items() if run.weights[name] != "F32")
        gradients = sum(held[name] for name in trained)
        if narrow:
            uses.append(Use("masters", 4 * narrow // run.ranks, "float32 of what is trained and held in fewer bits"))
    else:
        gradients = 4 * numbers
        uses.append(Use("adapters", 4 * numbers // run.ranks, f"{numbers / 1e6:.1f}M numbers, float32"))
    matrices = [shape for name, shape in trained.items() if multiplies(name, shape)]
    moments = 8 * numbers - (4 * _count(matrices) if run.optimizer == "muon" else 0)
    uses.append(Use("optimizer state", moments // run.ranks, "AdamW: two float32 moments" if run.optimizer == "adamw"
                    else "Muon: one float32 moment of matrices, AdamW: two of the rest"))
    if run.ema:
        uses.append(Use("EMA", 4 * numbers // run.ranks, "float32 of what is trained"))
    first = 0 if run.adapter is not None else held["embed_tokens.weight"] // run.ranks
    if run.accumulation > 1:  # the earlier micro-batches' sums are there from the start, always in float32
        first = 4 * numbers // run.ranks
        if run.adapter is None:
            gradients = 4 * numbers + sum(held[name] for name in trained if run.weights[name] != "F32")
    gradients //= run.ranks
    work = 0
    if run.adapter is None:  # by then all are the masters', in float32
        work += 4 * numbers // run.ranks - gradients
    if run.optimizer == "muon":
        work += _NEWTON_SCHULZ * _largest_group(matrices) // run.ranks
    elif run.on_gpu:  # AdamW takes the root of all second moments at once there
        work += 4 * numbers // run.ranks
    most = widest(_step(run, low_rank), gradients, first, work)
    inside = "inputs of blocks" if run.checkpointing else "all that the backward pass needs"
    runtime = _CUDA_RUNTIME if run.on_gpu else program_bytes(run.config.vocab_size, training=True)
    slack = _SLACK * (most.kept + most.cache + most.working)
    return (
        *uses,
        Use("gradients", most.gradients, "of what is trained" if most.gradients == gradients else
            f"of {gradients / 1e9:.2f} GB, at the widest moment: the others come as activations go"),
        Use("activations", most.kept, f"{inside}, {run.micro_batch} x ({run.context} + {run.config.canvas_length})"),
        Use("keys and values", most.cache, "of the contexts, with their gradients"),
        *([Use("pictures", _pictures(run), f"the tower's pass over {run.patches:,} patches")] if run.patches else []),
        Use("working memory", most.working, f"at the widest moment: {most.name}"),
        Use("runtime", int(runtime + slack), "libraries, and what the allocator holds besides"),
    )


def network_of(config: ModelConfig, sees: bool) -> DiffusionTransformer:
    """A network without memory behind its tensors, with its tower if it is trained on pictures."""
    network = empty_network(config)
    if sees and config.vision is not None:
        network.attach_vision(empty_vision(config.vision, config.hidden_size))
    return network


def _pictures(run: TrainingRun) -> int:
    """What the tower's pass takes beside its weights."""
    vision, item = run.config.vision, 4 if run.weights["embed_tokens.weight"] == "F32" else 2
    if vision is None:
        return 0
    tile = MOST_PATCHES if run.on_gpu else CPU_ROWS
    working = tower_working_bytes(vision, item, min(run.patches, MOST_PATCHES), tile)
    return working + (tower_kept_bytes(vision, item, run.patches) if run.tower else 0)


def _weights(run: TrainingRun, shapes: Mapping[str, Shape], held: Mapping[str, int]) -> list[Use]:
    """The weights, and what is made of them for a pass."""
    plain = {name: size for name, size in held.items() if run.weights[name] in DTYPES}
    packed = sum(held.values()) - sum(plain.values())
    # Of several processes each has all of the tower.
    tower = sum(plain.pop(name) for name in list(plain) if name.startswith("vision.")) if run.ranks > 1 else 0
    types = sorted(set(run.weights.values()))
    reason = ", ".join(types) if len(types) > 1 else f"all {types[0]}"
    everywhere = [name for name, size in (("packed ones", packed), ("the tower", tower)) if size and run.ranks > 1]
    uses = [Use("weights", packed + tower + sum(plain.values()) // run.ranks,
                reason + (f"; {' and '.join(everywhere)} whole on every device" if everywhere else ""))]
    if run.ranks > 1:
        blocks = Counter[str]()
        for name, size in plain.items():
            blocks[".".join(name.split(".")[:2]) if name.startswith("layers.") else ""] += size
        gathered = blocks.pop("", 0) + max(blocks.values(), default=0)
        uses.append(Use("gathered weights", gathered, "the embedding's group and one block, whole for their pass"))
    if run.autocast:
        cast = _count(shape for name, shape in shapes.items() if len(shape) == 2 and multiplies(name, shape))
        uses.append(Use("autocast's copies", 2 * cast, "bf16 of every matrix, until the pass is over"))
    return uses


def _step(run: TrainingRun, low_rank: Mapping[str, Shape]) -> Step:
    wide = run.packed or run.weights["embed_tokens.weight"] == "F32"
    stream = 4 if wide else 2
    product = 2 if run.autocast else stream
    narrow = (run.packed or product == 2) and (run.on_gpu or fast_bf16())
    ranks = None if run.adapter is None else {name.removesuffix(".a"): shape[-2] for name, shape in low_rank.items()
                                              if name.endswith(".a") and not name.startswith("vision.")}
    return Step(run.config, run.context, run.micro_batch, run.passes, run.causal_canvas, run.checkpointing, stream,
                product, 2 if narrow else 4, 2 if run.packed else stream, ranks,
                run.adapter is not None and run.adapter.dora, run.packed, run.on_gpu)


def _adapter_shapes(network: DiffusionTransformer, adapter: AdapterConfig) -> dict[str, Shape]:
    """The shapes of an adapter's parameters, as `nn.adapters.LowRank` makes them."""
    places = adaptable(network)
    found: dict[str, Shape] = {}
    for name in adapter.names(places):
        module, attribute = places[name]
        *stack, outputs, inputs = getattr(module, attribute).shape
        rank = adapter.rank_of(name)
        found |= {f"{name}.a": (*stack, rank, inputs), f"{name}.b": (*stack, outputs, rank)}
        if adapter.dora:
            found[f"{name}.magnitude"] = (*stack, outputs)
    return found


def _count(shapes: Iterable[Shape]) -> int:
    """The numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes))


def _largest_group(matrices: Iterable[Shape]) -> int:
    """The numbers of all matrices of one shape, which Muon works on together."""
    groups = Counter[Shape]()
    for shape in matrices:
        groups[shape[-2:]] += math.prod(shape)
    return max(groups.values(), default=0)
