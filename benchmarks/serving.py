"""Many requests at a time: throughput, time to the first text, time of a step; beside one at a time and transformers.

    python benchmarks/serving.py [--model sudoku] [--users 1,4,16,64] [--answers 2] [--threads 2]
    python benchmarks/serving.py --slice 3 --users 1,4,16,64 --steps 2

The first form runs the bundled model: every user asks for Sudokus one after the other, through the engine's service,
and transformers' `generate` gets the same prompts in batches of as many. The second runs random bfloat16 weights at the
26B-A4B's full width, a few layers of it, a prompt of 64 tokens and a fixed number of steps; there transformers is
measured up to --most users (it takes minutes beyond). Every table is one run on one machine.
"""

from __future__ import annotations

import dgemma  # before torch: see dgemma/openmp.py

# isort: split
import argparse
import asyncio
import statistics
import time
from contextlib import suppress
from pathlib import Path

import step_time
import torch
from machine import describe

from dgemma.config import GenerationConfig, model_config_from_dict
from dgemma.diffusion.events import CanvasCommitted, Finished
from dgemma.diffusion.request import Request, no_reader
from dgemma.engine.service import Service
from dgemma.model import Model
from dgemma.nn import DiffusionTransformer
from dgemma.tasks import sudoku

SLICE_PROMPT = 64


def sudoku_requests(model: Model, count: int) -> list[Request]:
    """Requests for fresh medium puzzles, each with a seed of its own."""
    puzzles, _ = sudoku.generate(count, sudoku.BANDS["medium"], seed=77)
    texts = ["".join("." if cell == 0 else str(cell) for cell in puzzle) for puzzle in puzzles]
    most = model.generation_config.max_tokens
    return [model.request(f"Solve {text}", seed=seed, drafts=False, max_tokens=most) for seed, text in enumerate(texts)]


def slice_model(layers: int) -> Model:
    """Random weights at full width behind the interface of a model; its answers are not read."""
    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": step_time.text_config(layers)})
    with torch.device("meta"):
        network = DiffusionTransformer(config)
    network = network.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    step_time.fill(network)
    return Model(network, None, GenerationConfig(), f"{layers} layers")  # type: ignore[arg-type]  # no text here


def slice_requests(count: int, steps: int) -> list[Request]:
    settings = GenerationConfig(max_denoising_steps=steps, confidence_threshold=1e-9, max_tokens=step_time.CANVAS)
    return [Request(0, [3 + seed, *range(100, 99 + SLICE_PROMPT)], settings, seed, drafts=False)
            for seed in range(count)]


async def drive(model: Model, requests: list[Request], users: int) -> dict[str, float]:
    """So many users, each with one request after the other; what they saw."""
    make_reader = no_reader if model.tokenizer is None else model.reader
    service = Service(model.network, make_reader, model.prefixes, max_num_seqs=users)
    model.prefixes.clear()
    service.start()
    waiting, first, tokens = iter(requests), [], 0

    async def user() -> None:
        nonlocal tokens
        for request in waiting:
            began, spoke = time.perf_counter(), False
            async for event in await service.admit(request):
                if isinstance(event, CanvasCommitted) and not spoke:
                    spoke = True
                    first.append(time.perf_counter() - began)
                if isinstance(event, Finished):
                    tokens += len(event.generation.token_ids)

    began = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    seconds = time.perf_counter() - began
    counts = service.stats()
    await service.stop()
    return {"seconds": seconds, "tokens": tokens, "first": statistics.median(first), "steps": counts.steps,
            "rows": counts.denoised}


def theirs(model, requests: list[Request], users: int, pad: int) -> dict[str, float]:
    """transformers' `generate` on the same prompts, in batches of ``users``, padded on the left."""
    settings = requests[0].settings
    names = ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
    options = {name: getattr(settings, name) for name in names} | {"max_new_tokens": settings.max_tokens}
    began, tokens, first = time.perf_counter(), 0, []
    for start in range(0, len(requests), users):
        prompts = [request.prompt_ids for request in requests[start : start + users]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        torch.manual_seed(start)
        batch = time.perf_counter()
        out = model.generate(ids, attention_mask=(ids != pad).long(), **options)
        first += [time.perf_counter() - batch] * len(prompts)
        answers = getattr(out, "sequences", out)[:, width:].tolist()
        tokens += sum(next((i for i, token in enumerate(answer) if token in settings.eos_token_id), len(answer))
                      for answer in answers)
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "first": statistics.median(first)}


def row(name: str, users: int, result: dict[str, float], base: float | None) -> float:
    """Print a line of the table; its throughput."""
    rate = result["tokens"] / result["seconds"]
    gain = "" if base is None else f"{rate / base:8.2f}"
    step = f"{1000 * result['seconds'] / result['steps']:10.1f}" if result.get("steps") else f"{'':10}"
    width = f"{result['rows'] / result['steps']:7.1f}" if result.get("steps") else f"{'':7}"
    print(f"{name:14}{users:6}{result['seconds']:9.2f}{rate:10.1f}{gain:>8}{1000 * result['first']:12.0f}{step}{width}",
          flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--slice", type=int, metavar="LAYERS")
    parser.add_argument("--users", default="1,4,16,64")
    parser.add_argument("--answers", type=int, default=2, help="answers for each user (one user: at least 8)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of every answer of the slice")
    parser.add_argument("--most", type=int, default=4, help="most users of transformers with --slice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe("transformers", "dgemma"))
    users = [int(part) for part in arguments.users.split(",")]
    model = slice_model(arguments.slice) if arguments.slice else dgemma.load(arguments.model)

    def requests_for(count: int) -> list[Request]:
        if arguments.slice:
            return slice_requests(count, arguments.steps)
        return sudoku_requests(model, max(8, count * arguments.answers))

    print(f"\n{'':14}{'users':>6}{'seconds':>9}{'tokens/s':>10}{'gain':>8}{'first ms':>12}{'ms/step':>10}{'rows':>7}")
    asyncio.run(drive(model, requests_for(1)[:2], 1))  # warm up
    ours: dict[int, float] = {}
    for count in users:
        result = asyncio.run(drive(model, requests_for(count), count))
        ours[count] = row("dgemma", count, result, ours.get(users[0]))
    if arguments.no_transformers:
        return
    other, pad = (step_time.transformers_model(arguments.slice), 0) if arguments.slice else checkpoint(arguments.model)
    base = None
    with torch.inference_mode():
        for count in users:
            if arguments.slice and count > arguments.most:
                break
            rate = row("transformers", count, theirs(other, requests_for(count), count, pad), base)
            base = base or rate
            print(f"{'':14}dgemma at {count}: {ours[count] / rate:.1f} x")


def checkpoint(name: str):
    """transformers' own network of a checkpoint folder, in the dtype it is stored in, and the padding token's id."""
    from transformers import DiffusionGemmaForBlockDiffusion

    folder = Path(dgemma.__file__).parent / "models" / name
    folder = folder if folder.is_dir() else Path(name)
    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype="auto").eval(), 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
