"""How fast a network denoises on this machine, part by part, beside what the machine could do at best.

Works on a loaded network; knows nothing of files. The floor of a step is the larger of two times: its weights read once
at the measured memory bandwidth, and its arithmetic at the measured peak of the instructions that do it.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
import timeit
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgemma import seeds
from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.cache.visibility import reach
from dgemma.config import GenerationConfig
from dgemma.diffusion.sampler import EntropyBoundSampler, StepSettings
from dgemma.engine.engine import PIECE
from dgemma.kernels import PackedWeight, mix_rows, native
from dgemma.memory import machine_memory
from dgemma.nn import DiffusionTransformer
from dgemma.nn.head import canvas_stats, vocab_tiles

PARTS = ("experts", "dense", "attention", "head", "soft embedding", "sampler", "rest")


@dataclass(frozen=True)
class Work:
    """What one part of a step has to do: bytes of weights and cache to read, operations (2 per multiply-add)."""

    nbytes: float
    operations: float


@dataclass(frozen=True)
class Measured:
    """Times in seconds; ``parts`` are means over the steps and sum up to about ``seconds_per_step`` (a median)."""

    seconds_per_step: float
    seconds: list[float]
    parts: dict[str, float]
    prefill_tokens_per_second: float | None
    cache_bytes: int
    threads: int
    context: int
    canvas: int


def measure(network: DiffusionTransformer, *, context: int = 64, canvas: int | None = None, steps: int = 5,
            threads: int | None = None) -> Measured:
    """Time ``steps`` denoising steps of one canvas behind ``context`` random tokens, after one that does not count.

    ``canvas`` defaults to the checkpoint's. Sets torch's number of threads if ``threads`` is given.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config = network.config
    width = config.canvas_length if canvas is None else canvas
    draw = seeds.generator(0)
    device = network.device

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (1, count), generator=draw).to(device)

    settings = StepSettings.of([GenerationConfig()], [0], device)
    sampler = EntropyBoundSampler()
    watch = _Stopwatch(device)
    seconds: list[float] = []
    with torch.inference_mode():
        cache = Paged(PageFormat(config, device, network.cache_type))
        began = watch.now()
        for start in range(0, context, PIECE):
            count = min(PIECE, context - start)
            network.encode(tokens(count), PagedBatch([cache], [count]))
        prefill = context / (watch.now() - began) if context else None
        ids, soft = tokens(width), torch.zeros(1, width, config.hidden_size, dtype=network.dtype, device=device)
        for step in range(steps + 1):
            if step == 1:
                watch.times.clear()
            noise = torch.rand(1, width, vocab_tiles(config.vocab_size), 2, generator=draw).to(device)
            fresh, began = tokens(width), watch.now()
            with watch.attached(network):
                hidden = network.denoise(ids, PagedBatch([cache]), soft)
                with watch.timed("whole head"):
                    stats = canvas_stats(hidden, network.embed_tokens.weight, torch.tensor([0.8], device=device), noise,
                                         config.final_logit_softcapping, network.embed_scale, mix=watch.mix)
                with watch.timed("sampler"):
                    ids, _ = sampler.advance(stats, fresh, settings)
                    sampler.done(stats, stats.argmax.unsqueeze(0)[:0], settings)
            soft = stats.soft
            seconds.append(watch.now() - began)
    times = {name: spent / steps for name, spent in watch.times.items()}
    times["head"] = times.pop("whole head") - times.get("soft embedding", 0.0)
    times["rest"] = statistics.mean(seconds[1:]) - sum(times.values())
    return Measured(statistics.median(seconds[1:]), seconds[1:], {part: times.get(part, 0.0) for part in PARTS},
                    prefill, cache.nbytes, torch.get_num_threads(), context, width)


def work(network: DiffusionTransformer, canvas: int, context: int = 0) -> dict[str, Work]:
    """What each of `PARTS` has to read and compute in a step; reading the context counts as attention's."""
    config = network.config
    parts: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}

    def add(part: str, weight: Any, rows: float, share: float = 1.0) -> None:
        count = weight.shape.numel()
        parts[part][0] += share * weight.nbytes
        parts[part][1] += 2 * rows * count

    used = 1 - (1 - config.top_k_experts / config.num_experts) ** canvas  # of the experts, if chosen evenly
    blocks: list[Any] = list(network.layers)
    for block, layer in zip(blocks, config.layers, strict=True):
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj,
                           block.self_attn.o_proj):
            if projection is not None:
                add("attention", projection.weight, canvas)
        seen = reach(config, layer.kind, context)
        parts["attention"][0] += 4.0 * seen * layer.num_key_value_heads * layer.head_dim
        parts["attention"][1] += 4.0 * canvas * (seen + canvas) * config.num_attention_heads * layer.head_dim
        for projection in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            add("dense", projection.weight, canvas)
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            add("experts", weight, canvas * config.top_k_experts / config.num_experts, used)
        add("rest", block.router.proj.weight, canvas)
    mixing = network.self_conditioning
    for projection in (mixing.gate_proj, mixing.up_proj, mixing.down_proj):
        add("dense", projection.weight, canvas)
    add("head", network.embed_tokens.weight, canvas)
    add("soft embedding", network.embed_tokens.weight, canvas)
    return {part: Work(*numbers) for part, numbers in parts.items()}


