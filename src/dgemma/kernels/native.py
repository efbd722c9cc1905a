"""The C++ kernels of ``native/``, loaded if they were built: products of float32 activations with packed weights, and
attention in bfloat16, norms, rotary embedding and the head's sums of plain tensors.

Works on torch tensors on the CPU through a plain C interface. Knows nothing of the model. `available` says whether the
library is there; without it the callers use plain torch.

The packed products are torch operators, too (``torch.ops.dgemma.packed_linear`` and ``packed_experts``, with the
arguments of `linear` and `expert_mlp`), and so have a schema, and shapes for torch's tracers. What does not fit is a
ValueError on every device.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.gguf.blocks import BY_CODE, BlockType
from dgemma.gguf.codebooks import GRIDS, grid

ABI = 6
_NAMES = {"linux": "libdgemma_cpu.so", "darwin": "libdgemma_cpu.dylib", "win32": "dgemma_cpu.dll"}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _HeadTile(ctypes.Structure):
    """``HeadTile`` of native/dgemma.h."""

    _fields_ = (*((name, _LONG) for name in ("M", "n", "start")), ("cap", ctypes.c_float),
                *((name, _POINTER) for name in ("inverse_t", "gumbel", "inside", "sharpness", "best", "mass",
                                                "weighted", "best_key", "decay", "argmax", "sample")))


class _Attention(ctypes.Structure):
    """``Attention`` of native/dgemma.h."""

    _fields_ = (*((name, _LONG) for name in ("heads", "rows", "dim", "blocks", "heads_per_batch", "group")),
                *((name, _POINTER) for name in ("query", "keys", "values", "columns", "strides", "positions", "first",
                                                "last")))


def library() -> ctypes.CDLL | None:
    """The loaded library; None when this installation has none that fits, see `why_absent`.

    ``DGEMMA_ISA`` chooses the instruction set by name, ``DGEMMA_ISA=torch`` goes without the library, and
    ``DGEMMA_NATIVE`` names a library file elsewhere. Raises DgemmaError when that cannot be had.
    """
    found = _find()
    return None if isinstance(found, str) else found


def why_absent() -> str:
    """Why there is no library, to follow "the CPU kernels are", with what to do about it; empty when there is one."""
    found = _find()
    return found if isinstance(found, str) else ""


@functools.cache
def _find() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    wanted, elsewhere = os.environ.get("DGEMMA_ISA", ""), os.environ.get("DGEMMA_NATIVE")
    if wanted == "torch":
        return "switched off by DGEMMA_ISA=torch"
    found = _open(Path(elsewhere) if elsewhere else _installed(_NAMES.get(sys.platform, _NAMES["linux"])))
    if isinstance(found, str):
        if wanted or elsewhere:
            raise DgemmaError(f"{f'DGEMMA_ISA={wanted}' if wanted else 'DGEMMA_NATIVE'}: the CPU kernels are {found}")
        return found
    if wanted and found.dg_use(wanted.encode()):
        choices = ", ".join([*found.dg_available().decode().split(), "torch"])
        raise DgemmaError(f"DGEMMA_ISA={wanted}: not an instruction set that this machine and build can run; "
                          f"there are {choices}")
    return found


def _open(path: Path | None) -> ctypes.CDLL | str:
    """The library in a file, or what is wrong with it."""
    if path is None:
        return "not built here (install a C++ compiler, then install dgemma again)"
    try:
        loaded = ctypes.CDLL(str(path))
        if loaded.dg_abi() != ABI:  # an int, which is what ctypes takes results for
            return f"of another version of dgemma ({path}; install dgemma again)"
        signatures(loaded)
    except (OSError, AttributeError) as error:
        return f"not to be loaded ({error}; install dgemma again)"
    return loaded


def signatures(loaded: ctypes.CDLL) -> None:
    """Declare the functions of ``native/dgemma.h``."""
    for name, result, *arguments in (
        ("dg_abi", _INT),
        ("dg_available", ctypes.c_char_p),
        ("dg_current", ctypes.c_char_p),
        ("dg_use", _INT, ctypes.c_char_p),
        ("dg_peak", ctypes.c_double, _INT),
        ("dg_grid", _INT, _INT, _POINTER, _LONG),
        ("dg_linear", _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT),
        ("dg_expert_mlp", _INT, _INT, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER,
         _POINTER, _LONG, _POINTER, _INT),
        ("dg_mix", _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT),
        ("dg_head_tile", _INT, ctypes.POINTER(_HeadTile), _POINTER, _INT),
        ("dg_rms_norm", _INT, _POINTER, _LONG, _LONG, _POINTER, ctypes.c_float, _POINTER, _POINTER, _INT),
        ("dg_norm_rotate", _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, ctypes.c_float, _POINTER, _POINTER, _POINTER,
         _INT),
        ("dg_attend", _INT, ctypes.POINTER(_Attention), _POINTER, _INT),
        ("dg_dequantize", _INT, _INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _POINTER, _INT),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _installed(name: str) -> Path | None:
    """Beside this file, or (an editable install) in the folder where the build put it."""
    for folder in [Path(__file__).parent, *(Path(entry) / "dgemma" / "kernels" for entry in sys.path)]:
        if (folder / name).is_file():
            return folder / name
    return None


def available() -> bool:
    """Whether the native kernels are there."""
    return library() is not None


def takes(kind: BlockType) -> bool:
    """Whether the kernels are there and compute with this block type; its codebook is handed to them first.

    Raises DgemmaError where that is not here (see `codebooks`).
    """
    if kind.block == 1 or not available():
        return False
    if kind.name in GRIDS:
        _hand_over_grid(kind)
    return True


@functools.cache
def _hand_over_grid(kind: BlockType) -> None:
    numbers = grid(kind.name)
    if kind.name.startswith("IQ1"):  # the kernels shift these numbers by eighths
        numbers = numbers * 8 + 128
    numbers = numbers.to(torch.uint8).contiguous()
    _check(_loaded().dg_grid(kind.code, numbers.data_ptr(), numbers.numel()))


def isa() -> str:
    """The instruction set in use; "torch" without the library."""
    loaded = library()
    return "torch" if loaded is None else loaded.dg_current().decode()


def isas() -> list[str]:
    """The instruction sets that can run here, best first."""
    loaded = library()
    return [] if loaded is None else loaded.dg_available().decode().split()


def use(name: str) -> None:
    """Choose an instruction set by name; raises ValueError when it cannot run here."""
    loaded = library()
    if loaded is None or loaded.dg_use(name.encode()):
        raise ValueError(f"instruction set {name!r} cannot run here; there are {', '.join(isas()) or 'none'}")


def peak_operations(threads: int | None = None) -> float:
    """Measured int8 operations per second (two per multiply-add) of the dot instruction, from registers."""
    loaded = library()
    if loaded is None:
        raise DgemmaError(f"the CPU kernels' peak cannot be measured: they are {why_absent()}")
    # The best of several: a peak is what the processor can do, interference takes away from it.
    return 2 * max(loaded.dg_peak(threads or torch.get_num_threads()) for _ in range(5))


def _float_rows(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _width(weight: Tensor, code: int) -> int:
    """The weights in a row of packed bytes; ValueError where they are no rows of whole blocks of that type."""
    kind = BY_CODE.get(code)
    if kind is None or kind.block == 1 or weight.dtype != torch.uint8 or weight.shape[-1] % kind.nbytes:
        raise ValueError(f"{weight.shape[-1]} bytes are no row of whole blocks: there is no block type {code} of "
                         "packed weights, or its rows are of other widths")
    return kind.row_width(weight.shape[-1])


def check_linear(x: Tensor, weight: Tensor, code: int, width: int) -> None:
    """Raises ValueError unless x [M, K] fits rows of ``width`` = K packed weights."""
    held = _width(weight, code)
    if x.ndim != 2 or weight.ndim != 2 or not x.shape[1] == width == held:
        raise ValueError(f"rows of {x.shape[-1]} numbers do not fit rows of {held} weights (width={width})")


def check_experts(x: Tensor, gate_up: Tensor, gate_up_code: int, down: Tensor, down_code: int, inner: int,
                   weights: Tensor, experts: Tensor) -> None:
    """Raises ValueError unless `expert_mlp` can compute with these."""
    shapes = (*gate_up.shape[:-1], _width(gate_up, gate_up_code), *down.shape[:-1], _width(down, down_code))
    count, hidden = gate_up.shape[0], x.shape[-1]
    if shapes != (count, 2 * inner, hidden, count, hidden, inner) or weights.shape != experts.shape or (
            len(experts) != len(x)):
        raise ValueError(f"experts {list(gate_up.shape)} and {list(down.shape)} (bytes), tokens {list(x.shape)}, "
                         f"choices {list(experts.shape)} and weights {list(weights.shape)} do not fit inner={inner}")


def linear(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    """x [M, K] · Wᵀ -> [M, N] float32; ``weight`` uint8 [N, row bytes] holds ``width`` = K weights a row."""
    check_linear(x, weight, code, width)
    x = _float_rows(x)
    rows, count = weight.shape[0], x.shape[0]
    if weight.stride(-1) != 1:
        raise ValueError("the bytes of a row must stand one behind the other")
    out = torch.empty(count, rows)
    _check(_loaded().dg_linear(code, weight.data_ptr(), weight.stride(0), rows, width, x.data_ptr(), count,
                               out.data_ptr(), torch.get_num_threads()))
    return out


def expert_mlp(x: Tensor, gate_up: Tensor, gate_up_code: int, down: Tensor, down_code: int, inner: int,
               weights: Tensor, experts: Tensor) -> Tensor:
    """`kernels.expert_mlp` with packed weights: gate_up uint8 [E, 2I, row bytes], down uint8 [E, D, row bytes]."""
    check_experts(x, gate_up, gate_up_code, down, down_code, inner, weights, experts)
    x = _float_rows(x)
    experts, weights = experts.to(torch.int64).contiguous(), _float_rows(weights)
    gate_up, down = gate_up.contiguous(), down.contiguous()
    out = torch.empty_like(x)
    _check(_loaded().dg_expert_mlp(gate_up_code, gate_up.data_ptr(), down_code, down.data_ptr(), gate_up.shape[0],
                                   inner, x.shape[1], x.data_ptr(), x.shape[0], experts.data_ptr(),
                                   weights.data_ptr(), experts.shape[1], out.data_ptr(), torch.get_num_threads()))
    return out


def dequantize(weight: Tensor, code: int, width: int, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of ``weight`` uint8 [N, row bytes] (those with the indices ``rows`` [n], or all) as numbers [n, width].

    ``dtype`` is float32 or bfloat16.
    """
    index = None if rows is None else rows.to(torch.int64).contiguous()
    out = torch.empty(weight.shape[0] if index is None else len(index), width, dtype=dtype)
    _check(_loaded().dg_dequantize(code, weight.data_ptr(), weight.stride(0), width,
                                   None if index is None else index.data_ptr(), len(out), dtype == torch.bfloat16,
                                   out.data_ptr(), torch.get_num_threads()))
    return out


