import json
import sys

import full_shape
import pytest
from outside import CannotRun, cached_part, drop, memory_limit, warm, watch
from random_gguf import Shape

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


def test_one_step_reads_the_file_once_and_does_what_the_model_takes():
    parts = full_shape.work(Shape(), "q4_k_m")
    assert sum(part["bytes"] for part in parts.values()) == pytest.approx(16.7e9, rel=0.01)
    assert sum(part["operations"] for part in parts.values()) == pytest.approx(2.35e12, rel=0.03)
    assert parts["head"]["operations"] == parts["soft embedding"]["operations"] == 2 * 256 * 262_144 * 2816
    few = full_shape.work(Shape(), "q4_k_m", canvas=1)["experts"]
    assert few["bytes"] == pytest.approx(parts["experts"]["bytes"] * 8 / 128, rel=0.01)
    long = full_shape.work(Shape(), "q4_k_m", context=16_000)["attention"]
    assert long["operations"] > parts["attention"]["operations"]


def test_the_floor_is_the_slower_of_reading_and_computing():
    parts = {"a": {"bytes": 10.0, "operations": 1.0}, "b": {"bytes": 1.0, "operations": 10.0}}
    assert full_shape.floors(parts, 1.0, 1.0) == {"a": 10.0, "b": 10.0, "step": 11.0}
    assert full_shape.floors(parts, 1.0, None) == {"a": 10.0, "b": 1.0, "step": 11.0}


@linux
def test_a_watched_commands_memory_is_seen():
    program = "import sys, time; x = bytearray(60_000_000); time.sleep(0.3); print(sys.stdin.read())"
    seen = watch([sys.executable, "-c", program], "hello", every=0.02, pss_every=0.1)
    assert (seen.returncode, seen.stdout.strip()) == (0, "hello")
    sizes = seen.sizes()
    assert 60e6 < sizes["peak_anonymous"] < sizes["peak_rss"] < 160e6
    assert sizes["peak_pss"] > 60e6
    assert watch([sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3


@linux
def test_a_file_enters_and_leaves_the_page_cache(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(5_000_000))
    assert warm(path) == 1.0
    assert 0.0 <= drop(path) <= 1.0  # a file system in memory keeps it
    assert warm(path) == cached_part(path) == 1.0


@linux
def test_less_memory_than_the_file_makes_it_slower_not_dead(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(96 << 20))
    program = ("import mmap, sys\nfile = open(sys.argv[1], 'rb')\n"
               "data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
               "print(sum(data[i] for _ in range(2) for i in range(0, len(data), 4096)))")
    greedy = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"
    try:
        with memory_limit(64 << 20) as before:
            drop(path)
            reader = watch([*before, sys.executable, "-c", program, str(path)])
            eater = watch([*before, sys.executable, "-c", greedy])
    except CannotRun as error:
        pytest.skip(str(error))
    assert (reader.returncode, reader.stdout.strip()) == (0, "0")
    assert reader.peak(1) < 80 << 20
    assert eater.returncode != 0


def test_a_part_that_cannot_run_says_why_and_the_others_go_on(tmp_path, capsys):
    def cannot(setup):
        raise CannotRun("no such thing here")

    with pytest.raises(SystemExit) as ended:
        full_shape.main(["--dir", str(tmp_path)], {"floors": cannot, "llamacpp": lambda setup: {"seconds": 1}})
    assert ended.value.code == 1
    assert "not run: no such thing here" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["q4_k_m"]["llamacpp"]["seconds"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_too_little_room_is_said_before_anything_is_written(tmp_path, free_space):
    free_space(10**9)
    setup = full_shape.Setup(tmp_path, Shape(), "q4_k_m", 1, 1, 0.6, None)
    with pytest.raises(CannotRun, match=r"1\.0 GB free, the file takes 16\.8 GB"):
        full_shape.ensure_file(setup)
    assert list(tmp_path.iterdir()) == []
