"""llama.cpp on the same work: 256 prompt tokens through a few layers with the 26B-A4B's shapes and block types.

    python benchmarks/llamacpp_time.py [--layers 3] [--threads 2] [--mix q4_k_m] [--llama-bench PATH]

Needs `pip install xllamacpp`. No released llama.cpp runs `diffusion-gemma`, but `gemma4` has the same layers, and
evaluating 256 prompt tokens takes a denoising step's matrix products. Head and soft embedding are not part of it: the
file has a small vocabulary, and llama.cpp computes logits for the last token only. So the layers' seconds, scaled to 30
layers, are the least that a denoising step could take there.

Two settings, each in a process of its own: as it comes, and without the buffers in which llama.cpp repacks weights for
this processor (`no_extra_bufts`). The result is one line of JSON; "system" says for which instructions the library was
compiled. The xllamacpp wheels are compiled for AVX2 with the CPU code linked in, so there is nothing to mask off or to
switch on: on a processor with AVX512 or AMX a build of one's own may be faster. `--llama-bench` measures such a build
by its own benchmark program on the same file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import random_gguf

TOKENS, VOCAB, REAL_LAYERS = 256, 4096, 30
SETTINGS = {"default": False, "no_extra_bufts": True}


def write_slice(path: Path, layers: int = 3, mix: str = "q4_k_m", shape: random_gguf.Shape | None = None) -> int:
    """A `gemma4` file with ``layers`` whole layers and a small vocabulary."""
    return random_gguf.write(path, layers=layers, mix=mix, architecture=random_gguf.CAUSAL, vocab=VOCAB, shape=shape)


def evaluate(path: Path, threads: int, no_extra_bufts: bool, runs: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Seconds of each evaluation after the first, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = max(1024, 2 * tokens), tokens, tokens, 1
    params.warmup, params.no_extra_bufts = False, no_extra_bufts
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    draw, seconds = random.Random(0), []
    for _ in range(runs + 1):
        prompt = [draw.randrange(600, VOCAB) for _ in range(tokens)]
        answer = server.handle_completions({"prompt": prompt, "max_tokens": 1, "cache_prompt": False})
        timings = answer["timings"]
        if timings["prompt_n"] != tokens:
            raise RuntimeError(f"{timings['prompt_n']} prompt tokens were evaluated, not {tokens}")
        seconds.append(timings["prompt_ms"] / 1000)
    return {"seconds": seconds[1:], "system": " ".join(xllamacpp.get_system_info().split())}


def summary(seconds: list[float], layers: int) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {"seconds": round(middle, 4), "min": round(min(seconds), 4), "max": round(max(seconds), 4),
            "seconds_30_layers": round(middle * REAL_LAYERS / layers, 3)}


def measure(path: Path, layers: int, threads: int = 2, runs: int = 5) -> dict[str, Any]:
    """Every setting in a process of its own (a second server in one process would find its threads taken)."""
    result: dict[str, Any] = {"rival": "llama.cpp", "tokens": TOKENS, "layers": layers, "threads": threads}
    for name in SETTINGS:
        command = [sys.executable, __file__, "--child", name, "--file", str(path), "--threads", str(threads),
                   "--runs", str(runs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llama.cpp ({name}) ended with {done.returncode}: {done.stderr[-2000:]}")
        child = json.loads(done.stdout.splitlines()[-1])
        result[name] = summary(child["seconds"], layers)
        result["system"] = child["system"]
    return result


def measure_llama_bench(program: Path, path: Path, layers: int, threads: int = 2, runs: int = 5) -> dict[str, Any]:
    """The same evaluation by a `llama-bench` of one's own build."""
    command = [str(program), "-m", str(path), "-p", str(TOKENS), "-n", "0", "-ub", str(TOKENS), "-b", str(TOKENS),
               "-t", str(threads), "-r", str(runs), "-ngl", "0", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr[-2000:]}")
    entry = json.loads(done.stdout)[0]
    build = f"{entry.get('build_commit')}, backends {entry.get('backends')}"
    return {"rival": "llama.cpp, own build", "tokens": TOKENS, "layers": layers, "threads": threads, "build": build,
            "default": summary([nanoseconds / 1e9 for nanoseconds in entry["samples_ns"]], layers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mix", choices=random_gguf.MIXES, default="q4_k_m")
    parser.add_argument("--file", type=Path, help="keep the slice here, and use it if it is there")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench program to measure as well")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(evaluate(arguments.file, arguments.threads, SETTINGS[arguments.child], arguments.runs)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.file.parent if arguments.file else None) as folder:
        path = arguments.file or Path(folder) / "slice.gguf"
        if not path.exists():
            write_slice(path, arguments.layers, arguments.mix)
        print(json.dumps(measure(path, arguments.layers, arguments.threads, arguments.runs)))
        if arguments.llama_bench:
            print(json.dumps(measure_llama_bench(arguments.llama_bench, path, arguments.layers, arguments.threads,
                                                 arguments.runs)))


if __name__ == "__main__":
    main()
