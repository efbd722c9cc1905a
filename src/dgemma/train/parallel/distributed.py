"""One run over several processes: each holds a part of the network and works on a part of every batch.

Works on a network, its passes, an optimizer and tensors by name, with PyTorch's `fully_shard` (FSDP2) and
collectives; knows nothing of data, losses or files. The processes are started by `torchrun` or `accelerate launch`,
which say in the environment who is who. In a single process everything here does the obvious without touching
`torch.distributed`.

What a step has to keep to: every rank makes the same forward and backward passes (`share` cuts the batch so), and the
losses of all ranks *add up* to that of the whole batch, as gradients are summed and not averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.cache import Spans
from dgemma.cache.visibility import pieces
from dgemma.errors import DgemmaError
from dgemma.model import parse_device
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.passes import Passes

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


@dataclass(frozen=True)
class Share(Generic[T]):
    """A micro-batch: ``items`` and the place of the first of them in the whole batch.

    ``weight`` is what its loss is multiplied by: 1, or 0 for work that is only done so that all ranks do as much.
    """

    items: Sequence[T]
    start: int
    weight: float = 1.0


@dataclass(frozen=True)
class Ranks:
    """Which of ``world`` processes this is, and what they agree on. Every method is called by all of them."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T], most: int) -> list[Share[T]]:
        """This rank's micro-batches of a batch, of at most ``most`` items and as even as can be.

        There are as many on every rank; where there are fewer items than needed for that, some have weight 0.
        """
        each = -(-len(items) // (self.world * most))
        cuts = [len(items) * index // (each * self.world) for index in range(each * self.world + 1)]
        own = [(cuts[index], cuts[index + 1]) for index in range(self.rank * each, (self.rank + 1) * each)]
        return [Share(items[start:end], start) if end > start else Share(items[:1], 0, 0.0) for start, end in own]

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor summed over ranks, float64 on the CPU; all of them bring the same names and shapes."""
        names = sorted(values)
        flat = torch.cat([values[name].detach().double().cpu().flatten() for name in names] or [torch.zeros(0)])
        if self.world > 1:
            dist.all_reduce(flat)
        parts = flat.split([values[name].numel() for name in names])
        return {name: part.view(values[name].shape) for name, part in zip(names, parts, strict=True)}

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank: a signal that one of them got stops all at the same step."""
        return bool(self.sum({"flag": torch.tensor(float(flag))})["flag"])

    def from_main(self, value: T) -> T:
        """What the main process brings, on all of them; what the others bring is ignored."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """The processes that the environment tells of, connected for as long as this is open.

    ``device`` is "cuda", "cpu" or None for the GPU if there is one; of several, each process takes its own. Raises
    DgemmaError when the environment is incomplete, a GPU is missing, or the others cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(parse_device(device))
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise DgemmaError(f"the environment says WORLD_SIZE={world} but not {', '.join(missing)}: start the run with "
                          "torchrun or accelerate launch, or unset WORLD_SIZE")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    kind = parse_device(device).type
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise DgemmaError(f"process {local} of this machine has no GPU of its own: there are "
                              f"{torch.cuda.device_count()}; start as many processes as there are GPUs")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:  # of which the errors of torch.distributed are kinds
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DgemmaError(f"process {rank} of {world} cannot reach the others at {address}: {error}") from error
    try:
        yield Ranks(torch.device(kind, local) if kind == "cuda" else torch.device(kind), rank, world)
    finally:
        dist.destroy_process_group()


def shard(network: DiffusionTransformer, ranks: Ranks, checkpointing: bool = False) -> Passes:
    """Keep only this rank's part of every parameter, on its device -> the passes to train with (`Passes.of`); in a
    single process the network stays whole, and they are its own.

    Comes after adapters are attached and what is trained is chosen, and before the optimizer is made. Each block is
    gathered when it runs and let go of again; embedding table, self-conditioning and final norm, which losses read by
    themselves, stay gathered from the first pass to the end of the backward one. Nothing is cast: a gradient has its
    parameter's dtype, so frozen bfloat16 weights and float32 adapters may share a block. Packed weights are no
    parameters: each rank holds all of them. So it does of a vision tower, which must be frozen: ranks look at pictures
    by themselves, each at its own and not equally many.
    """
    if ranks.world == 1:
        return Passes.of(network, checkpointing)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in network.layers:
        fully_shard(block, mesh=mesh)
    seeing = set() if network.vision is None else set(network.vision.to(ranks.device).parameters())
    fully_shard(network, mesh=mesh, ignored_params=seeing)
    for module in _sharded(network).values():
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor, even of 1
    for name in ("encode", "denoise"):
        register_fsdp_forward_method(network, name)
    return _in_step(Passes.of(network, checkpointing))


def _in_step(passes: Passes) -> Passes:
    """The same passes on all ranks whatever their contexts: as many pieces of `encode`, forwards and backwards."""
    waiting: list[Tensor] = []

    def padded_encode(token_ids: Tensor, cache: KVCache, lengths: Sequence[int] | None = None,
                      spans: Spans | None = None, **others: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return passes.encode(token_ids, cache, lengths, spans=spans, **others)
        if not any(cache.lengths):
            waiting.clear()  # a new cache: what was not denoised with the last one never will be
        batch, width = token_ids.shape
        own = list(pieces(width, cache.piece, spans))
        most = torch.tensor(len(own))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if (missing := int(most) - len(own)) > 0:
            lengths = [width] * batch if lengths is None else lengths
            # To the end of the last piece and one token into the last that is missing.
            full = max(own[-1].start + cache.piece, width)
            token_ids = F.pad(token_ids, (0, full + (missing - 1) * cache.piece + 1 - width))
        hidden = passes.encode(token_ids, cache, lengths, spans=spans, **others)
        if hidden.requires_grad:
            waiting.append(hidden)
        return hidden[:, :width]

    def tied_denoise(canvas_ids: Tensor, cache: KVCache, soft: Tensor | None = None) -> Tensor:
        hidden = passes.denoise(canvas_ids, cache, soft)
        if torch.is_grad_enabled() and waiting:
            hidden = _Tied.apply(hidden, *waiting)
            waiting.clear()
        return hidden

    return Passes(padded_encode, tied_denoise, passes.checkpointed)


class _Tied(torch.autograd.Function):
    """The first tensor as it is; the others get a gradient of zeros where it gets one.

    FSDP gathers a block's weights for the backward pass when a gradient reaches what the block returned. The keys and
    values that the encoder leaves in the cache are a way around that, and without a causal loss the only one.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(grads[0].new_zeros(()).expand(shape) for shape in ctx.shapes)


@contextmanager
def gathered(network: DiffusionTransformer) -> Iterator[dict[str, Tensor]]:
    """Every rank holds the whole network on its device for as long as this is open; gives its tensors by name.

    Passes without gradients need nothing of the other ranks then: each evaluates what it likes, and the main process
    may save those tensors (not ``state_dict()``, which shards everything again first). No optimizer may step.
    """
    parts = list(_sharded(network).values())
    if not parts:  # a single process
        yield network.state_dict()
        return
    for part in parts:
        part.reshard()  # what is gathered already may be older than what is sharded
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()
    try:
        yield {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not network, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()


def let_go(network: DiffusionTransformer) -> None:
    """Every rank holds its part of the network only: passes without gradients leave what all of them use gathered,
    and then its parameters are not those that get gradients."""
    for module in _sharded(network).values():
        module.reshard()


def _sharded(network: DiffusionTransformer) -> dict[str, FSDPModule]:
    """The modules that `shard` has cut, by name: none in a single process."""
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in network.named_modules() if isinstance(module, FSDPModule)}


@contextmanager
def whole(network: DiffusionTransformer, name: str) -> Iterator[None]:
    """The block that holds a parameter is whole on every rank for as long as this is open; no other one is."""
    parts = [module for path, module in _sharded(network).items() if not path or name.startswith(f"{path}.")]
    if not parts:  # a single process
        yield
        return
    part = parts[-1]
    part.unshard()
    try:
        yield
    finally:
        part.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale gradients so that their norm is at most ``most``; returns what it was, over all ranks."""
    from torch.distributed.tensor import DTensor

    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if isinstance(norm, DTensor):  # which adds up over ranks only now
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(trained, most, norm)
    return norm.item()


def collect(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors by name, sharded ones made whole one after the other, as copies on the main process' CPU.

    The other processes take part and get none.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, tensor in tensors.items():
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if ranks.is_main:
            found[name] = full.to("cpu", copy=True)
    return found


def spread(tensors: Mapping[str, Tensor], network: DiffusionTransformer, ranks: Ranks) -> Mapping[str, Tensor]:
    """What `collect` gave on any number of ranks, for this number of them: cut as `shard` cuts the parameters.

    That is along the first dimension; what has no dimension is copied. Only the main process' ``tensors`` count. In a
    single process they are given back as they are.
    """
    if ranks.world == 1:
        return tensors
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    parameter = next(network.parameters())
    assert isinstance(parameter, DTensor)  # the network is sharded
    found = {}
    # Others first learn what there is: the same tensors without numbers.
    for name, outline in ranks.from_main({name: tensor.to("meta") for name, tensor in tensors.items()}).items():
        device = ranks.device if outline.ndim else torch.device("cpu")  # where optimizers keep single numbers
        full = tensors[name].to(device) if ranks.is_main else torch.empty_like(outline, device=device)
        if full.ndim:
            full = distribute_tensor(full, parameter.device_mesh, [Shard(0)])
        else:
            dist.broadcast(full, src=0)
        found[name] = full
    return found
