"""A seccomp filter for code that nobody has read: calls into the kernel that no script needs and attacks begin with.

Works on: numbers of system calls. A classic BPF program (linux/filter.h, linux/seccomp.h) as `bwrap --seccomp` takes
it; for other processors than x86-64 and ARM64 there is none, and the namespaces alone hold.
"""

from __future__ import annotations

import errno
import platform
import struct

# Names of calls -> their numbers on (x86-64, ARM64).
_CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "quotactl": (179, 60),
    "shmget": (29, 194),  # memory that belongs to no process: nobody could count it
}
_ABSENT = {"clone3": (435, 435),  # its flags lie in memory, where no filter sees them: libc then takes clone
           "memfd_create": (319, 279), "memfd_secret": (447, 447)}  # files outside of the scratch folder's limit
_CLONE, _IOCTL, _SOCKET = (56, 220), (16, 29), (41, 198)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: keys typed for the user
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, INET, INET6, NETLINK: namespaces hold these, but not vsock and its like

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data: the arguments' lower halves
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The filter for a processor (None: this one), as an array of struct sock_filter; None where there is none."""
    known = _MACHINES.get(machine or platform.machine())
    if known is None:
        return None
    column, arch = known
    denied, absent = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, denied),  # the 32-bit calls of x86-64
               (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, denied)]  # and its x32
    for calls, answer in ((_CALLS, denied), (_ABSENT, absent)):
        for numbers in calls.values():
            program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, answer)]
    program += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
                (_RETURN, 0, 0, denied), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 5, _IOCTL[column]), (_LOAD, 0, 0, _SECOND), (_EQUAL, 1, 0, _TERMINAL_INPUT[0]),
                (_EQUAL, 0, 1, _TERMINAL_INPUT[1]), (_RETURN, 0, 0, denied), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 7, _SOCKET[column]), (_LOAD, 0, 0, _FIRST),
                *((_EQUAL, len(_FAMILIES) - place, 0, family) for place, family in enumerate(_FAMILIES)),
                (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)
