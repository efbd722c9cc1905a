"""dgemma at the 26B-A4B's full shape: random weights in Q4_K_M on disk, real commands on them, rivals beside.

    python benchmarks/full_shape.py [--dir runs/full-shape] [--only memory,steps,…] [--layers 30] [--threads 2]

Parts, in this order (all of them unless `--only` names some):

    file          write the file, 16.8 GB, unless it is there already
    floors        memory bandwidth, int8 rate, and what follows for one step: no step can be faster
    load          seconds to load it from a warm page cache
    memory        resident memory of `dgemma run` through load, prefill of 2,000 tokens and two canvases
    steps         seconds per denoising step by part beside the floor, prefill tokens per second
    growth        the same with threads, context and canvas
    cold          `dgemma run` on a file that is not in the page cache
    squeeze       `dgemma run` with less memory than the file: slower, not dead (Linux, root or systemd)
    llamacpp      llama.cpp on three layers of the same shapes, scaled (llamacpp_time.py)
    transformers  transformers in bf16 on one and three layers, scaled (step_time.py)

Results go to the screen and to results.json in the folder; a part that cannot run here says why. `--layers 3` makes a
quick version of everything. Nothing else should run on the machine.
"""

from __future__ import annotations

import dgemma  # before torch: see dgemma/openmp.py

# isort: split
import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llamacpp_time
import random_gguf
import torch
from machine import describe, read_bandwidth
from outside import CannotRun, Watched, cached_part, drop, memory_limit, warm, watch

from dgemma.machine import usable_cores

PROMPT_TOKENS, CANVAS = 2000, 256
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setup:
    """What all parts work with."""

    folder: Path
    shape: random_gguf.Shape
    mix: str
    threads: int
    steps: int
    limit: float  # of `squeeze`, as a part of the file's size
    llama_bench: Path | None

    @property
    def file(self) -> Path:
        whole = self.shape.layers == random_gguf.Shape.layers
        return self.folder / (f"{self.mix}.gguf" if whole else f"{self.mix}-{self.shape.layers}-layers.gguf")


# Two places that ask dgemma itself.


def int8_ops(threads: int) -> float:
    """Measured peak of int8 products on this processor, operations per second (a multiply-add is two)."""
    from dgemma.kernels import native

    return native.peak_operations(threads)


def measure(path: Path, *, threads: int, context: int, canvas: int, steps: int) -> dict[str, Any]:
    """One setting of the engine's own measurement, in this process: `dgemma.bench.measure` on the file."""
    from dgemma.bench import measure as bench_measure

    torch.set_num_threads(threads)
    network = dgemma.load(path).network
    return dataclasses.asdict(bench_measure(network, context=context, canvas=canvas, steps=steps))


# The real command.


def dgemma_run(file: Path, canvases: int, steps: int) -> list[str]:
    """`dgemma run` reading its prompt from standard input; every canvas takes all its steps."""
    program = Path(sys.executable).with_name("dgemma")
    start = [str(program)] if program.exists() else [sys.executable, "-c", "from dgemma.cli.main import main; main()"]
    return [*start, "run", "-", "-m", str(file), "--json", "--seed", "0", "--max-tokens", str(canvases * CANVAS),
            "--max-denoising-steps", str(steps), "--confidence-threshold", "1e-9"]


