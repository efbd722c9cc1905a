"""Numbers as people read them."""

import pytest

from dgemma.formats import count_text, duration_text, rate_text, short_count, size_text


@pytest.mark.parametrize(("nbytes", "text"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (300_000, "300.0 kB"), (1_500_000, "1.5 MB"),
    (16_800_000_000, "16.8 GB"),
])
def test_sizes(nbytes, text):
    assert size_text(nbytes) == text


def test_counts():
    assert [count_text(n, "step") for n in (0, 1, 2, 1024)] == ["0 steps", "1 step", "2 steps", "1,024 steps"]
    assert count_text(2, "canvas", "es") == "2 canvases"
    assert [short_count(n) for n in (17, 7_040, 7_040_000, 25_200_000_000)] == ["17", "7.04k", "7.04M", "25.2B"]


def test_durations_and_rates():
    durations = [duration_text(seconds) for seconds in (0.04, 59.9, 60, 3725)]
    assert durations == ["0.0 s", "59.9 s", "1:00 min", "62:05 min"]
    assert [rate_text(*pair) for pair in ((5, 2), (100, 3), (5, 0))] == ["2.5", "33", "0.0"]
