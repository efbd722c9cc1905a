"""One LoRA training step at the 26B-A4B's width, a few layers of it: dgemma against transformers + PEFT, one run.

    python benchmarks/training.py [--layers 2] [--context 512] [--batch 1] [--steps 2] [--rounds 2] [--sides dgemma,...]

Both sides do the same step: the encoder reads the context and the clean canvas (causal loss on all of it), a pass
without gradient over the noisy canvas gives self-conditioning, a second pass over it the canvas loss; backward, clip,
AdamW. Same random bf16 weights, adapters (attention and dense MLP), tokens and noise; the losses printed must agree.
The rival is written as a careful user of the public recipes would: one encoder pass for both parts, cross-entropy over
[tokens, vocabulary]. PEFT sees encoder and decoder as two sets of modules although their weights are one; here they
share one pair of factors per matrix, as ours do, so that both train as many numbers. `packed` is ours over a Q4_K_M
base, for which a CPU has no counterpart there.

Every measurement is a process of its own, the sides take turns. "Processor s" is what a step took of the processor, all
threads together: on a machine that others use, the figure to compare (with one thread). "Over weights" is the most
memory that the process held while training beyond what it held when the weights were there. The floor is the step's
operations over the measured rate of bf16 products; nothing is counted twice that checkpointing computes twice.
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
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import bf16_flops, describe, peak_bytes, reset_peak, resident_bytes
from step_time import CANVAS, HIDDEN, VOCAB, fill, text_config, transformers_model
from torch import Tensor, nn

from dgemma.config import model_config_from_dict
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, attach
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch
from dgemma.train.noise import Noise, corrupt, draw_noise
from dgemma.train.objective import Objective, batch_loss

OBJECTIVE = Objective(self_conditioning_probability=1.0)  # every step has the first pass, on both sides
SIDES = ("transformers", "transformers-checkpointing", "dgemma", "dgemma-checkpointing", "packed",
         "packed-checkpointing")
RANK, ALPHA = 16, 32
# What `attention` and `mlp` mean to PEFT: in both of its copies of a layer.
TARGETS = r".*\.(language_model|decoder)\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."


@dataclass(frozen=True)
class Setup:
    """What a step works on."""

    layers: int
    context: int
    batch: int
    steps: int
    threads: int


Loss = Callable[[Batch, Noise], Tensor]


def inputs(setup: Setup, step: int) -> tuple[Batch, Noise]:
    """The tokens and the noise of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCAB, (setup.batch, setup.context + CANVAS), generator=generator)
    return (Batch(ids[:, : setup.context], ids[:, setup.context :]),
            draw_noise(OBJECTIVE, setup.batch, CANVAS, VOCAB, generator))


@torch.no_grad()
def start(name: str, a: Tensor, b: Tensor) -> None:
    """Factors that depend on the matrix' name only; b is small but not zero, so that both have gradients."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) * a.shape[-1] ** -0.5)
    b.copy_(torch.randn(b.shape, generator=generator) * 1e-3)


def our_adapters(network: DiffusionTransformer) -> dict[str, nn.Parameter]:
    """Adapters on the network, and their parameters by name."""
    attach(network, AdapterConfig(r=RANK, alpha=ALPHA))
    parameters = adapter_parameters(network)
    for name in {name.rpartition(".")[0] for name in parameters}:
        start(name, parameters[f"{name}.a"], parameters[f"{name}.b"])
    return parameters


def our_loss(network: DiffusionTransformer, batch: Batch, noise: Noise, checkpointing: bool = False) -> Tensor:
    return batch_loss(network, batch, OBJECTIVE, noise, passes=Passes.of(network, checkpointing))[0]


def peft_adapters(model: Any) -> dict[str, nn.Parameter]:
    """PEFT's LoRA on transformers' model, encoder and decoder sharing it; parameters by our names."""
    import peft

    peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    parameters = {}
    for name, module in modules.items():
        if name.startswith(ENCODER):
            twin = modules[DECODER + name.removeprefix(ENCODER)]
            module.lora_A, module.lora_B = twin.lora_A, twin.lora_B
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        ours = name.removeprefix(DECODER)
        start(ours, a, b)
        parameters |= {f"{ours}.a": a, f"{ours}.b": b}
    return parameters


def their_loss(model: Any, batch: Batch, noise: Noise) -> Tensor:
    """`batch_loss` written for transformers' model; context and canvas must fit the sliding window."""
    context, canvas = batch.context, batch.canvas
    ids = torch.cat([context, canvas], dim=1)
    encoded = model.model.encoder(input_ids=ids)
    cache = encoded.past_key_values
    cache.crop(-canvas.shape[1])  # the decoder sees the context only
    t = OBJECTIVE.t_min + (OBJECTIVE.t_max - OBJECTIVE.t_min) * noise.t[0]
    noisy = corrupt(canvas, t, noise.draw, noise.tokens)
    with torch.no_grad():
        first = model(past_key_values=cache, decoder_input_ids=noisy).logits / OBJECTIVE.temperature
    logits = model(past_key_values=cache, decoder_input_ids=noisy, self_conditioning_logits=first,
                   self_conditioning_mask=noise.conditioned).logits
    del first
    loss = F.cross_entropy(logits.flatten(0, 1), canvas.flatten())
    del logits
    causal = model.lm_head(encoded.last_hidden_state[:, :-1]).float()
    causal = torch.tanh(causal / model.final_logit_softcapping) * model.final_logit_softcapping
    return loss + OBJECTIVE.causal_weight * F.cross_entropy(causal.flatten(0, 1), ids[:, 1:].flatten())