def floors(parts: dict[str, Work], bandwidth: float, operations: float) -> dict[str, float]:
    """The least seconds that each part and the whole ("step") can take at these rates per second."""
    whole = Work(sum(part.nbytes for part in parts.values()), sum(part.operations for part in parts.values()))
    return {name: max(part.nbytes / bandwidth, part.operations / operations)
            for name, part in {**parts, "step": whole}.items()}


def peak_operations(network: DiffusionTransformer) -> tuple[float, str]:
    """Measured peak operations per second of what computes this network's products, and its name.

    int8 dot products for packed weights, else torch's matrix product in the network's dtype.
    """
    if isinstance(network.embed_tokens.weight, PackedWeight) and native.available():
        return native.peak_operations(), f"int8, {native.isa()}"
    size = 2048
    a, b = (torch.randn(size, size).to(network.dtype).to(network.device) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b), str(network.dtype).removeprefix("torch.")


def read_bandwidth() -> float:
    """Measured memory read rate, bytes per second (a sum over 1 GB, all threads)."""
    block = torch.ones(1 << 27, dtype=torch.int64)
    return block.nbytes / _best(lambda: block.sum())


@dataclass(frozen=True)
class Busy:
    """Some work beside programs that do nothing but keep processors busy; medians over rounds, times in seconds.

    ``slowdown`` is what the work took longer, ``explained`` what threads that never wait for each other took longer:
    the share of the processors that was lost. ``ratio`` is the first over the second, 1 where waiting costs nothing.
    """

    loops: int
    threads: int
    quiet_seconds: float
    busy_seconds: float
    slowdown: float
    explained: float
    ratio: float


def beside_busy_loops(work: Callable[[], float], loops: int, rounds: int = 3,
                      free_rate: Callable[[int], float] | None = None) -> Busy:
    """Measure ``work``, which returns its seconds, quietly and beside ``loops`` busy programs in turn.

    ``free_rate`` measures what so many threads get done that wait for nobody. What else runs on the machine counts as
    quiet.
    """
    threads, rate = torch.get_num_threads(), free_rate or _free_rate
    pairs = []
    for _ in range(rounds):
        before, quiet = rate(threads), work()
        with busy_loops(loops):
            first, busy = rate(threads), work()
            pairs.append((quiet, busy, busy / quiet, before / statistics.mean((first, rate(threads)))))
    quiet, busy, slowdown, explained = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(slower / lost for _, _, slower, lost in pairs)
    return Busy(loops, threads, quiet, busy, slowdown, explained, ratio)


# Ends with the program that began it, however that ends.
_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_loops(count: int) -> Iterator[list[int]]:
    """While this lasts, ``count`` other programs (their ids) keep a processor busy each, or what share they get."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())]))
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def _free_rate(threads: int, seconds: float = 1.0) -> float:
    """Work per second of so many threads that have nothing to do with each other."""
    block = bytes(1 << 22)  # zlib lets other threads run meanwhile
    stop = time.perf_counter() + seconds

    def count(_: int) -> int:
        done = 0
        while time.perf_counter() < stop:
            zlib.crc32(block)
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(count, range(threads))) / (time.perf_counter() - began)


def processor_text() -> str:
    """Processor, instruction sets, cores, threads, memory."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        wanted = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2")
        model = f"{names[0] if names else model} ({', '.join(name for name in wanted if name in flags)})"
    memory = machine_memory()[1] or 0
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory / 1e9:.0f} GB"


def describe_machine(*packages: str) -> str:
    """One line: `processor_text`, Python, versions of torch and ``packages``."""
    versions = []
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    return f"{processor_text()}; Python {platform.python_version()}, {', '.join(versions)}"


def _best(action: Callable[[], object], repeats: int = 5) -> float:
    """The least time of ``action`` after a warm-up: a rate's best is the machine's, the rest is interference."""
    return min(timeit.repeat(action, number=1, repeat=repeats + 1)[1:])


class _Stopwatch:
    """Adds up the time spent in a network's modules and in the head's two products."""

    def __init__(self, device: torch.device):
        self.times: dict[str, float] = defaultdict(float)
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = self.now()
        yield
        self.times[part] += self.now() - began

    def mix(self, *arguments: Any) -> None:
        """`mix_rows`, timed."""
        with self.timed("soft embedding"):
            mix_rows(*arguments)

    @contextmanager
    def attached(self, network: DiffusionTransformer) -> Iterator[None]:
        """While this lasts, everything that is run of ``network`` is timed."""
        began: dict[str, float] = {}
        hooks = []
        modules: list[tuple[str, nn.Module]] = [("dense", network.self_conditioning)]
        blocks: list[Any] = list(network.layers)
        for block in blocks:
            modules += [("attention", block.self_attn), ("dense", block.mlp), ("experts", block.experts)]
        for part, module in modules:
            def start(*_: Any, part: str = part) -> None:
                began[part] = self.now()

            def stop(*_: Any, part: str = part) -> None:
                self.times[part] += self.now() - began[part]

            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
