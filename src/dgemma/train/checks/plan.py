"""How much memory a training run needs, before anything is loaded: `dgemma train --plan`.

Works on a model's shape, on how its weights are held and on how it is trained; makes no tensor with memory behind it.
What one step holds beside the weights is counted in `activations`. Knows nothing of data, files of a run or printing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgemma.config import ModelConfig, load_model_config
from dgemma.errors import CheckpointError, DgemmaError, describe
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.container import is_gguf
from dgemma.gguf.keys import gguf_name
from dgemma.kernels.attention import fast_bf16
from dgemma.memory import machine_memory, program_bytes
from dgemma.nn.adapters import AdapterConfig, adaptable
from dgemma.train.checks.activations import Step, widest
from dgemma.train.objective import Objective
from dgemma.train.optim.optimizers import is_matrix
from dgemma.train.recipe import Recipe
from dgemma.weights import gguf_model
from dgemma.weights.load import (
    DTYPES,
    empty_network,
    match,
    network_shapes,
    read_headers,
    stored_dtype,
)
from dgemma.weights.quantize import MIXTURES, mixture_types

OPTIMIZERS = ("adamw", "muon")
_PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
_NEWTON_SCHULZ = 18  # bytes a number: updates, their copy in one batch, three matrices in bf16, the directions
_CUDA_RUNTIME = 700_000_000  # of the GPU's memory: a context and cuBLAS' workspace
_SLACK = 0.05  # of what comes and goes: what the allocator holds beyond what it was asked for


@dataclass(frozen=True)
class Setting:
    """What a plan is made for. ``weights`` are ggml's or safetensors' types by our names of the tensors.

    ``adapter`` None trains everything. ``context`` and ``micro_batch`` are those of the largest micro-batch,
    ``passes`` and ``causal_canvas`` say what the objective does with it. ``ranks`` processes share what FSDP2 shards.
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

    def __post_init__(self) -> None:
        for name in ("context", "micro_batch", "accumulation", "ranks"):
            if (value := getattr(self, name)) < 1:
                raise DgemmaError(f"memory plan: {name} must be at least 1, got {value}")
        if self.optimizer not in OPTIMIZERS:
            raise DgemmaError(f"memory plan: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")

    @property
    def packed(self) -> bool:
        return any(kind not in _PLAIN for kind in self.weights.values())


@dataclass(frozen=True)
class Line:
    """One use of memory, in bytes."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Advice:
    """A change, on top of those before it, and what the whole then takes."""

    change: str
    total: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one process (of ``run.ranks``) of a training run, at its widest moment."""

    run: Setting
    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        return sum(line.nbytes for line in self.lines)

    def text(self, available: int | None = None) -> str:
        """A small table in GB (10⁹ bytes); with what to change if ``available`` bytes are not enough."""
        width = max(len(line.name) for line in self.lines) + 2
        rows = [f"{line.name:<{width}}{line.nbytes / 1e9:8.2f} GB  {line.reason}" for line in self.lines]
        each = f"on each of {self.run.ranks} devices" if self.run.ranks > 1 else ""
        rows.append(f"{'total':<{width}}{self.total / 1e9:8.2f} GB  {each}".rstrip())
        if available is not None:
            fits = "it fits" if self.total <= available else "it does not fit"
            rows.append(f"{'available':<{width}}{available / 1e9:8.2f} GB  {fits}")
            advice = self.advice(available)
            if advice:
                rows.append("To make it fit, each on top of the one before:")
                rows += [f"  {step.change:<60}{step.total / 1e9:8.2f} GB" for step in advice]
                if advice[-1].total > available:
                    rows.append("  That is still not enough: a larger device, or more of them.")
        return "\n".join(rows)

    def advice(self, available: int) -> tuple[Advice, ...]:
        """What to change so that the run takes at most ``available`` bytes; nothing if it does.

        Cheap changes first; each comes on top of those before it, those that would gain nothing are left out.
        """
        found: list[Advice] = []
        best = self
        for change, alter in _CHANGES:
            if best.total <= available:
                break
            for changed in alter(best.run):
                plan = plan_of(changed)
                if plan.total < best.total:
                    best = plan
                    found.append(Advice(change(changed), plan.total))
                if best.total <= available:
                    break
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON's types."""
        run = {field.name: getattr(self.run, field.name) for field in dataclasses.fields(self.run)
               if field.name not in ("config", "weights", "adapter")}
        run["adapter"] = None if self.run.adapter is None else dataclasses.asdict(self.run.adapter)
        run["weights"] = sorted(set(self.run.weights.values()))
        return {"total": self.total, "lines": [dataclasses.asdict(line) for line in self.lines], "run": run}


