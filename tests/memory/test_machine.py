"""How much memory there is, here and within control groups, what weights take of it, and that it is given back."""

import ctypes
import resource

import pytest

from dgemma.memory import machine_memory, program_bytes, release_freed
from dgemma.memory.inference import mapped_bytes, request_memory
from support.reference import random_network, tiny_config

GIB = 1 << 30


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_memory_freed_between_what_is_kept_is_given_back():
    blocks = [bytearray(60_000) for _ in range(4000)]
    kept = blocks[::100]
    del blocks
    before = resident()
    release_freed()
    assert before - resident() > 100_000_000
    assert len(kept) == 40


@pytest.fixture
def system(tmp_path):
    """A function that makes a /proc and its control groups; the /proc's path.

    ``groups`` are folder -> file -> number; ``version`` 1 or 2, ``root`` what of the tree is mounted.
    """

    def make(groups, version=2, own="/", root="/", free=20 * GIB, total=24 * GIB):
        proc, mounted = tmp_path / "proc", tmp_path / "a place"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal: {total // 1024} kB\nMemAvailable: {free // 1024} kB\n")
        at = str(mounted).replace(" ", "\\040")
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        (proc / "self/mountinfo").write_text(
            f"21 20 0:5 / /proc rw,nosuid - proc proc rw\n35 31 0:32 {root} {at} rw shared:9 - {kind}\n"
            f"33 31 0:30 / {at}/cpu rw - cgroup cgroup rw,cpu\n")
        (proc / "self/cgroup").write_text(f"0::{own}\n" if version == 2 else
                                          f"5:cpu:/x\n4:memory,hugetlb:{own}\n0::/\n")
        for folder, files in groups.items():
            (mounted / folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (mounted / folder / name).write_text(f"{content}\n")
        return proc

    return make


def group2(limit, used, files=0, **more):
    stat = f"anon 5\ninactive_file {files // 2}\nactive_file {files - files // 2}\nfile {2 * files}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat} | more


def test_without_control_groups_the_machine_s_memory_counts(system):
    assert machine_memory(system({})) == (20 * GIB, 24 * GIB)
    available, total = machine_memory()
    assert 0 < available <= total


@pytest.mark.parametrize(("groups", "own", "left", "total"), [
    ({"": group2("max", 0)}, "/", 20, 24),
    ({"": group2(8 * GIB, 3 * GIB)}, "/", 5, 8),
    ({"": group2(8 * GIB, 3 * GIB, 2 * GIB)}, "/", 7, 8),  # cached files are let go first
    ({"": {}, "a": group2("max", 0), "a/b": group2(4 * GIB, GIB)}, "/a/b", 3, 4),
    ({"": {}, "a": group2(4 * GIB, 3 * GIB), "a/b": group2("max", GIB)}, "/a/b", 1, 4),  # of one around it
    ({"": {}, "a": group2(4 * GIB, GIB), "a/b": group2(6 * GIB, GIB)}, "/a/b", 3, 4),
    ({"": {}, "a": group2(6 * GIB, 5 * GIB), "a/b": group2(4 * GIB, 0)}, "/a/b", 1, 4),  # taken by its neighbours
    ({"": {}, "a": group2(2 * GIB, GIB)}, "/b", 20, 24),  # somebody else's
    ({"": {}, "a": group2("max", GIB, **{"memory.high": 3 * GIB})}, "/a", 2, 3),
    ({"": {}, "a": group2(2 * GIB, 3 * GIB)}, "/a", 0, 2),
    ({"": {}, "a": {"memory.max": 2 * GIB}}, "/a/gone", 2, 2),
    ({"": {}, "a": {"memory.max": "nonsense"}}, "/a", 20, 24),
    ({"": group2(64 * GIB, GIB)}, "/", 20, 24),
], ids=str)
def test_the_smallest_limit_of_the_groups_around_a_process_counts(system, groups, own, left, total):
    assert machine_memory(system(groups, own=own)) == (left * GIB, total * GIB)


def test_a_container_sees_its_own_part_of_the_tree(system):
    groups = {"": group2(4 * GIB, GIB), "inner": group2(2 * GIB, GIB)}
    assert machine_memory(system(groups, own="/docker/1234/inner", root="/docker/1234")) == (GIB, 2 * GIB)


def test_a_container_in_a_namespace_of_its_own_sees_its_root(system):
    assert machine_memory(system({"": group2(4 * GIB, GIB)}, own="/", root="/docker/1234")) == (3 * GIB, 4 * GIB)


@pytest.mark.parametrize(("limit", "left"), [(4 * GIB, 2 * GIB), (9223372036854771712, 20 * GIB)])
def test_groups_of_the_first_version_are_read_too(system, limit, left):
    stat = f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    groups = {"": {}, "batch/job": {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": 3 * GIB,
                                    "memory.stat": stat}}
    available, total = machine_memory(system(groups, version=1, own="/batch/job"))
    assert (available, total) == (left, min(limit, 24 * GIB))


def test_weights_in_mapped_files_are_taken_off_what_requests_may_have(tmp_path):
    from dgemma.model import load
    from dgemma.weights.hub.locate import locate
    from dgemma.weights.load import load_network

    own = random_network(tiny_config())
    assert mapped_bytes(own) == 0
    folder = locate("sudoku")
    config = load("sudoku").config
    mapped = load_network(folder, config)
    size = sum(tensor.nbytes for tensor in mapped.state_dict().values())
    assert mapped_bytes(mapped) == pytest.approx(size, rel=0.01)
    assert mapped_bytes(load_network(folder, config, dtype=other_dtype(mapped))) == 0  # converted: in memory
    assert request_memory(own, GIB) == GIB * 4 // 5
    assert request_memory(own, GIB, seeing=GIB // 4) == GIB * 3 // 4 * 4 // 5
    assert request_memory(mapped, GIB) == (GIB - mapped_bytes(mapped)) * 4 // 5
    assert mapped_bytes(own, tmp_path / "not there") == sum(tensor.nbytes for tensor in own.state_dict().values())


def other_dtype(network):
    import torch

    return torch.float32 if network.dtype == torch.bfloat16 else torch.bfloat16


def test_what_the_program_takes_is_what_was_measured_with_the_26b_models_vocabulary_and_with_a_small_one():
    assert program_bytes(262_144) == pytest.approx(581e6, rel=0.03)
    assert program_bytes(288) == pytest.approx(252e6, rel=0.03)
    assert program_bytes(288, training=True) == pytest.approx(400e6, rel=0.03)


def test_packed_weights_of_a_mapped_gguf_file_are_taken_off_too(tmp_path):
    from dgemma.model import load
    from dgemma.nn.packed import packed_bytes
    from dgemma.weights.hub.locate import locate
    from dgemma.weights.quantize import convert

    convert(locate("sudoku"), tmp_path / "small.gguf", "Q8_0")
    network = load(tmp_path / "small.gguf").network
    assert mapped_bytes(network) >= packed_bytes(network) > 0