def mix(soft: Tensor, decay: Tensor, weights: Tensor, table: Tensor, code: int) -> None:
    """soft [M, D] = soft · decay [M] + weights [M, n] · the numbers of ``table`` uint8 [n, row bytes], in place."""
    count, width = soft.shape
    _check(_loaded().dg_mix(code, table.data_ptr(), table.stride(0), table.shape[0], width, weights.data_ptr(), count,
                            decay.data_ptr(), soft.data_ptr(), torch.get_num_threads()))


def head_tile(scores: Tensor, start: int, cap: float, inverse_t: Tensor, gumbel: Tensor, inside: Tensor,
              sums: dict[str, Tensor | None]) -> None:
    """One tile of the head, in place; see ``dg_head_tile``. All tensors are contiguous, [M] but for scores [M, n]."""
    count, width = scores.shape
    pointers = {name: tensor.data_ptr() for name, tensor in sums.items() if tensor is not None}
    tile = _HeadTile(M=count, n=width, start=start, cap=cap, inverse_t=inverse_t.data_ptr(), gumbel=gumbel.data_ptr(),
                     inside=inside.data_ptr(), **pointers)
    _check(_loaded().dg_head_tile(ctypes.byref(tile), scores.data_ptr(), torch.get_num_threads()))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    """(residual +) RMSNorm of x [..., D] float32, times weight [D]."""
    x = x.contiguous()
    residual = None if residual is None else _float_rows(residual.expand_as(x))
    weight = None if weight is None else _float_rows(weight)
    out = torch.empty_like(x)
    width = x.shape[-1]
    _check(_loaded().dg_rms_norm(x.data_ptr(), x.numel() // width, width, None if weight is None else weight.data_ptr(),
                                 eps, None if residual is None else residual.data_ptr(), out.data_ptr(),
                                 torch.get_num_threads()))
    return out


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm and rotary embedding of x [..., H, d] float32, with cos and sin of as many tokens, [..., d] each."""
    x, weight, cos, sin = x.contiguous(), _float_rows(weight), _float_rows(cos), _float_rows(sin)
    heads, dim = x.shape[-2:]
    tokens = x.numel() // (heads * dim) if x.numel() else 0
    if cos.numel() != tokens * dim or sin.numel() != tokens * dim or weight.numel() != dim:
        raise ValueError(f"cos, sin {list(cos.shape)} and weight {list(weight.shape)} do not fit x {list(x.shape)}")
    out = torch.empty_like(x)
    _check(_loaded().dg_norm_rotate(x.data_ptr(), tokens, heads, dim, weight.data_ptr(), eps, cos.data_ptr(),
                                    sin.data_ptr(), out.data_ptr(), torch.get_num_threads()))
    return out


def can_attend(dim: int) -> bool:
    """Whether `attend` runs here: it needs bfloat16 instructions and heads of a multiple of 32 numbers."""
    return dim % 32 == 0 and isa() in ("amx", "avx512bf16")


def attend(query: Tensor, blocks: list[tuple[Tensor, Tensor]], group: int = 1,
           bounds: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Softmax attention with scale 1 of query [B, H, R, d] over the columns of ``blocks``, [B, H, S_i, d] each.

    All bfloat16; scores and sums are float32, as is the result [B, H, R, d]. ``bounds`` None: every row sees every
    column; else (first, last, positions), [B, R / group] twice and [B, S]: row r sees the columns whose position is
    between first and last of r // group, both included.
    """
    query = query.contiguous()
    batch, heads, rows, dim = query.shape
    kept = [pair if _in_rows(*pair) else (pair[0].contiguous(), pair[1].contiguous())
            for pair in blocks if pair[0].shape[2]]
    if not kept or any(t.dtype != torch.bfloat16 for t in (query, *(t for pair in kept for t in pair))):
        raise ValueError("attention here takes bfloat16 queries and at least one column of keys and values")
    count, width = len(kept), sum(key.shape[2] for key, _ in kept)
    if any(t.shape != (batch, heads, key.shape[2], dim) for key, value in kept for t in (key, value)):
        raise ValueError(f"keys and values do not fit queries {list(query.shape)}")
    limits: list[Tensor] = []
    if bounds is not None:
        first, last, positions = bounds
        if positions.shape != (batch, width) or rows % group:
            raise ValueError(f"positions {list(positions.shape)} do not fit {width} columns and {rows} rows")
        limits = [t.expand(batch, rows // group).long().contiguous() for t in (first, last)]
        limits.append(positions.long().contiguous())
    keys = (ctypes.c_void_p * count)(*(key.data_ptr() for key, _ in kept))
    values = (ctypes.c_void_p * count)(*(value.data_ptr() for _, value in kept))
    columns = (_LONG * count)(*(key.shape[2] for key, _ in kept))
    strides = (_LONG * count)(*(key.stride(1 if key.shape[1] > 1 else 0) for key, _ in kept))
    pointers = dict(zip(("first", "last", "positions"), (t.data_ptr() for t in limits), strict=False))
    out = torch.empty(batch, heads, rows, dim)
    task = _Attention(heads=batch * heads, rows=rows, dim=dim, blocks=count, heads_per_batch=heads, group=group,
                      query=query.data_ptr(), keys=ctypes.addressof(keys), values=ctypes.addressof(values),
                      columns=ctypes.addressof(columns), strides=ctypes.addressof(strides), **pointers)
    _check(_loaded().dg_attend(ctypes.byref(task), out.data_ptr(), torch.get_num_threads()))
    return out


def _in_rows(key: Tensor, value: Tensor) -> bool:
    """Whether keys and values [B, H, S, d] can be read as they lie: a head's columns together, heads evenly apart.

    The stride of a dimension of size 1 means nothing.
    """
    return key.stride() == value.stride() and key.stride()[2:] == (key.shape[3], 1) and (
        1 in key.shape[:2] or key.stride(0) == key.shape[1] * key.stride(1))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "ask available() first"
    return loaded


def _check(result: int) -> None:
    if result:
        raise ValueError("the CPU kernels do not know this block type, an index is out of range, or shapes do not fit")


def _linear_shape(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    check_linear(x, weight, code, width)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _experts_shape(x: Tensor, *arguments) -> Tensor:
    check_experts(x, *arguments)
    return torch.empty_like(x, dtype=torch.float32)


def _not_there(*_: object) -> NoReturn:
    raise DgemmaError("there are no kernels for packed weights on a GPU yet: load the model there without keeping it "
                      "packed (dgemma.load unpacks it), or run it on the CPU")


_OPERATORS = torch.library.Library("dgemma", "DEF")
_OPERATORS.define("packed_linear(Tensor x, Tensor weight, int code, int width) -> Tensor")
_OPERATORS.define("packed_experts(Tensor x, Tensor gate_up, int gate_up_code, Tensor down, int down_code, int inner, "
                  "Tensor weights, Tensor experts) -> Tensor")
for _name, _cpu, _meta in (("packed_linear", linear, _linear_shape), ("packed_experts", expert_mlp, _experts_shape)):
    _OPERATORS.impl(_name, _cpu, "CPU")
    _OPERATORS.impl(_name, _meta, "Meta")
    _OPERATORS.impl(_name, _not_there, "CUDA")