def our_network(layers: int) -> DiffusionTransformer:
    """Full width, random bfloat16 weights."""
    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": text_config(layers)})
    with torch.device("meta"):
        network = DiffusionTransformer(config)
    network = network.to(torch.bfloat16).to_empty(device="cpu").train().requires_grad_(False)
    same_weights(network)
    return network


def same_weights(module: nn.Module) -> None:
    """The same random weights on both sides, whatever building the module has drawn before."""
    torch.manual_seed(0)
    fill(module)


def packed_network(path: Path) -> DiffusionTransformer:
    """The GGUF file's network, every page of its weights read once."""
    from dgemma.kernels import PackedWeight
    from dgemma.weights.gguf_model import load_gguf_network, open_gguf

    network = load_gguf_network(open_gguf(path), device=torch.device("cpu"), dtype=None, progress=None)
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, PackedWeight):
                value.data.sum()
    return network.train()


def prepared(side: str, setup: Setup, folder: Path) -> tuple[Loss, dict[str, nn.Parameter]]:
    """A side's loss and what it trains."""
    base, _, checkpointing = side.partition("-")
    if base == "transformers":
        model = transformers_model(setup.layers).train()
        same_weights(model)
        parameters = peft_adapters(model)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return lambda *arguments: their_loss(model, *arguments), parameters
    network = packed_network(gguf(setup, folder)) if base == "packed" else our_network(setup.layers)
    return lambda *arguments: our_loss(network, *arguments, bool(checkpointing)), our_adapters(network)


def gguf(setup: Setup, folder: Path) -> Path:
    """The slice as a Q4_K_M file, written by the first who asks."""
    from random_gguf import write

    path = folder / f"slice-{setup.layers}.gguf"
    if not path.is_file():
        write(path, layers=setup.layers)
    return path


