"""The memory plan of training held against measurement: slices of the 26B-A4B at full width, a step in each setting.

    python benchmarks/train_memory.py [--layers 1,2,3] [--packed] [--context 256,1024] [--threads 2]
    python benchmarks/train_memory.py --small --train full        # everything trained, on a narrower shape
    python benchmarks/train_memory.py --device cuda --layers 30 --packed --train lora,experts     # the real thing

Random weights: bf16, or packed as Q4_K_M's own types (a GGUF file in a temporary folder, mapped on a CPU, copied to a
GPU). Each setting takes two whole steps (both passes, both losses, backward, AdamW) in a process of its own. Measured
is the most that the process ever held: resident memory, libraries included, on a CPU; what the allocator handed out on
a GPU (the plan without its runtime line beside it). `--plan-only` prints the 26B-A4B's plans and measures nothing.
"""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import random_gguf
import torch
from machine import describe, peak_bytes, reset_peak, resident_bytes

from dgemma.config import FULL, SLIDING, LayerConfig, ModelConfig
from dgemma.memory import program_bytes
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, attach
from dgemma.train.checks.plan import MemoryPlan, memory_plan

TARGETS = {"lora": ("attention", "mlp"), "experts": ("attention", "mlp", "experts"), "full": ()}
SMALL = {"hidden": 1024, "dense": 768, "experts": 32, "expert": 256, "heads": 8, "sliding_heads": 4, "full_heads": 2,
         "sliding_dim": 128, "full_dim": 256}


def shape_of(setting: dict[str, Any]) -> random_gguf.Shape:
    narrow = SMALL if setting["small"] else {}
    return random_gguf.Shape(layers=setting["layers"], vocab=setting["vocab"], **narrow)


def config_of(shape: random_gguf.Shape) -> ModelConfig:
    """The same shape as the network's configuration."""
    layers = tuple(LayerConfig(SLIDING, shape.sliding_dim, shape.sliding_heads, 1e4, 1.0) if shape.is_sliding(i) else
                   LayerConfig(FULL, shape.full_dim, shape.full_heads, 1e6, 0.25) for i in range(shape.layers))
    return ModelConfig(shape.vocab, shape.hidden, shape.dense, shape.heads, shape.experts, shape.experts_used,
                       shape.expert, shape.window, layers, canvas_length=shape.canvas)


def plan_for(setting: dict[str, Any]) -> MemoryPlan:
    kind = setting["train"]
    adapter = None if kind == "full" else AdapterConfig(r=setting["rank"], targets=TARGETS[kind])
    weights = "Q4_K_M" if setting["packed"] else "F32" if kind == "full" else "BF16"
    return memory_plan(config_of(shape_of(setting)), weights=weights, adapter=adapter, context=setting["context"],
                       micro_batch=setting["batch"], checkpointing=setting["checkpointing"],
                       autocast=kind == "full", device=setting["device"])


def plain_network(config: ModelConfig, dtype: torch.dtype, device: str) -> DiffusionTransformer:
    from dgemma.weights.load import empty_network

    network = empty_network(config).to(dtype).to_empty(device=device)
    block = ((torch.rand(1 << 22) - 0.5) * 0.05).to(device, dtype)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.ndim == 1:
                tensor.fill_(1.0)
                continue
            for part in tensor.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    return network


def packed_network(path: Path, device: str) -> DiffusionTransformer:
    """The network of a file as inference holds it, but on any device."""
    from dgemma.weights.gguf_model import load_gguf_network, open_gguf

    return load_gguf_network(open_gguf(path), device, keep_packed=True)


