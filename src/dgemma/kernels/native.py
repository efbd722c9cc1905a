"""The C++ kernels of ``native/``, loaded if they were built: products of float32 activations with packed weights.

Works on torch tensors on the CPU through a plain C interface. Knows nothing of the model. `available` says whether the
library is there; without it the callers use plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from dgemma.errors import DgemmaError

ABI = 1
_NAMES = {"linux": "libdgemma_cpu.so", "darwin": "libdgemma_cpu.dylib", "win32": "dgemma_cpu.dll"}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _HeadTile(ctypes.Structure):
    """``HeadTile`` of native/dgemma.h."""

    _fields_ = (*((name, _LONG) for name in ("M", "n", "start")), ("cap", ctypes.c_float),
                *((name, _POINTER) for name in ("inverse_t", "gumbel", "inside", "best", "mass", "weighted", "best_key",
                                                "decay", "argmax", "sample")))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None when this installation has none that fits.

    ``DGEMMA_ISA`` chooses the instruction set by name, ``DGEMMA_ISA=torch`` goes without the library, and
    ``DGEMMA_NATIVE`` names a library file elsewhere. Raises DgemmaError when that cannot be had.
    """
    wanted = os.environ.get("DGEMMA_ISA", "")
    if wanted == "torch":
        return None
    elsewhere = os.environ.get("DGEMMA_NATIVE")
    name = _NAMES.get(sys.platform, _NAMES["linux"])
    path = Path(elsewhere) if elsewhere else _installed(name)
    if path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        signatures(loaded)
    except (OSError, AttributeError) as error:
        if elsewhere or wanted:
            raise DgemmaError(f"{path}: the CPU kernels cannot be loaded ({error})") from error
        return None
    if loaded.dg_abi() != ABI:
        if elsewhere or wanted:
            raise DgemmaError(f"{path}: built for another version of dgemma; build it again (pip install dgemma)")
        return None
    if wanted and loaded.dg_use(wanted.encode()):
        choices = ", ".join([*loaded.dg_available().decode().split(), "torch"])
        raise DgemmaError(f"DGEMMA_ISA={wanted}: not an instruction set that this machine and build can run; "
                          f"there are {choices}")
    return loaded


def signatures(loaded: ctypes.CDLL) -> None:
    """Declare the functions of ``native/dgemma.h``."""
    for name, result, *arguments in (
        ("dg_abi", _INT),
        ("dg_available", ctypes.c_char_p),
        ("dg_current", ctypes.c_char_p),
        ("dg_use", _INT, ctypes.c_char_p),
        ("dg_peak", ctypes.c_double, _INT),
        ("dg_linear", _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT),
        ("dg_expert_mlp", _INT, _INT, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER,
         _POINTER, _LONG, _POINTER, _INT),
        ("dg_mix", _INT, _INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT),
        ("dg_head_tile", _INT, ctypes.POINTER(_HeadTile), _POINTER, _INT),
        ("dg_rms_norm", _INT, _POINTER, _LONG, _LONG, _POINTER, ctypes.c_float, _POINTER, _POINTER, _INT),
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
        raise DgemmaError("the CPU kernels are not built here, so their peak cannot be measured")
    return 2 * loaded.dg_peak(threads or torch.get_num_threads())


def _float_rows(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def linear(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    """x [M, K] · Wᵀ -> [M, N] float32; ``weight`` uint8 [N, row bytes] holds ``width`` = K weights a row."""
    x = _float_rows(x)
    rows, count = weight.shape[0], x.shape[0]
    out = torch.empty(count, rows)
    _check(_loaded().dg_linear(code, weight.data_ptr(), weight.stride(0), rows, width, x.data_ptr(), count,
                               out.data_ptr(), torch.get_num_threads()))
    return out


def expert_mlp(x: Tensor, gate_up: Tensor, gate_up_code: int, down: Tensor, down_code: int, inner: int,
               weights: Tensor, experts: Tensor) -> Tensor:
    """`kernels.expert_mlp` with packed weights: gate_up uint8 [E, 2I, row bytes], down uint8 [E, D, row bytes]."""
    x = _float_rows(x)
    experts, weights = experts.to(torch.int64).contiguous(), _float_rows(weights)
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
              sums: dict[str, Tensor]) -> None:
    """One tile of the head, in place; see ``dg_head_tile``. All tensors are contiguous, [M] but for scores [M, n]."""
    count, width = scores.shape
    pointers = {name: tensor.data_ptr() for name, tensor in sums.items()}
    tile = _HeadTile(M=count, n=width, start=start, cap=cap, inverse_t=inverse_t.data_ptr(), gumbel=gumbel.data_ptr(),
                     inside=inside.data_ptr(), **pointers)
    _check(_loaded().dg_head_tile(ctypes.byref(tile), scores.data_ptr(), torch.get_num_threads()))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    """(residual +) RMSNorm of x [..., D] float32, times weight [D]."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else _float_rows(weight)
    out = torch.empty_like(x)
    width = x.shape[-1]
    _check(_loaded().dg_rms_norm(x.data_ptr(), x.numel() // width, width, None if weight is None else weight.data_ptr(),
                                 eps, None if residual is None else residual.data_ptr(), out.data_ptr(),
                                 torch.get_num_threads()))
    return out


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "ask available() first"
    return loaded


def _check(result: int) -> None:
    if result:
        raise ValueError("the CPU kernels do not know this block type, or these shapes do not fit")
