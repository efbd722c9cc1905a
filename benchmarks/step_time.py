"""A denoising step at the 26B-A4B's width, a few layers of it: dgemma and transformers on the same shapes, one run.

    python benchmarks/step_time.py [--layers 3] [--threads 2] [--steps 6] [--only dgemma]

Full width (hidden 2816, 128 experts of 704, vocabulary 262144, canvas 256), random bf16 weights, prompt of 64 tokens,
self-conditioning, head and sampler included. Each side runs in a process of its own. "Extra memory" is the most that
the process held during the steps beyond what it held when they began.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

import torch
from machine import bf16_flops, describe, peak_bytes, read_bandwidth, reset_peak, resident_bytes

PROMPT, CANVAS, VOCAB, HIDDEN = 64, 256, 262_144, 2816


def text_config(layers: int) -> dict:
    """The 26B-A4B's text_config with fewer layers, every third one full."""
    kinds = ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(layers)]
    return {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2112, "num_hidden_layers": layers,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
            "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8,
            "moe_intermediate_size": 704, "use_bidirectional_attention": "vision",
            "layer_types": [*kinds[:-1], "full_attention"]}


def fill(module: torch.nn.Module) -> None:
    """Random weights, cheaply: matrices small and uniform (one block repeated), vectors and scalars 1."""
    block = ((torch.rand(1 << 22) - 0.5) * 0.05).bfloat16()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
        for name, buffer in module.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(1.0)


def run_dgemma(layers: int, steps: int) -> dict:
    from dgemma.config import GenerationConfig, model_config_from_dict
    from dgemma.diffusion.events import CanvasStarted, Denoised
    from dgemma.diffusion.request import Request
    from dgemma.engine import Engine
    from dgemma.nn import DiffusionTransformer

    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": text_config(layers)})
    with torch.device("meta"):
        network = DiffusionTransformer(config)
    network = network.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    fill(network)
    engine = Engine(network)
    settings = GenerationConfig(max_denoising_steps=steps, confidence_threshold=1e-9, max_tokens=CANVAS)
    loaded, at = resident_bytes(), []
    for event in engine.run([Request(0, list(range(3, 3 + PROMPT)), settings, seed=0)]):
        if isinstance(event, CanvasStarted):
            reset_peak()
            loaded = resident_bytes()
        if isinstance(event, (CanvasStarted, Denoised)):
            at.append(time.perf_counter())
    return summary(at, loaded)


def transformers_model(layers: int):
    """transformers' network of the same shape, random bfloat16 weights."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )
    from transformers.initialization import no_init_weights

    vision = Gemma4VisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                num_key_value_heads=2, head_dim=32, position_embedding_size=64)
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(
            text_config=DiffusionGemmaTextConfig(**text_config(layers)), vision_config=vision, canvas_length=CANVAS))
    model.tie_weights()
    torch.set_default_dtype(torch.float32)
    fill(model)
    for module in model.modules():  # what no_init_weights left out: rotary tables and the embedding scale
        if type(module).__name__ in ("DiffusionGemmaTextRotaryEmbedding", "DiffusionGemmaTextScaledWordEmbedding"):
            model._init_weights(module)
    return model.eval()


def run_transformers(layers: int, steps: int) -> dict:
    model = transformers_model(layers)

    class Clock:
        """A streamer that notes when prompt and drafts arrive."""

        def __init__(self) -> None:
            self.at: list[float] = []
            self.loaded = 0

        def put(self, value: torch.Tensor) -> None:
            if not self.at:
                reset_peak()
                self.loaded = resident_bytes()
            self.at.append(time.perf_counter())

        def put_draft(self, value: torch.Tensor) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    prompt = torch.arange(3, 3 + PROMPT).unsqueeze(0)
    model.generate(prompt, max_new_tokens=CANVAS, max_denoising_steps=steps, confidence_threshold=1e-9, streamer=clock)
    return summary(clock.at[: steps + 1], clock.loaded)


def summary(at: list[float], loaded: int) -> dict:
    """``at``: when the canvas opened (or the prompt came) and when each step was done; the first step is a warm-up."""
    steps = [b - a for a, b in itertools.pairwise(at)][1:]
    return {"seconds_per_step": statistics.median(steps), "steps": steps, "loaded_bytes": loaded,
            "extra_bytes": peak_bytes() - loaded}


def floors(layers: int) -> tuple[float, float]:
    """A step's operations over the measured bf16 rate and its bytes over the measured bandwidth, in seconds."""
    sliding = HIDDEN * 256 * (16 + 8 + 8 + 16)
    full = HIDDEN * 512 * (16 + 2 + 16)
    count_full = sum(kind == "full_attention" for kind in text_config(layers)["layer_types"])
    attention = (layers - count_full) * sliding + count_full * full
    dense = layers * 3 * HIDDEN * 2112
    expert = 3 * HIDDEN * 704
    macs = CANVAS * (attention + dense + layers * 8 * expert + 3 * HIDDEN * 2112 + 2 * VOCAB * HIDDEN)
    weights = attention + dense + layers * 128 * expert + VOCAB * HIDDEN
    return 2 * macs / bf16_flops(), 2 * weights / read_bandwidth()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", choices=["dgemma", "transformers"])
    parser.add_argument("--child", choices=["dgemma", "transformers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.child:
        run = run_dgemma if arguments.child == "dgemma" else run_transformers
        print(json.dumps(run(arguments.layers, arguments.steps)))
        return
    print(describe("transformers", "dgemma"))
    operations, reading = floors(arguments.layers)
    print(f"floor for {arguments.layers} layers: operations {operations:.2f} s, weights read once {reading:.2f} s\n")
    print(f"{'':14}{'s/step':>8}{'min':>8}{'max':>8}{'x floor':>9}{'loaded GB':>11}{'extra MB':>10}")
    results = {}
    for name in [arguments.only] if arguments.only else ["dgemma", "transformers"]:
        command = [sys.executable, __file__, "--child", name, "--layers", str(arguments.layers), "--threads",
                   str(arguments.threads), "--steps", str(arguments.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = results[name] = json.loads(done.stdout.splitlines()[-1])
        seconds = result["seconds_per_step"]
        print(f"{name:14}{seconds:8.2f}{min(result['steps']):8.2f}{max(result['steps']):8.2f}"
              f"{seconds / max(operations, reading):9.2f}{result['loaded_bytes'] / 1e9:11.2f}"
              f"{result['extra_bytes'] / 1e6:10.0f}", flush=True)
    if len(results) == 2:
        ours, theirs = results["dgemma"], results["transformers"]
        print(f"\ndgemma: {theirs['seconds_per_step'] / ours['seconds_per_step']:.1f} x faster per step, "
              f"1/{theirs['extra_bytes'] / ours['extra_bytes']:.0f} of the extra memory")


if __name__ == "__main__":
    main()
