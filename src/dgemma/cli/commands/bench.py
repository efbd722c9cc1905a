"""`dgemma bench`: how fast this machine runs a model, beside what it could do at best."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from dgemma.cli import options
from dgemma.cli.streams import need_stdout, print_json
from dgemma.cli.terminal.console import say
from dgemma.formats import count_text, rate_text, size_text


@options.with_options(local=options.LOADING)
def bench(
    model: Annotated[str, typer.Argument(help="A bundled name, a GGUF file, a checkpoint folder or a hub id.")],
    context: Annotated[int, typer.Option(min=0, help="Tokens read before the canvas.")] = 64,
    canvas: Annotated[int | None, typer.Option(min=1, help="Canvas length. Default: the checkpoint's.",
                                               show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps to time.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads. Default: one per core.",
                                                show_default=False)] = None,
    busy: Annotated[int, typer.Option(min=0, metavar="N", help="Also time steps beside N programs that keep a "
                                      "processor busy each.")] = 0,
    json: options.JsonOption = False,
    *,
    local: dict[str, Any],
) -> None:
    """Time denoising steps, part by part, beside the floor of this machine.

    The floor is the larger of two times, both from rates measured here and now: the weights read once at memory
    bandwidth, and the arithmetic at the processor's peak. Close other programs first.
    --busy tells what other programs cost: 1.00 x would be nothing beyond the share of the processors that they take.
    """
    need_stdout()

    import torch

    from dgemma import bench as benchmark
    from dgemma import openmp
    from dgemma.cli.session import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    network = load_model(model, **local).network
    measured = benchmark.measure(network, context=context, canvas=canvas, steps=steps)
    work = benchmark.work(network, measured.canvas, context)
    bandwidth = benchmark.read_bandwidth()
    peak, unit = benchmark.peak_operations(network)
    least = benchmark.floors(work, bandwidth, peak)
    machine = f"{benchmark.describe_machine('dgemma')}; how threads wait: {openmp.waiting()}"
    beside = benchmark.beside_busy_loops(lambda: benchmark.measure(
        network, context=context, canvas=canvas, steps=steps).seconds_per_step, busy) if busy else None
    if json:
        print_json({"model": model, "machine": machine, "bytes_per_second": bandwidth, "operations_per_second": peak,
                    "unit": unit, **dataclasses.asdict(measured), "floors": least,
                    "work": {part: dataclasses.asdict(needs) for part, needs in work.items()},
                    "busy": beside and dataclasses.asdict(beside)})
        return
    say(machine)
    say(f"measured here: memory {size_text(round(bandwidth))}/s, arithmetic {peak / 1e12:.2f} TOP/s ({unit})\n")
    say(f"{model}: canvas of {measured.canvas}, {context} tokens before it, {measured.threads} threads")
    say(f"{'':16}{'seconds':>9}{'share':>8}{'floor':>9}{'x floor':>9}{'GB':>8}{'TOP':>8}")
    total = sum(measured.parts.values())
    for part, seconds in measured.parts.items():
        needs = work[part]
        times = f"{seconds / least[part]:9.1f}" if least[part] > 1e-6 else f"{'':9}"
        say(f"{part:16}{seconds:9.3f}{seconds / total:8.0%}{least[part]:9.3f}{times}{needs.nbytes / 1e9:8.2f}"
              f"{needs.operations / 1e12:8.3f}")
    step = measured.seconds_per_step
    say(f"{'step (median)':16}{step:9.3f}{'':8}{least['step']:9.3f}{step / least['step']:9.1f}"
          f"{sum(needs.nbytes for needs in work.values()) / 1e9:8.2f}"
          f"{sum(needs.operations for needs in work.values()) / 1e12:8.3f}\n")
    if measured.prefill_tokens_per_second:
        say(f"prompt: {rate_text(measured.prefill_tokens_per_second, 1)} tokens/s (over {context} tokens); its "
            f"cache takes {size_text(measured.cache_bytes)}")
    say(f"at 16 steps a canvas: {rate_text(measured.canvas, 16 * step)} tokens/s")
    if beside:
        programs = count_text(beside.loops, "busy program")
        say(f"beside {programs}: {beside.busy_seconds:.3f} s a step, {beside.slowdown:.2f} x the "
              f"{beside.quiet_seconds:.3f} s without; the share of the processors that they take explains "
              f"{beside.explained:.2f} x, waiting costs {beside.ratio:.2f} x")
