"""About what a model on this machine needs of its memory."""

import pytest

from dgemma.memory.local import fits, memory_needed
from dgemma.weights.files import bundled_path
from dgemma.weights.hub.cache import LocalModel


@pytest.mark.parametrize(("kind", "weights", "needed"), [
    ("GGUF", 16.8, 18.0), ("GGUF", 19.1, 20.3), ("GGUF", 26.9, 28.1), ("safetensors", 51.6, 53.1),
])
def test_memory_needed(tmp_path, kind, weights, needed):
    """The real files' needs, as those state who made them: 18 GB for Q4_K_M, 20 for Q5_K_M, 28 for Q8_0."""
    size = round(weights * 1e9)
    model = LocalModel("x", kind, None, size, size, True, tmp_path)
    assert memory_needed(model) == pytest.approx(needed * 1e9, rel=0.02)


def test_a_small_vocabulary_needs_less():
    size = 7_000_000
    model = LocalModel("sudoku", "safetensors", None, size, size, True, bundled_path("sudoku"), bundled=True)
    assert memory_needed(model) == pytest.approx(260e6, rel=0.02)


def test_whether_it_fits():
    assert [fits(18, available, 24) for available in (20, 18, 17)] == ["yes", "yes", "if other programs close"]
    assert fits(18, 10, 16) == "no"
    assert fits(None, 10, 16) == fits(18, None, None) == "?"
