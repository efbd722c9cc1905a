"""The filter decides as it should, for both processors: run by an interpreter of the few instructions it has."""

from __future__ import annotations

import struct

import pytest

from dgemma.tools.seccomp import seccomp_filter

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
EPERM, ENOSYS, EAFNOSUPPORT, ALLOWED = 1, 38, 97, None


def decision(machine: str, number: int, *arguments: int, arch: int | None = None) -> int | None:
    """The error number that a call gets, None if it goes through. See struct seccomp_data in linux/seccomp.h."""
    data = struct.pack("=iIQ6Q", number, ARCH[machine] if arch is None else arch, 0,
                       *[*arguments, *[0] * 6][:6])
    program = list(struct.iter_unpack("=HBBI", seccomp_filter(machine)))
    at = value = 0
    while True:
        code, true, false, k = program[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return None if k == 0x7FFF0000 else k & 0xFFFF
        else:
            met = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += true if met else false


@pytest.mark.parametrize(("machine", "number", "arguments", "answer"), [
    ("x86_64", 0, (), ALLOWED), ("x86_64", 59, (), ALLOWED), ("x86_64", 101, (), EPERM), ("x86_64", 435, (), ENOSYS),
    ("x86_64", 56, (0x01200011,), ALLOWED), ("x86_64", 56, (0x10000011,), EPERM), ("x86_64", 56, (0x20000,), EPERM),
    ("x86_64", 16, (0, 0x5401), ALLOWED), ("x86_64", 16, (0, 0x5412), EPERM), ("x86_64", 16, (0, 0x541C), EPERM),
    ("x86_64", 41, (1,), ALLOWED), ("x86_64", 41, (2,), ALLOWED), ("x86_64", 41, (16,), ALLOWED),
    ("x86_64", 41, (40,), EAFNOSUPPORT), ("x86_64", 41, (17,), EAFNOSUPPORT), ("x86_64", 0x40000000, (), EPERM),
    ("aarch64", 63, (), ALLOWED), ("aarch64", 117, (), EPERM), ("aarch64", 435, (), ENOSYS),
    ("aarch64", 220, (17,), ALLOWED), ("aarch64", 220, (0x10000011,), EPERM), ("aarch64", 29, (0, 0x5412), EPERM),
    ("aarch64", 198, (40,), EAFNOSUPPORT), ("aarch64", 198, (10,), ALLOWED)])
def test_a_call_goes_through_or_not(machine, number, arguments, answer):
    assert decision(machine, number, *arguments) == answer


def test_the_upper_half_of_an_ioctl_hides_nothing():
    assert decision("x86_64", 16, 0, 0xFFFFFFFF_00005412) == EPERM


def test_the_calls_of_another_processor_do_not_go_through():
    assert decision("x86_64", 0, arch=0x40000003) == EPERM


def test_for_other_processors_there_is_none():
    assert seccomp_filter("riscv64") is None