def train(loss_of: Loss, parameters: Iterable[nn.Parameter], batches: Iterable[tuple[Batch, Noise]]) -> dict:
    """Steps over the batches: every step's loss, and the seconds of all but the first, passed and of processor time."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.99))
    losses, seconds, processor = [], [], []
    for batch, noise in batches:
        began, worked = time.perf_counter(), time.process_time()
        loss = loss_of(batch, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)
    return {"losses": losses, "seconds": seconds[1:], "processor": processor[1:]}


def measure(side: str, setup: Setup, folder: Path) -> dict:
    """One side in this process."""
    loss_of, parameters = prepared(side, setup, folder)
    loaded = resident_bytes()
    reset_peak()
    result = train(loss_of, parameters.values(), [inputs(setup, step) for step in range(setup.steps + 1)])
    return result | {"loaded": loaded, "peak": peak_bytes(), "trained": sum(p.numel() for p in parameters.values())}


def operations(setup: Setup) -> int:
    """Multiplications and additions that a step cannot do without, adapters aside.

    Tokens pass the layers forward, and backward once more (nothing but the adapters is trained); the first pass has no
    backward. The head: logits of the first pass and its soft embeddings, logits of both losses and their gradients.
    """
    full = [kind == "full_attention" for kind in text_config(setup.layers)["layer_types"]]
    context, read = setup.context, setup.context + CANVAS
    macs = 0
    for is_full in full:
        dim, kv_heads = (512, 2) if is_full else (256, 8)
        projections = HIDDEN * dim * (2 * 16 + kv_heads * (1 if is_full else 2))
        token = projections + 3 * HIDDEN * 2112 + 8 * 3 * HIDDEN * 704
        macs += (2 * read + 3 * CANVAS) * token
        macs += 16 * dim * (6 * read * (read + 1) // 2 + 8 * CANVAS * (context + CANVAS))
    macs += 3 * CANVAS * 3 * HIDDEN * 2112  # self-conditioning
    macs += (4 * CANVAS + 2 * (read - 1)) * HIDDEN * VOCAB
    return 2 * setup.batch * macs


def report(setup: Setup, results: dict[str, list[dict]]) -> list[str]:
    """The table's lines."""
    floor = operations(setup) / bf16_flops()
    tokens = setup.batch * (setup.context + CANVAS)
    lines = [f"{setup.layers} layers, context {setup.context}, canvas {CANVAS}, batch {setup.batch}, rank {RANK}; "
             f"floor {floor:.1f} s a step", "",
             f"{'':28}{'s/step':>8}{'min':>8}{'max':>8}{'processor s':>13}{'x floor':>9}{'tokens/s':>10}"
             f"{'over weights GB':>17}{'in all GB':>11}  losses"]
    for side, runs in results.items():
        seconds, median = [one for run in runs for one in run["seconds"]], middle(runs, "seconds")
        extra = max(run["peak"] - run["loaded"] for run in runs) / 1e9
        whole = max(run["peak"] for run in runs) / 1e9
        lines.append(f"{side:28}{median:8.2f}{min(seconds):8.2f}{max(seconds):8.2f}{middle(runs, 'processor'):13.2f}"
                     f"{median / floor:9.2f}{tokens / median:10.1f}{extra:17.2f}{whole:11.2f}  "
                     + " ".join(f"{loss:.4f}" for loss in runs[0]["losses"]))
    return lines + [""] + [line for rival in SIDES[:2] for ours in SIDES[2:] if rival in results and ours in results
                           for line in [compared(ours, results[ours], rival, results[rival])]]


def middle(runs: list[dict], key: str) -> float:
    """The median over all steps of all runs."""
    return statistics.median([one for run in runs for one in run[key]])


def compared(ours: str, our_runs: list[dict], rival: str, their_runs: list[dict]) -> str:
    """One line: how many times faster, and the part of the memory."""
    def extra(runs: list[dict]) -> int:
        return max(run["peak"] - run["loaded"] for run in runs)

    whole = max(run["peak"] for run in our_runs) / max(run["peak"] for run in their_runs)
    passed, worked = (middle(their_runs, key) / middle(our_runs, key) for key in ("seconds", "processor"))
    return (f"{ours} against {rival}: {passed:.2f} x faster ({worked:.2f} x in processor time), "
            f"{extra(our_runs) / extra(their_runs):.2f} of the memory over the weights, {whole:.2f} of all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("context", 512), ("batch", 1), ("steps", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=2, help="how often every side is measured, in turn")
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated, of the default's")
    parser.add_argument("--dir", type=Path, help="where the packed slice is written, and kept; default: for this run")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setup = Setup(arguments.layers, arguments.context, arguments.batch, arguments.steps, arguments.threads)
    torch.set_num_threads(setup.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.child, setup, arguments.dir)))
        return
    sides = arguments.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides: there is no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    print(describe("transformers", "peft", "dgemma"), flush=True)
    results: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as own:
        numbers = [part for name, value in asdict(setup).items() for part in (f"--{name}", str(value))]
        for _ in range(arguments.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--child", side, "--dir", str(arguments.dir or own), *numbers]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{side}: {results[side][-1]}", file=sys.stderr, flush=True)
    print("\n".join(report(setup, results)))


if __name__ == "__main__":
    main()
