"""Measure the table of errors in kernels.md: every packed type, the worst of the instruction sets that run here."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import can_quantize, quantize
from dgemma.kernels import PackedWeight, native
from support.block_bytes import HALVES, exact_activations, packed

ROWS, OUTPUTS, WIDTH = 64, 512, 2816


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, whole = torch.randn(ROWS, WIDTH, generator=generator), exact_activations(ROWS, WIDTH)
    numbers = torch.randn(OUTPUTS, WIDTH, generator=generator)
    for name in HALVES:
        kind = BLOCK_TYPES[name]
        native.takes(kind)
        own = can_quantize(kind)
        weight = PackedWeight(quantize(numbers, kind), kind) if own else packed(name, OUTPUTS, WIDTH)
        exact = weight.dequantize().double()
        sums = rounding = 0.0
        for isa in native.isas():
            native.use(isa)
            for inputs in (whole, x):
                error = relative(native.linear(inputs, weight.data, kind.code, WIDTH), inputs.double() @ exact.T)
                sums, rounding = (max(sums, error), rounding) if inputs is whole else (sums, max(rounding, error))
        packing = f"{relative(exact.float(), numbers.double()):.1%}" if own else "–"
        print(f"| {name} | {8 * kind.nbytes / kind.block:.2f} | {packing} | {rounding:.2%} | {sums:.1e} |")


if __name__ == "__main__":
    main()
