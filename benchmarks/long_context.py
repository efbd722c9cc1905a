"""Long prompts: what the cache holds, what a pass takes beside it, and how the time of a denoising step grows.

    python benchmarks/long_context.py [--prompts 2048 8192 32768] [--types bf16 q8_0] [--threads 2] [--steps 3]

Three layers of the 26B-A4B, two sliding and one full, whose attention has its full width (hidden 2816, 16 heads;
sliding: 8 key-value heads of 256, window 1024; full: 2 of 512), random bf16 weights, canvas 256. What a long context
does not touch is small, so that it runs fast: a dense MLP of 256, two experts of 64, a vocabulary of 1024. So prefill
and step times are not those of three real layers; their growth is.

Every line is a process of its own. "Extra" is the most that it held while it read the prompt beyond what it held
before and the cache. The steps' time is split by the kind of layer whose attention took it. The logits of a step behind
the prompt are compared with those behind the first type's cache.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import describe, peak_bytes, reset_peak, resident_bytes

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIG = {
    "model_type": "diffusion_gemma", "canvas_length": 256,
    "text_config": {
        "vocab_size": 1024, "hidden_size": 2816, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 2, "top_k_experts": 2,
        "moe_intermediate_size": 64, "layer_types": [SLIDING, SLIDING, FULL], "max_position_embeddings": 262_144,
    },
}


def random_network(cache_type: str):
    from dgemma.config import model_config_from_dict
    from dgemma.nn import DiffusionTransformer

    torch.manual_seed(0)
    network = DiffusionTransformer(model_config_from_dict(CONFIG), cache_type)
    network.to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        width = parameter.shape[-1]
        if parameter.ndim > 1:
            parameter.normal_(0.0, 2 * width**-0.5 if "embed_tokens" in name else width**-0.5)
        elif "q_norm" in name:
            parameter.fill_(3 * width**-0.5)  # scores of deviation 3: neither flat nor a choice of one
    return network


def measure(prompt: int, cache_type: str, steps: int, save: Path) -> dict:
    from dgemma.cache.store import READ_AT_ONCE
    from dgemma.memory.inference import kv_cache_bytes, working_bytes

    network = random_network(cache_type)
    ids = torch.randint(1024, (1, prompt), generator=torch.Generator().manual_seed(1))
    canvas = torch.randint(1024, (1, 256), generator=torch.Generator().manual_seed(2))
    took: dict[str, list[float]] = {SLIDING: [], FULL: []}
    began: dict[str, float] = {}
    for block, layer in zip(network.layers, network.config.layers, strict=True):
        block.self_attn.register_forward_pre_hook(lambda *_: began.update(now=time.perf_counter()))
        block.self_attn.register_forward_hook(
            lambda *_, kind=layer.kind: took[kind].append(time.perf_counter() - began["now"]))
    with torch.inference_mode():
        network.denoise(canvas, network.new_cache(1))  # whatever is set up once
        loaded = resident_bytes()
        reset_peak()
        cache, start = network.new_cache(1), time.perf_counter()
        for piece in ids.split(READ_AT_ONCE, dim=1):
            network.encode(piece, cache)
        prefill = time.perf_counter() - start
        extra = peak_bytes() - loaded - cache.nbytes
        network.denoise(canvas, cache)
        took.update({SLIDING: [], FULL: []})
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            hidden = network.denoise(canvas, cache)
            times.append(time.perf_counter() - start)
        torch.save(network.logits(hidden), save)
    return {"prefill": prefill, "cache": cache.nbytes, "computed": kv_cache_bytes(network.config, prompt, cache_type),
            "extra": extra, "estimate": working_bytes(network.config, prompt, 2),
            "step": statistics.median(times),
            "sliding": statistics.median(took[SLIDING]), "full": statistics.median(took[FULL])}


def difference(exact: Path, other: Path) -> str:
    exact_logits, logits = torch.load(exact), torch.load(other)
    gap = (logits - exact_logits).abs()
    same = (logits.argmax(-1) == exact_logits.argmax(-1)).float().mean()
    return (f"largest {gap.max():.3f}, root mean square {gap.square().mean().sqrt():.4f} (logits' deviation "
            f"{exact_logits.std():.2f}); {same:.1%} of the positions have the same first choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--types", nargs="+", default=["bf16", "q8_0"], choices=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("PROMPT", "TYPE", "SAVE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        prompt, cache_type, save = arguments.child
        print(json.dumps(measure(int(prompt), cache_type, arguments.steps, Path(save))))
        return
    print(describe("dgemma"))
    print(f"\n{'prompt':>7} {'cache':5}{'tokens/s':>9}{'cache MB':>10}{'computed':>10}{'extra MB':>9}{'estimate':>9}"
          f"{'s/step':>8}{'sliding':>9}{'full':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for prompt in arguments.prompts:
            saved = []
            for cache_type in arguments.types:
                saved.append(Path(folder) / f"{prompt}-{cache_type}.pt")
                done = subprocess.run(
                    [sys.executable, __file__, "--threads", str(arguments.threads), "--steps", str(arguments.steps),
                     "--child", str(prompt), cache_type, str(saved[-1])], stdout=subprocess.PIPE, text=True, check=True)
                r = json.loads(done.stdout.splitlines()[-1])
                print(f"{prompt:7} {cache_type:5}{prompt / r['prefill']:9.0f}{r['cache'] / 1e6:10.2f}"
                      f"{r['computed'] / 1e6:10.2f}{r['extra'] / 1e6:9.0f}{r['estimate'] / 1e6:9.0f}{r['step']:8.3f}"
                      f"{r['sliding']:9.3f}{r['full']:8.3f}", flush=True)
            for cache_type, path in zip(arguments.types[1:], saved[1:], strict=True):
                print(f"        {cache_type} against {arguments.types[0]}: {difference(saved[0], path)}", flush=True)
    print("\nsliding, full: seconds that one layer's attention takes in a step, projections included")


if __name__ == "__main__":
    main()
