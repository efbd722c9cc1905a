"""What a busy machine costs: steps, training and serving beside programs that do nothing but compute.

    python benchmarks/busy.py [--loops 2] [--threads 2] [--rounds 3] [--only step,bundled,training,serving,…]

    step           a denoising step, three layers of the 26B-A4B's full shape in Q4_K_M (2.2 GB, written to --dir)
    bundled        a denoising step of the bundled model
    training       a LoRA step on that slice: context 256, canvas 256
    small-training a step of the bundled model, all weights: 8 examples
    serving        four users of the bundled model, one Sudoku each

"slower" is the time beside the loops over the time without; "explained" the same for threads that never wait for each
other: the share of the machine that the loops take. The last column is the one over the other, 1.00 where waiting costs
nothing. Every row is a process of its own, and quiet and busy measurements take turns in it. `--spin` measures OpenMP's
own way of waiting (`OMP_WAIT_POLICY` unset) instead: have patience.
"""

from __future__ import annotations

import os
import sys

import dgemma  # before torch: see dgemma/openmp.py
from dgemma.openmp import PASSIVE

# isort: split
import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from machine import describe

from dgemma.bench import beside_busy_loops, measure

LAYERS, STEPS = 3, 3


def slice_file(folder: Path) -> Path:
    """Three layers of the full shape, written by the first who asks."""
    import random_gguf

    path = folder / f"slice-{LAYERS}.gguf"
    if not path.is_file():
        random_gguf.write(path, layers=LAYERS)
    return path


def step(folder: Path) -> Callable[[], float]:
    network = dgemma.load(slice_file(folder)).network
    return lambda: measure(network, steps=STEPS).seconds_per_step


def bundled(_: Path) -> Callable[[], float]:
    network = dgemma.load("sudoku").network
    return lambda: measure(network, steps=100).seconds_per_step


def training(folder: Path) -> Callable[[], float]:
    import training as lora

    setup = lora.Setup(LAYERS, 256, 1, 1, torch.get_num_threads())
    loss_of, parameters = lora.prepared("packed", setup, folder)
    return lambda: statistics.median(
        lora.train(loss_of, parameters.values(), [lora.inputs(setup, i) for i in range(2)])["seconds"])


def small_training(_: Path) -> Callable[[], float]:
    import training as lora

    from dgemma.train.batch import Batch
    from dgemma.train.noise import draw_noise

    network = dgemma.load("sudoku").network
    network = network.float().train().requires_grad_(True)
    vocab, canvas = network.config.vocab_size, network.config.canvas_length
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (8, canvas + 100), generator=draw)
    example = (Batch(ids[:, :100], ids[:, 100:]), draw_noise(lora.OBJECTIVE, 8, canvas, vocab, draw))
    return lambda: statistics.median(lora.train(lambda *parts: lora.our_loss(network, *parts), network.parameters(),
                                                [example] * 6)["seconds"])


def serving(_: Path) -> Callable[[], float]:
    import serving as users

    model = dgemma.load("sudoku")

    def serve() -> float:
        began = time.perf_counter()
        asyncio.run(users.drive(model, users.sudoku_requests(model, 8), 4))
        return time.perf_counter() - began

    serve()
    return serve


PARTS = {"step": step, "bundled": bundled, "training": training, "small-training": small_training, "serving": serving}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=2, help="busy programs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--dir", type=Path, help="where the slice is written, and kept; default: for this run")
    parser.add_argument("--spin", action="store_true", help="OpenMP's own way of waiting")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        work = PARTS[arguments.child](arguments.dir)
        print(json.dumps(asdict(beside_busy_loops(work, arguments.loops, arguments.rounds))))
        return
    if unknown := set(arguments.only.split(",")) - PARTS.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    print(describe("dgemma"))
    print(f"beside {arguments.loops} busy programs, {arguments.threads} threads"
          f"{', spinning' if arguments.spin else ''}\n")
    print(f"{'':16}{'quiet s':>9}{'busy s':>9}{'slower':>9}{'explained':>11}{'waiting':>9}")
    environment = {name: value for name, value in os.environ.items() if not arguments.spin or name not in PASSIVE}
    if arguments.spin:
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's default; said here, or dgemma would say otherwise
    with tempfile.TemporaryDirectory() as own:
        for part in arguments.only.split(","):
            command = [sys.executable, __file__, "--child", part, "--dir", str(arguments.dir or own),
                       "--loops", str(arguments.loops), "--threads", str(arguments.threads),
                       "--rounds", str(arguments.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            result = json.loads(done.stdout.splitlines()[-1])
            print(f"{part:16}{result['quiet_seconds']:9.3f}{result['busy_seconds']:9.3f}{result['slowdown']:9.2f}"
                  f"{result['explained']:11.2f}{result['ratio']:9.2f}", flush=True)


if __name__ == "__main__":
    main()
