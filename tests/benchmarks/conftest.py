"""Benchmarks are programs, not a package: they import each other from their own folder."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("gguf") is None:  # the benchmarks write files with it; dgemma does without
    collect_ignore_glob = ["*"]
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def small_shape():
    """Every kind of tensor and block type of the real file, in a few hundred kilobytes."""
    from random_gguf import Shape

    return Shape(layers=3, vocab=1024, hidden=256, dense=96, experts=4, experts_used=2, expert=32, heads=4,
                 sliding_heads=2, full_heads=1, sliding_dim=64, full_dim=128, window=16, canvas=32)


@pytest.fixture(scope="session")
def small_file(small_shape, tmp_path_factory):
    from random_gguf import write

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path, shape=small_shape)
    return path
