import dataclasses
import sys

import llamacpp_time
import pytest


def test_llama_cpp_evaluates_a_small_gemma4_file(small_shape, tmp_path):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "gemma4.gguf"
    shape = dataclasses.replace(small_shape, vocab=llamacpp_time.VOCAB)
    llamacpp_time.write_slice(path, shape=shape)
    result = llamacpp_time.measure(path, layers=shape.layers, threads=1, runs=1)
    for setting in llamacpp_time.SETTINGS:
        assert result[setting]["seconds"] > 0
        assert result[setting]["seconds_30_layers"] == pytest.approx(10 * result[setting]["seconds"], abs=1e-2)
    assert "CPU" in result["system"]


def test_a_build_of_ones_own_is_asked_by_its_benchmark_program(tmp_path):
    program = tmp_path / "llama-bench"
    program.write_text(f"#!{sys.executable}\nprint('[{{\"build_commit\": \"abc\", \"backends\": \"CPU\", "
                       "\"samples_ns\": [1500000000, 2500000000, 500000000]}]')\n")
    program.chmod(0o755)
    result = llamacpp_time.measure_llama_bench(program, tmp_path / "x.gguf", layers=3)
    assert result["default"] == {"seconds": 1.5, "min": 0.5, "max": 2.5, "seconds_30_layers": 15.0}
