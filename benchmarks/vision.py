"""The vision tower at its real width: pictures of 280 and 1,120 tokens, a film's frames, beside transformers.

    python benchmarks/vision.py [--layers 27] [--threads 2] [--rounds 3] [--only 280,1120,film] [--frames 60]
    python benchmarks/vision.py --only again [--layers 27] [--text-layers 2]

Random bf16 weights at the published shape (hidden 1152, MLP 4304, 16 heads of 72, 27 layers, embedder to 2816);
preprocessing left out. Each side runs in a process of its own, in turn, over the same patches and once before it is
measured; transformers gets the film's frames as a batch, as its processor pads them. "Extra" is the most memory that
the process held in its first pass beyond what it held before. The floor is the operations over the measured rate of
bf16 products.

"again" asks two questions about a new picture of 280 tokens, one after the other, through the engine, with some layers
of the text network at the 26B's width behind it: seconds in the tower, and those of reading the prompt.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import step_time
import torch
from machine import bf16_flops, describe, peak_bytes, reset_peak, resident_bytes

from dgemma.config import GenerationConfig, VisionConfig, model_config_from_dict

TEXT_WIDTH = step_time.HIDDEN
QUESTION = 20  # tokens, before the picture and behind it
SHAPE = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_key_value_heads=16, head_dim=72,
             patch_size=16, pooling_kernel_size=3, position_embedding_size=10240, standardize=True)
# Patches (rows, columns) of a picture: 16 : 9 ones of the two budgets, and a frame.
SIZES = {"280": (36, 66), "1120": (72, 138), "film": (18, 33)}


def patches_of(name: str, frames: int) -> torch.Tensor:
    """[pictures, rows, columns, 768] between 0 and 1."""
    rows, columns = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    return torch.rand(frames if name == "film" else 1, rows, columns, 768, generator=generator)


def fill(module: torch.nn.Module) -> None:
    """Random weights that keep activations in range."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            if "std_scale" in name or "norm" in name:
                weight.fill_(1)
            elif weight.is_floating_point() and weight.ndim and "inv_freq" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


def ours(layers: int, patches: torch.Tensor) -> Callable[[], object]:
    from dgemma.nn.vision import Vision

    with torch.device("meta"):
        vision = Vision(VisionConfig(**SHAPE, num_hidden_layers=layers), TEXT_WIDTH)
    vision = vision.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    fill(vision)
    return lambda: vision(list(patches))


def theirs(layers: int, patches: torch.Tensor) -> Callable[[], object]:
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    config = Gemma4VisionConfig(**SHAPE, num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    model = Gemma4VisionModel(config).to(torch.bfloat16).eval().requires_grad_(False)
    fill(model)
    embedder = torch.nn.Linear(SHAPE["hidden_size"], TEXT_WIDTH, bias=False, dtype=torch.bfloat16)
    count, rows, columns = patches.shape[:3]
    places = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1)
    places, flat = places.reshape(1, -1, 2).expand(count, -1, -1), patches.flatten(1, 2)
    return lambda: embedder(model(flat.to(torch.bfloat16), places).last_hidden_state)