def measure(setting: dict[str, Any]) -> dict[str, float]:
    """Two steps of training in this process: the most it held, what it held before, and the second step's seconds."""
    from dgemma.nn.passes import Passes
    from dgemma.train.batch import Batch
    from dgemma.train.noise import draw_noise
    from dgemma.train.objective import Objective, batch_loss

    device, kind = setting["device"], setting["train"]
    before = resident_bytes()
    shape = shape_of(setting)
    config = config_of(shape)
    if setting["packed"]:
        network = packed_network(Path(setting["file"]), device)
    else:
        network = plain_network(config, torch.float32 if kind == "full" else torch.bfloat16, device)
    if kind != "full":
        attach(network, AdapterConfig(r=setting["rank"], targets=TARGETS[kind]))
    else:
        network.requires_grad_(True)
    trained = list(network.parameters() if kind == "full" else adapter_parameters(network).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.95, 0.99), fused=True)
    objective, generator = Objective(), torch.Generator().manual_seed(0)
    reset_peak()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    loaded, seconds = resident_bytes(), 0.0
    for _ in range(2):
        began = time.perf_counter()
        batch = Batch(torch.randint(shape.vocab, (setting["batch"], setting["context"]), generator=generator),
                      torch.randint(shape.vocab, (setting["batch"], shape.canvas), generator=generator)).to(
                          torch.device(device))
        noise = draw_noise(objective, setting["batch"], shape.canvas, shape.vocab, generator).to(torch.device(device))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=kind == "full"):
            loss, _ = batch_loss(network, batch, objective, noise, passes=Passes.of(network, setting["checkpointing"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds = time.perf_counter() - began
    peak = peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"peak": peak, "before": before, "loaded": loaded, "seconds": seconds, "loss": value}


def settings_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"layers": int(layers), "context": int(context), "checkpointing": checkpointing == "on", "train": train,
             "packed": arguments.packed, "small": arguments.small, "vocab": arguments.vocab, "rank": arguments.rank,
             "batch": arguments.batch, "device": arguments.device, "threads": arguments.threads}
            for train in arguments.train.split(",") for layers in arguments.layers.split(",")
            for context in arguments.context.split(",") for checkpointing in arguments.checkpointing.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="1,2,3")
    parser.add_argument("--context", default="256,1024")
    parser.add_argument("--checkpointing", default="on,off")
    parser.add_argument("--train", default="lora", help="lora (attention and dense MLP), experts (these, too), full")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--small", action="store_true", help="hidden 1024, 32 experts of 256, heads of 128 and 256")
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        setting = json.loads(arguments.child)
        torch.set_num_threads(setting["threads"])
        print(json.dumps(measure(setting)))
        return
    if arguments.plan_only:
        for train in ("lora", "experts"):
            setting = {"layers": 30, "context": 1024, "checkpointing": True, "train": train, "packed": True,
                       "small": False, "vocab": 262_144, "rank": arguments.rank, "batch": 1,
                       "device": arguments.device}
            print(f"26B-A4B, Q4_K_M, rank {arguments.rank} on {', '.join(TARGETS[train])}\n"
                  f"{plan_for(setting).text(24_000_000_000)}\n")
        return
    print(describe())
    if arguments.device != "cpu":
        print(torch.cuda.get_device_name())
    print(f"{'train':>8}{'layers':>7}{'context':>8}{'chkpt':>6}{'plan GB':>9}{'meas. GB':>9}{'ratio':>7}"
          f"{'rest: plan':>11}{'measured':>9}{'ratio':>7}{'s/step':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings_of(arguments):
            report(setting, Path(folder))


def report(setting: dict[str, Any], folder: Path) -> None:
    """Measure one setting in a process of its own and print it beside its plan; packed weights are written before."""
    if setting["packed"]:
        path = folder / f"{setting['layers']}.gguf"
        setting = {**setting, "file": str(path)}
        if not path.exists():
            random_gguf.write(path, shape=shape_of(setting), progress=random_gguf.Ticker())
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(setting)], stdout=subprocess.PIPE,
                          text=True, check=False)
    name = (f"{setting['train']:>8}{setting['layers']:7}{setting['context']:8}"
            f"{'on' if setting['checkpointing'] else 'off':>6}")
    if done.returncode:
        print(f"{name}  ended with {done.returncode}", flush=True)
        return
    seen, plan = json.loads(done.stdout.splitlines()[-1]), plan_for(setting)
    lines = {line.name: line.nbytes for line in plan.lines}
    on_cpu = setting["device"] == "cpu"
    # There is no tokenizer here, and a GPU's runtime is not its allocator's.
    tokenizer = program_bytes(setting["vocab"], training=True) - program_bytes(0, training=True)
    planned = plan.total - (tokenizer if on_cpu else lines["runtime"])
    # What a step takes beside what does not change: the part that has to be estimated.
    fixed = lines["weights"] + lines.get("adapters", 0) + lines["optimizer state"]
    step = planned - fixed
    took = seen["peak"] - fixed
    print(f"{name}{planned / 1e9:9.2f}{seen['peak'] / 1e9:9.2f}{planned / seen['peak']:7.2f}"
          f"{step / 1e9:11.2f}{took / 1e9:9.2f}{step / took:7.2f}{seen['seconds']:8.1f}", flush=True)


if __name__ == "__main__":
    main()
