"""Converting in a process of its own: its result, its errors, stopping it."""

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.apart import convert_apart
from dgemma.studio.jobs import StoppedError
from dgemma.weights.files import bundled_path

SOURCE = bundled_path("sudoku")


def test_a_checkpoint_is_converted_elsewhere(tmp_path):
    told = []
    summary = convert_apart(SOURCE, tmp_path / "a.gguf", "Q8_0", None, tell=lambda *what: told.append(what),
                            stopping=lambda: False)
    assert (tmp_path / "a.gguf").stat().st_size == summary.nbytes
    _, done, total = told[-1]
    assert done == total


def test_its_errors_come_back(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(DgemmaError, match=r"a\.gguf.*exists"):
        convert_apart(SOURCE, tmp_path / "a.gguf", "Q8_0", None, tell=lambda *what: None, stopping=lambda: False)


def test_stopping_it_leaves_nothing_behind(tmp_path):
    with pytest.raises(StoppedError):
        convert_apart(SOURCE, tmp_path / "a.gguf", "Q4_K_M", None, tell=lambda *what: None, stopping=lambda: True)
    assert list(tmp_path.iterdir()) == []