def digits(count: int) -> str:
    """A text of ``count`` tokens: digits merge with nothing."""
    return ("31415926535897932384626433832795" * (count // 32 + 1))[:count]


def answer_of(seen: Watched) -> dict[str, Any]:
    """What a `dgemma run --json` said."""
    if seen.returncode:
        raise CannotRun(f"dgemma run ended with {seen.returncode}: {seen.stderr.strip()[-1000:]}")
    answer = json.loads(seen.stdout)
    return {name: answer[name] for name in ("steps", "prompt_tokens", "seconds", "finish_reason")}


# What one step costs at least.


def work(shape: random_gguf.Shape, mix: str, canvas: int = CANVAS, context: int = 0) -> dict[str, dict[str, float]]:
    """Packed bytes to read and operations to do in one denoising step, by part.

    An expert is read if any token of the canvas chooses it. Embedding and head are one table, read once for the head
    and the soft embedding together. Attention counts its projections, the cache (two bytes a number) and the products
    with it.
    """
    specs = {spec.name: spec for spec in random_gguf.tensor_specs(shape, mix)}
    parts = {name: {"bytes": 0.0, "operations": 0.0} for name in ("experts", "dense", "attention", "head",
                                                                 "soft embedding")}

    def add(part: str, nbytes: float, multiply_adds: float) -> None:
        parts[part]["bytes"] += nbytes
        parts[part]["operations"] += 2 * multiply_adds

    used = 1 - (1 - shape.experts_used / shape.experts) ** canvas
    for name, spec in specs.items():
        if spec.values is not None:
            continue
        weights = 1.0
        for size in spec.shape:
            weights *= size
        if "_exps." in name:
            add("experts", spec.nbytes * used, canvas * weights * shape.experts_used / shape.experts)
        elif ".attn_" in name:
            add("attention", spec.nbytes, canvas * weights)
        elif name.startswith("token_embd"):
            add("head", spec.nbytes, canvas * weights)
            add("soft embedding", 0, canvas * weights)
        else:
            add("dense", spec.nbytes, canvas * weights)
    for layer in range(shape.layers):
        if shape.is_sliding(layer):
            seen, heads, dim = min(context, shape.window - 1), shape.sliding_heads, shape.sliding_dim
        else:
            seen, heads, dim = context, shape.full_heads, shape.full_dim
        add("attention", 2 * 2 * seen * heads * dim, 2 * canvas * (seen + canvas) * shape.heads * dim)
    return parts


def floors(parts: dict[str, dict[str, float]], bandwidth: float, int8: float | None) -> dict[str, float]:
    """Seconds that each part and the whole step take at least; without an int8 rate, those of reading alone."""
    everything = {what: sum(part[what] for part in parts.values()) for what in ("bytes", "operations")}
    return {name: max(part["bytes"] / bandwidth, part["operations"] / int8 if int8 else 0.0)
            for name, part in {**parts, "step": everything}.items()}


# The parts.


def part_file(setup: Setup) -> dict[str, Any]:
    ensure_file(setup)
    size = setup.file.stat().st_size
    print(f"{setup.file}: {size / 1e9:.2f} GB, {cached_part(setup.file):.0%} of it in the page cache")
    return {"bytes": size}


def ensure_file(setup: Setup) -> None:
    """Write the file if it is not there; says first when there is not enough room for it."""
    if setup.file.exists():
        return
    setup.folder.mkdir(parents=True, exist_ok=True)
    need, free = random_gguf.expected_bytes(setup.shape, setup.mix), shutil.disk_usage(setup.folder).free
    if need + (1 << 30) > free:
        raise CannotRun(f"{setup.folder} has {free / 1e9:.1f} GB free, the file takes {need / 1e9:.1f} GB and 1 GB "
                        "shall be left: give another folder by --dir")
    random_gguf.write(setup.file, mix=setup.mix, shape=setup.shape, progress=random_gguf.Ticker())


def part_floors(setup: Setup) -> dict[str, Any]:
    import torch

    torch.set_num_threads(setup.threads)
    bandwidth = read_bandwidth()
    try:
        int8: float | None = int8_ops(setup.threads)
    except NotImplementedError as error:
        print(f"{error}; the floors below are those of reading alone")
        int8 = None
    parts = work(setup.shape, setup.mix)
    least = floors(parts, bandwidth, int8)
    rate = f"{int8 / 1e12:.2f} TOP/s int8" if int8 else "int8 not measured"
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s, {rate}, {setup.threads} threads")
    for name, part in parts.items():
        print(f"{name:16}{part['bytes'] / 1e9:8.2f} GB{part['operations'] / 1e12:8.3f} TOP{least[name]:9.3f} s")
    print(f"{'step':16}{sum(p['bytes'] for p in parts.values()) / 1e9:8.2f} GB"
          f"{sum(p['operations'] for p in parts.values()) / 1e12:8.3f} TOP{least['step']:9.3f} s")
    return {"bandwidth": bandwidth, "int8_ops": int8, "work": parts, "floors": least}


def part_load(setup: Setup) -> dict[str, Any]:
    script = ("import sys, time, torch, dgemma\nbegan = time.perf_counter()\nmodel = dgemma.load(sys.argv[1])\n"
              "print(time.perf_counter() - began)")
    times, cached = [], warm(setup.file)
    for _ in range(3):
        seen = watch([sys.executable, "-c", script, str(setup.file)], threads=setup.threads)
        if seen.returncode:
            raise CannotRun(f"dgemma.load ended with {seen.returncode}: {seen.stderr.strip()[-1000:]}")
        times.append(float(seen.stdout.split()[-1]))
    seconds = statistics.median(times)
    print(f"load {seconds:.2f} s ({min(times):.2f} to {max(times):.2f}), {cached:.0%} of the file in the page cache")
    return {"seconds": seconds, "times": times, "cached": cached, "whole_command": seen.sizes()}


def part_memory(setup: Setup) -> dict[str, Any]:
    seen = watch(dgemma_run(setup.file, 2, setup.steps), digits(PROMPT_TOKENS), setup.threads)
    answer, sizes = answer_of(seen), seen.sizes()
    print(f"prompt of {answer['prompt_tokens']} tokens, {len(answer['steps'])} canvases, steps {answer['steps']}: peak "
          f"{sizes['peak_rss'] / 1e9:.2f} GB resident ({sizes['peak_anonymous'] / 1e9:.2f} anonymous, "
          f"{sizes['peak_file'] / 1e9:.2f} file), {seen.seconds:.1f} s")
    if len(answer["steps"]) != 2:
        print("warning: the answer ended before its second canvas")
    thinned = seen.samples[:: max(1, len(seen.samples) // 400)]
    return {**sizes, "answer": answer, "samples": thinned}


def own_measure(setup: Setup, **settings: int) -> dict[str, Any]:
    """`measure` in a process of its own, so that no setting inherits another's threads, memory or caches."""
    command = [sys.executable, __file__, "--child", json.dumps({"path": str(setup.file), **settings})]
    seen = watch(command, threads=settings["threads"])
    if seen.returncode:
        last = (seen.stderr.strip().splitlines() or ["no message"])[-1]
        raise CannotRun(last)
    return {**json.loads(seen.stdout.splitlines()[-1]), "memory": seen.sizes()}


def part_steps(setup: Setup) -> dict[str, Any]:
    known = earlier(setup).get("floors")
    result = own_measure(setup, threads=setup.threads, context=PROMPT_TOKENS, canvas=CANVAS, steps=setup.steps)
    parts = work(setup.shape, setup.mix, CANVAS, PROMPT_TOKENS)
    least = floors(parts, known["bandwidth"], known["int8_ops"]) if known else {}
    for name, seconds in {**result["parts"], "step": result["seconds_per_step"]}.items():
        beside = f"{least[name]:9.3f} s floor, x {seconds / least[name]:.2f}" if least.get(name) else ""
        print(f"{name:16}{seconds:9.3f} s{beside}")
    print(f"prefill {result['prefill_tokens_per_second']:.1f} tokens/s")
    return {**result, "floors": least}


def part_growth(setup: Setup) -> dict[str, Any]:
    usual = {"threads": setup.threads, "context": PROMPT_TOKENS, "canvas": CANVAS, "steps": setup.steps}
    rows = []
    for name, values in {"threads": (1, 2), "context": (0, 2000, 16_000), "canvas": (64, 128, 256)}.items():
        for value in values:
            settings = {**usual, name: value}
            result = own_measure(setup, **settings)
            rate = result["prefill_tokens_per_second"]
            rows.append({**settings, "varied": name, **result})
            print(f"{name:8}{value:7}{result['seconds_per_step']:9.3f} s/step"
                  f"{f'{rate:9.1f} prefill tokens/s' if rate else ''}", flush=True)
    return {"rows": rows}


def part_cold(setup: Setup) -> dict[str, Any]:
    command, text = dgemma_run(setup.file, 1, 1), digits(16)
    stayed = drop(setup.file)
    cold = watch(command, text, setup.threads)
    answer_of(cold)
    cached = warm(setup.file)
    again = watch(command, text, setup.threads)
    answer_of(again)
    print(f"one step from start to end: cold {cold.seconds:.1f} s ({stayed:.0%} had stayed in the page cache), warm "
          f"{again.seconds:.1f} s ({cached:.0%})")
    return {"cold": cold.sizes(), "stayed": stayed, "warm": again.sizes(), "cached": cached}


def part_squeeze(setup: Setup) -> dict[str, Any]:
    size = setup.file.stat().st_size
    limit = int(size * setup.limit)
    with memory_limit(limit) as before:
        stayed = drop(setup.file)  # a page that somebody else brought in would not count
        seen = watch([*before, *dgemma_run(setup.file, 1, 2)], digits(16), setup.threads)
    sizes = seen.sizes()
    fate = "finished" if seen.returncode == 0 else f"ended with {seen.returncode}"
    print(f"limit {limit / 1e9:.2f} GB for a file of {size / 1e9:.2f} GB: {fate} after {seen.seconds:.1f} s, peak "
          f"{sizes['peak_rss'] / 1e9:.2f} GB resident ({stayed:.0%} of the file had stayed in the page cache)")
    if seen.returncode:
        print(seen.stderr.strip()[-1000:])
    return {**sizes, "limit": limit, "stayed": stayed, "answer": answer_of(seen) if not seen.returncode else None}


def part_llamacpp(setup: Setup) -> dict[str, Any]:
    layers = min(3, setup.shape.layers)
    path = setup.folder / f"{setup.mix}-gemma4-{layers}-layers.gguf"
    try:
        import xllamacpp  # noqa: F401
    except ImportError as error:
        raise CannotRun("xllamacpp is not installed: pip install xllamacpp") from error
    if not path.exists():
        setup.folder.mkdir(parents=True, exist_ok=True)
        llamacpp_time.write_slice(path, layers, setup.mix)
    try:
        result = llamacpp_time.measure(path, layers, setup.threads)
    except RuntimeError as error:
        raise CannotRun(str(error)) from error
    for name in llamacpp_time.SETTINGS:
        print(f"llama.cpp, {name}: {result[name]['seconds']:.2f} s for {layers} layers, "
              f"{result[name]['seconds_30_layers']:.1f} s for 30, without head and soft embedding")
    if setup.llama_bench:
        own = result["own_build"] = llamacpp_time.measure_llama_bench(setup.llama_bench, path, layers, setup.threads)
        print(f"llama.cpp, own build: {own['default']['seconds']:.2f} s for {layers} layers, "
              f"{own['default']['seconds_30_layers']:.1f} s for 30")
    return result


def part_transformers(setup: Setup) -> dict[str, Any]:
    """A step is one part that stays (head, sampler) and one that grows with the layers: two slices tell them apart."""
    seconds = {}
    for layers in (1, 3):
        command = [sys.executable, str(HERE / "step_time.py"), "--child", "transformers", "--layers", str(layers),
                   "--threads", str(setup.threads), "--steps", "4"]
        seen = watch(command, threads=setup.threads)
        if seen.returncode:
            raise CannotRun(f"transformers ended with {seen.returncode}: {seen.stderr.strip()[-1000:]}")
        seconds[layers] = json.loads(seen.stdout.splitlines()[-1])["seconds_per_step"]
    per_layer = max(seconds[3] - seconds[1], 0.0) / 2
    whole = seconds[1] + (llamacpp_time.REAL_LAYERS - 1) * per_layer
    print(f"transformers, bf16: {seconds[1]:.2f} s a step with 1 layer, {seconds[3]:.2f} s with 3: "
          f"{whole:.1f} s with 30")
    return {"seconds": seconds, "seconds_30_layers": whole}


Part = Callable[[Setup], dict[str, Any]]
PARTS: dict[str, Part] = {
    "file": part_file, "floors": part_floors, "load": part_load, "memory": part_memory, "steps": part_steps,
    "growth": part_growth, "cold": part_cold, "squeeze": part_squeeze, "llamacpp": part_llamacpp,
    "transformers": part_transformers,
}
ON_THE_FILE = {"load", "memory", "steps", "growth", "cold", "squeeze"}


def earlier(setup: Setup) -> dict[str, Any]:
    """What results.json says already of this very shape."""
    path = setup.folder / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    return data.get(setup.file.stem, {})


def keep(setup: Setup, name: str, result: dict[str, Any]) -> None:
    setup.folder.mkdir(parents=True, exist_ok=True)
    path = setup.folder / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data.setdefault(setup.file.stem, {})[name] = {**result, "machine": describe("dgemma"), "threads": setup.threads}
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)


def main(given: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/full-shape"), help="for the files; they are kept")
    parser.add_argument("--only", default=",".join(parts), help="some of the parts, with commas between")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--mix", choices=random_gguf.MIXES, default="q4_k_m")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--steps", type=int, default=4, help="denoising steps per canvas")
    parser.add_argument("--limit", type=float, default=0.6, help="memory for squeeze, as a part of the file's size")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench program of your own build, measured as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.child:
        settings = json.loads(arguments.child)
        print(json.dumps(measure(Path(settings.pop("path")), **settings)))
        return
    names = arguments.only.split(",")
    unknown = sorted(set(names) - set(parts))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    shape = random_gguf.Shape(layers=arguments.layers)
    setup = Setup(arguments.dir, shape, arguments.mix, arguments.threads, arguments.steps, arguments.limit,
                  arguments.llama_bench)
    print(describe("dgemma", "transformers", "xllamacpp"))
    failed = False
    for name in (part for part in parts if part in names):
        print(f"\n[{name}]", flush=True)
        try:
            if name in ON_THE_FILE:
                ensure_file(setup)
            keep(setup, name, parts[name](setup))
        except CannotRun as error:
            failed = True
            print(f"not run: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