def again(layers: int, text: dict, rounds: int, budget: int = 280) -> dict[str, list[list[float]]]:
    """Of every round what the "first" and the "second" question took: seconds in the tower, seconds of reading, tokens
    that were read. ``text`` is the text_config of a network of `TEXT_WIDTH`.
    """
    import numpy as np
    from PIL import Image

    from dgemma.chat.pictures import prepare
    from dgemma.diffusion.request import Request
    from dgemma.engine import Engine, PrefixStore
    from dgemma.engine.pictures import PictureEncoder
    from dgemma.engine.runner import Runner, Slot
    from dgemma.nn import DiffusionTransformer
    from dgemma.nn.vision import Vision

    class Timed(Runner):
        """A runner that counts the seconds in which it reads, and the tokens."""

        seconds, tokens = 0.0, 0

        def read(self, work: Sequence[tuple[Slot, int]]) -> list[bool]:
            began = time.perf_counter()
            finite = super().read(work)
            self.seconds += time.perf_counter() - began
            self.tokens += sum(count for _, count in work)
            return finite

    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": text})
    shape = VisionConfig(**SHAPE, num_hidden_layers=layers)
    with torch.device("meta"):
        network, vision = DiffusionTransformer(config), Vision(shape, TEXT_WIDTH)
    network, vision = (module.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
                       for module in (network, vision))
    step_time.fill(network)
    fill(vision)
    encoder = PictureEncoder(network, shape, lambda: vision, vision=vision)
    runner = Timed(network)
    engine = Engine(network, prefixes=PrefixStore(1 << 30), runner=runner)
    settings = GenerationConfig(max_denoising_steps=1, confidence_threshold=1e-9, max_tokens=1)
    found: dict[str, list[list[float]]] = {"first": [], "second": []}
    for number in range(rounds + 1):
        pixels = np.random.default_rng(number).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
        picture = prepare(Image.fromarray(pixels), budget)
        for asked, times in enumerate(found.values()):
            before, behind = 3 + 100 * number, 5_003 + 100 * asked  # nothing but the picture is there twice
            ids = [*range(before, before + QUESTION), *[2] * picture.tokens,
                   *range(behind, behind + QUESTION)]
            began, runner.seconds, runner.tokens = time.perf_counter(), 0.0, 0
            spans = encoder.spans([picture], [QUESTION])
            seen = time.perf_counter() - began
            for _ in engine.run([Request(0, ids, settings, seed=0, spans=spans, drafts=False)]):
                pass
            if number:  # the first round touches the weights
                times.append([seen, runner.seconds, runner.tokens])
    return found


def operations(layers: int, name: str, frames: int) -> float:
    """Of a pass, a multiplication and an addition counted as two."""
    rows, columns = SIZES[name]
    count, width = rows * columns, SHAPE["hidden_size"]
    layer = count * width * (4 * width + 3 * SHAPE["intermediate_size"]) + 2 * count * count * width
    ends = count * 768 * width + count // 9 * width * TEXT_WIDTH
    return 2.0 * (frames if name == "film" else 1) * (layers * layer + ends)


def measure(side: str, name: str, layers: int, frames: int) -> dict[str, float]:
    run = (ours if side == "dgemma" else theirs)(layers, patches_of(name, frames))
    with torch.inference_mode():
        before = resident_bytes()
        reset_peak()
        run()
        extra, began = peak_bytes() - before, time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - began, "extra": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 27), ("threads", 2), ("rounds", 3), ("frames", 60), ("text-layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default=",".join(SIZES), help="of the default's, or again")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.layers, arguments.frames)))
        return
    print(describe("transformers", "dgemma"))
    if arguments.only == "again":
        print(f"\n{arguments.layers} layers, {arguments.text_layers} of text")
        print(f"{'':8}{'tower s':>9}{'prompt s':>10}{'tokens':>8}")
        text = step_time.text_config(arguments.text_layers)
        for name, times in again(arguments.layers, text, arguments.rounds).items():
            tower, prompt, tokens = map(statistics.median, zip(*times, strict=True))
            print(f"{name:8}{tower:9.4f}{prompt:10.4f}{tokens:8.0f}")
        return
    flops = bf16_flops()
    print(f"\n{arguments.layers} layers\n{'':8}{'':14}{'seconds':>9}{'min':>8}{'max':>8}{'x floor':>9}{'extra MB':>10}")
    for name in arguments.only.split(","):
        found: dict[str, list[dict[str, float]]] = {"dgemma": [], "transformers": []}
        for _ in range(arguments.rounds):
            for side, results in found.items():
                command = [sys.executable, __file__, "--child", side, name, "--layers", str(arguments.layers),
                           "--threads", str(arguments.threads), "--frames", str(arguments.frames)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        floor = operations(arguments.layers, name, arguments.frames) / flops
        for side, results in found.items():
            seconds = [result["seconds"] for result in results]
            median, extra = statistics.median(seconds), statistics.median(result["extra"] for result in results)
            print(f"{name:8}{side:14}{median:9.2f}{min(seconds):8.2f}{max(seconds):8.2f}{median / floor:9.2f}"
                  f"{extra / 1e6:10.0f}", flush=True)


if __name__ == "__main__":
    main()