def memory_plan(config: ModelConfig, *, weights: str | Mapping[str, str] = "BF16",
                adapter: AdapterConfig | None = None, objective: Objective | None = None,
                **settings: Any) -> MemoryPlan:
    """The memory that training a network of this shape takes.

    ``weights`` is a mixture of `weights.quantize` ("Q4_K_M", "BF16"), "F32", or the types of all tensors
    (`stored_types`); ``settings`` are the others of `Setting`, of which ``context`` must be there: it counts the tokens
    before the canvas of the longest example, ``micro_batch`` the examples at a time. ``autocast`` is bf16 products over
    float32 weights. Raises DgemmaError for what cannot be.
    """
    objective = objective or Objective()
    types = mixture(config, weights) if isinstance(weights, str) else dict(weights)
    passes = objective.passes if objective.denoising_weight else 0
    causal_canvas = bool(objective.causal_weight) and objective.causal_on != "prompt"
    return plan_of(Setting(config, types, adapter, passes=passes, causal_canvas=causal_canvas, **settings))


def recipe_plan(recipe: Recipe, config: ModelConfig, source: Path | None, context: int, device: torch.device,
                ranks: int = 1) -> MemoryPlan:
    """The plan of a recipe's run on a checkpoint (None: fresh weights) with contexts of up to so many tokens."""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    weights: str | Mapping[str, str] = names[recipe.dtype or "float32"]
    if source is not None and (recipe.dtype is None or source.is_file()):
        weights = stored_types(source)
    micro = min(recipe.micro_batch or recipe.batch_size, recipe.batch_size)
    return memory_plan(config, weights=weights, adapter=recipe.adapter, context=context, micro_batch=micro,
                       accumulation=-(-recipe.batch_size // (micro * ranks)), checkpointing=recipe.checkpointing,
                       objective=recipe.objective, optimizer=recipe.optimizer.kind, ema=recipe.optimizer.ema > 0,
                       autocast=recipe.autocast, device=device.type, ranks=ranks)


def available_memory(device: torch.device) -> int | None:
    """The bytes that a run may take on a device; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_memory()[0]


def mixture(config: ModelConfig, name: str) -> dict[str, str]:
    """Our name -> type of every tensor in a mixture, as `dgemma quantize` writes it, or with all of them F32 or F16."""
    shapes = network_shapes(config)
    if name.upper() in _PLAIN:
        return dict.fromkeys(shapes, name.upper())
    if name.upper() not in MIXTURES:
        raise DgemmaError(f"memory plan: weights must be one of {', '.join((*_PLAIN, *MIXTURES))}, got {name!r}")
    theirs = mixture_types({gguf_name(own): shape for own, shape in shapes.items()}, name.upper())
    return {own: theirs[gguf_name(own)].name for own in shapes}


def stored_types(path: Path) -> dict[str, str]:
    """The types that the network of a checkpoint folder or a GGUF file holds its tensors in, from the headers alone.

    Raises CheckpointError for what cannot be loaded.
    """
    if path.is_file() and is_gguf(path):
        model = gguf_model.open_gguf(path)
        shapes = network_shapes(model.config)
        parts, problems = gguf_model.match_gguf(model, shapes)
        types = {name: tensors[0].type_name if gguf_model.is_matrix(name, shapes[name]) else "F32"
                 for name, tensors in parts.items()}
    else:
        config = load_model_config(path)
        stored, problems = match(read_headers(path), network_shapes(config))
        dtype = stored_dtype(path, config, stored) if not problems else None
        types = dict.fromkeys(stored, next((name for name, own in DTYPES.items() if own == dtype), "F32"))
    if problems:
        raise CheckpointError(f"{path}: this checkpoint cannot be loaded\n{describe(problems)}")
    return types


def plan_of(run: Setting) -> MemoryPlan:
    """The plan of a run that has been checked."""
    network = empty_network(run.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    held = {name: _nbytes(shape, run.weights[name]) for name, shape in shapes.items()}
    low_rank = {} if run.adapter is None else _adapter_numbers(network, run.adapter)
    trained = ({name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
               if run.adapter is None else low_rank)
    numbers = sum(math.prod(shape) for shape in trained.values())

    plain = {name: size for name, size in held.items() if run.weights[name] in _PLAIN}
    packed = sum(held.values()) - sum(plain.values())
    types = sorted(set(run.weights.values()))
    reason = ", ".join(types) if len(types) > 1 else f"all {types[0]}"
    lines = [Line("weights", packed + sum(plain.values()) // run.ranks,
                  reason + ("; packed ones whole on every device" if run.ranks > 1 and packed else ""))]
    if run.ranks > 1:
        blocks: dict[str, int] = {}
        for name, size in plain.items():
            block = ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""
            blocks[block] = blocks.get(block, 0) + size
        gathered = blocks.pop("", 0) + max(blocks.values(), default=0)
        lines.append(Line("gathered weights", gathered, "the embedding's group and one block, whole for their pass"))
    if run.autocast:
        cast = sum(math.prod(shape) for name, shape in shapes.items()
                   if len(shape) == 2 and not name.startswith("embed_tokens"))
        lines.append(Line("autocast's copies", 2 * cast, "bf16 of every matrix, until the pass is over"))
    if run.adapter is None:
        narrow = sum(math.prod(shape) for name, shape in trained.items() if run.weights[name] != "F32")
        gradients = sum(held[name] for name in trained)
        if narrow:
            lines.append(Line("masters", 4 * narrow // run.ranks, "float32 of what is trained and held in fewer bits"))
    else:
        gradients = 4 * numbers
        lines.append(Line("adapters", 4 * numbers // run.ranks, f"{numbers / 1e6:.1f}M numbers, float32"))
    matrices = sum(math.prod(shape) for name, shape in trained.items() if is_matrix(name, shape))
    moments = 8 * numbers - (4 * matrices if run.optimizer == "muon" else 0)
    lines.append(Line("optimizer state", moments // run.ranks, "AdamW: two float32 moments" if run.optimizer == "adamw"
                      else "Muon: one float32 moment of matrices, AdamW: two of the rest"))
    if run.ema:
        lines.append(Line("EMA", 4 * numbers // run.ranks, "float32 of what is trained"))
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
        work += _NEWTON_SCHULZ * _largest_group(trained) // run.ranks
    elif _kind(run.device) == "cuda":  # AdamW takes the root of all second moments at once there
        work += 4 * numbers // run.ranks
    most = widest(_step(run, low_rank, fast_bf16()), gradients, first, work)
    inside = "inputs of blocks" if run.checkpointing else "all that the backward pass needs"
    runtime = _CUDA_RUNTIME
    if _kind(run.device) == "cpu":
        runtime = program_bytes(run.config.vocab_size, training=True)
    slack = _SLACK * (most.kept + most.cache + most.working)
    lines += [
        Line("gradients", most.gradients, "of what is trained" if most.gradients == gradients else
             f"of {gradients / 1e9:.2f} GB, at the widest moment: the others come as activations go"),
        Line("activations", most.kept, f"{inside}, {run.micro_batch} x ({run.context} + {run.config.canvas_length})"),
        Line("keys and values", most.cache, "of the contexts, with their gradients"),
        Line("working memory", most.working, f"at the widest moment: {most.name}"),
        Line("runtime", int(runtime + slack), "libraries, and what the allocator holds besides"),
    ]
    return MemoryPlan(run, tuple(lines))


def _step(run: Setting, low_rank: Mapping[str, tuple[int, ...]], fast_bf16: bool) -> Step:
    wide = run.packed or run.weights["embed_tokens.weight"] == "F32"
    stream = 4 if wide else 2
    product = 2 if run.autocast else stream
    narrow = (run.packed or product == 2) and (fast_bf16 or _kind(run.device) == "cuda")
    ranks = None if run.adapter is None else {name.removesuffix(".a"): shape[-2] for name, shape in low_rank.items()
                                              if name.endswith(".a")}
    return Step(run.config, run.context, run.micro_batch, run.passes, run.causal_canvas, run.checkpointing, stream,
                product, 2 if narrow else 4, 2 if run.packed else stream, ranks,
                run.adapter is not None and run.adapter.dora, run.packed, _kind(run.device) == "cuda")


def _adapter_numbers(network: Any, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parameters, as `nn.adapters.LowRank` makes them."""
    places = adaptable(network)
    found: dict[str, tuple[int, ...]] = {}
    for name in adapter.names(places):
        module, attribute = places[name]
        *stack, outputs, inputs = getattr(module, attribute).shape
        rank = adapter.rank_of(name)
        found |= {f"{name}.a": (*stack, rank, inputs), f"{name}.b": (*stack, outputs, rank)}
        if adapter.dora:
            found[f"{name}.magnitude"] = (*stack, outputs)
    return found


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    if kind not in BLOCK_TYPES:
        raise DgemmaError(f"memory plan: there is no weight type {kind!r}; there are {', '.join(BLOCK_TYPES)}")
    if kind in _PLAIN:
        return math.prod(shape) * _PLAIN[kind]
    return math.prod(shape[:-1]) * BLOCK_TYPES[kind].row_bytes(shape[-1])


def _largest_group(trained: Mapping[str, tuple[int, ...]]) -> int:
    """The numbers of all matrices of one shape, which Muon works on together."""
    groups: dict[tuple[int, ...], int] = {}
    for name, shape in trained.items():
        if is_matrix(name, shape):
            groups[shape[-2:]] = groups.get(shape[-2:], 0) + math.prod(shape)
    return max(groups.values(), default=0)


def _kind(device: str) -> str:
    return "cpu" if device.startswith("cpu") else "cuda"


def _halved_batches(run: Setting) -> list[Setting]:
    runs, size = [], run.micro_batch
    while size > 1:
        size = -(-size // 2)
        examples = run.micro_batch * run.accumulation
        runs.append(dataclasses.replace(run, micro_batch=size, accumulation=-(-examples // size)))
    return runs


def _halved_ranks(run: Setting) -> list[Setting]:
    runs, adapter = [], run.adapter
    while adapter is not None and adapter.r > 4:
        adapter = dataclasses.replace(adapter, r=adapter.r // 2, alpha=adapter.alpha / 2)
        runs.append(dataclasses.replace(run, adapter=adapter))
    return runs


def _fewer_targets(run: Setting) -> list[Setting]:
    runs, adapter = [], run.adapter
    for dropped in ("experts", "mlp"):
        if adapter is not None and dropped in adapter.targets and len(adapter.targets) > 1:
            adapter = dataclasses.replace(adapter, targets=tuple(t for t in adapter.targets if t != dropped))
            runs.append(dataclasses.replace(run, adapter=adapter))
    return runs


def _packed_base(run: Setting) -> list[Setting]:
    if run.packed or run.adapter is None:
        return []
    return [dataclasses.replace(run, weights=mixture(run.config, "Q4_K_M"))]


# What to try, in this order: what costs nothing but time first, what changes the result last.
_CHANGES = (
    (lambda run: "checkpointing: on", lambda run: [dataclasses.replace(run, checkpointing=True)]),
    (lambda run: f"micro-batches of {run.micro_batch}, {run.accumulation} of them accumulated", _halved_batches),
    (lambda run: "the base packed as Q4_K_M", _packed_base),
    (lambda run: f"rank {run.adapter.r}", _halved_ranks),
    (lambda run: f"adapters on {', '.join(run.adapter.targets)} only", _fewer_targets),
)
