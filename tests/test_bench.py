"""The speed measurement: it adds up, and counts the work that a network really has."""

import json
import subprocess
import sys

import pytest

from dgemma import bench
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels.packed import PackedWeight
from dgemma.nn.packed import packed_bytes, set_weights
from support.reference import random_network, tiny_config


def test_parts_sum_up_to_the_mean_step(tiny_network):
    measured = bench.measure(tiny_network, context=5, steps=4)
    assert sum(measured.parts.values()) == pytest.approx(sum(measured.seconds) / 4, rel=1e-6)
    assert len(measured.seconds) == 4 and measured.canvas == 8
    assert all(measured.parts[part] > 0 for part in ("experts", "dense", "attention", "head", "soft embedding"))


def test_measuring_leaves_the_network_as_it_was(tiny_network):
    from dgemma.nn import head

    before = head.mix_rows
    bench.measure(tiny_network, context=0, canvas=3, steps=1)
    assert head.mix_rows is before
    assert not any(module._forward_hooks for module in tiny_network.modules())


def test_no_context_means_no_prefill_rate(tiny_network):
    assert bench.measure(tiny_network, context=0, steps=1).prefill_tokens_per_second is None


def test_work_counts_every_weight_once_and_the_table_twice():
    config = tiny_config(num_experts=2, top_k_experts=2)  # every expert is used
    network = random_network(config)
    work = bench.work(network, canvas=8)
    counted = sum(part.nbytes for part in work.values())
    table = network.embed_tokens.weight.nbytes
    norms = sum(p.nbytes for name, p in network.named_parameters() if p.ndim == 1)
    everything = sum(p.nbytes for p in network.parameters())
    assert counted == everything - norms + table
    assert work["head"].operations == 2 * 8 * config.vocab_size * config.hidden_size


def test_packed_weights_count_with_their_packed_size():
    config = tiny_config(hidden_size=32)
    network = random_network(config)
    kind = BLOCK_TYPES["Q8_0"]
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    weights["embed_tokens.weight"] = PackedWeight(quantize(weights["embed_tokens.weight"], kind), kind)
    set_weights(network, weights)
    assert packed_bytes(network) == config.vocab_size * 34
    assert bench.work(network, canvas=8)["head"].nbytes == config.vocab_size * 34


def test_the_floor_of_a_step_is_not_the_sum_of_its_parts():
    parts = {"a": bench.Work(100, 0), "b": bench.Work(0, 100)}
    assert bench.floors(parts, 10, 20) == {"a": 10, "b": 5, "step": 10}


def test_the_command_prints_a_table_and_json(dgemma_command):
    command = ["bench", "sudoku", "--steps", "1", "--context", "3"]
    shown = dgemma_command(*command).out
    assert "; how threads wait: " in shown.splitlines()[0]
    assert "x floor" in shown and "soft embedding" in shown and "tokens/s" in shown
    data = json.loads(dgemma_command(*command, "--json").out)
    assert data["machine"] == shown.splitlines()[0]
    assert data["context"] == 3 and data["seconds_per_step"] > 0 and data["floors"]["step"] > 0


class TestBesideBusyPrograms:
    def test_programs_run_only_while_it_lasts(self):
        import psutil

        def ours():
            return [child for child in psutil.Process().children() if "os.getppid()" in " ".join(child.cmdline())]

        with pytest.raises(KeyError), bench.busy_loops(2):
            assert len(ours()) == 2
            raise KeyError
        assert not ours()

    def test_programs_end_with_the_one_that_began_them(self):
        import psutil

        source = "import os, signal\nfrom dgemma import bench\nwith bench.busy_loops(1) as pids:\n" \
                 "    print(*pids, flush=True)\n    os.kill(os.getpid(), signal.SIGTERM)"
        told = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, check=False).stdout
        psutil.wait_procs([psutil.Process(pid) for pid in map(int, told.split()) if psutil.pid_exists(pid)], timeout=20)
        assert not any(psutil.pid_exists(pid) for pid in map(int, told.split()))

    def test_what_waiting_costs_is_what_the_lost_share_does_not_explain(self):
        seconds, rates = iter([1.0, 4.0, 1.0, 6.0, 2.0, 12.0]), iter([8.0, 4.0, 4.0, 8.0, 3.0, 5.0, 8.0, 4.0, 4.0])
        found = bench.beside_busy_loops(lambda: next(seconds), loops=1, free_rate=lambda threads: next(rates))
        assert (found.quiet_seconds, found.busy_seconds) == (1.0, 6.0)
        assert (found.slowdown, found.explained, found.ratio) == (6.0, 2.0, 3.0)

    def test_free_threads_work(self):
        assert bench._free_rate(2, seconds=0.2) > 0

    @pytest.mark.parametrize("arguments", [[], ["--json"]])
    def test_the_command_tells_both(self, arguments, monkeypatch):
        from typer.testing import CliRunner

        from dgemma.cli.main import app

        monkeypatch.setattr(bench, "_free_rate", lambda threads: 1.0)
        monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e9)
        shown = CliRunner().invoke(app, ["bench", "sudoku", "--steps", "1", "--busy", "1", *arguments]).stdout
        if arguments:
            assert json.loads(shown)["busy"]["loops"] == 1 and json.loads(shown)["busy"]["slowdown"] > 0
        else:
            assert "beside 1 busy program:" in shown and "waiting costs" in shown
