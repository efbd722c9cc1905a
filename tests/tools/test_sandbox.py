"""Code that tries to get out of the sandbox, or to take more than its share: none of it does. These really run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma.errors import DgemmaError
from dgemma.tools.sandbox import Clipped, Limits, Ran, SandboxError, _python_folders, _result, check_sandbox, run_code
from dgemma.tools.seccomp import seccomp_filter

SMALL = Limits(seconds=8, memory=400 << 20, processes=24, disk=64 << 20, file=16 << 20)


@pytest.fixture(scope="module", autouse=True)
def _a_sandbox():
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def ran(code: str, language: str = "python", limits: Limits = SMALL, **options) -> Ran:
    return asyncio.run(run_code(language, code, limits=limits, **options))


def running(word: str) -> list[str]:
    """The processes of this machine with a word in their command, those in sandboxes included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if word in command.replace("\0", " ") and entry.name != str(os.getpid()):
            found.append(command)
    return found


def is_gone(word: str) -> bool:
    deadline = time.monotonic() + 20
    while running(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(word)


def test_python_and_bash_run_and_say_what_they_print_and_how_they_end():
    assert ran("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)") == Ran("out\nerr\n", 3, "exited")
    assert ran("echo $((6 * 7)); false", "bash") == Ran("42\n", 1, "exited")


def test_an_error_shows_its_line():
    assert 'code.py", line 2' in ran("x = 0\n1 / x").output


def test_only_python_and_bash_are_run():
    with pytest.raises(DgemmaError, match="python or bash"):
        ran("1", "perl")


def test_files_come_back_and_can_be_given():
    got = ran("import os; os.mkdir('a'); open('a/b.txt', 'w').write(open('in.csv').read() * 2)",
              files={"in.csv": b"1,2\n"})
    assert got.files == {"in.csv": b"1,2\n", "a/b.txt": b"1,2\n1,2\n"}


def test_a_module_in_the_scratch_folder_can_be_imported():
    assert ran("import helper; print(helper.x)", files={"helper.py": b"x = 7"}).output == "7\n"


def test_a_picture_drawn_with_matplotlib_comes_back():
    pytest.importorskip("matplotlib")
    got = ran("import matplotlib.pyplot as p; p.plot([1, 3, 2]); p.savefig('plot.png')", limits=Limits(seconds=60))
    assert got.files["plot.png"].startswith(b"\x89PNG"), got.output


def test_what_is_printed_is_heard_at_once():
    heard: list[str] = []
    ran("print('one')", say=heard.append)
    assert "".join(heard) == "one\n"


# Getting out.

def test_the_home_folder_cannot_be_read(tmp_path):
    (tmp_path / "secret").write_text("secret")
    got = ran(f"import os\nprint(os.listdir({str(Path.home())!r}) if os.path.isdir({str(Path.home())!r}) else [])\n"
              f"print(open({str(tmp_path / 'secret')!r}).read())")
    assert "FileNotFoundError" in got.output
    seen = set(eval(got.output.splitlines()[0]))
    assert seen <= {Path(folder).relative_to(Path.home()).parts[0] for folder in _python_folders()
                    if Path(folder).is_relative_to(Path.home())}


@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/passwd", "/sys/kernel", "/dev/sda", "/dev/mem", "/run", "/var",
                                  "/proc/1/root/etc/shadow", "/proc/kcore", "/proc/self/root/etc/shadow"])
def test_the_systems_own_files_cannot_be_read(path):
    assert ran(f"cat {path} || ls {path}", "bash").code != 0


def test_other_processes_are_not_seen_nor_reached():
    got = ran(f"import os\nprint(len([name for name in os.listdir('/proc') if name.isdigit()]))\n"
              f"os.kill({os.getpid()}, 0)")
    assert int(got.output.splitlines()[0]) < 8
    assert "ProcessLookupError" in got.output


def test_the_environment_is_not_told():
    names = {line.partition("=")[0] for line in ran("env", "bash").output.splitlines()}
    assert names <= {"PATH", "HOME", "LANG", "TMPDIR", "MPLBACKEND", "MPLCONFIGDIR", "OPENBLAS_NUM_THREADS",
                     "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PWD", "SHLVL", "_", "OLDPWD"}


def test_no_process_that_the_code_can_see_has_the_environment():
    """Its own is cleared, but the first one of its namespace is bubblewrap, as it was started."""
    def below(pid: int) -> Iterator[int]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is looked at
                    yield from below(int(child))

    def look() -> Iterator[bytes]:
        for process in (Path(f"/proc/{pid}") for pid in below(os.getpid())):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"bwrap" in (process / "cmdline").read_bytes()[:80]:
                    yield (process / "environ").read_bytes()

    seen: list[bytes] = []
    got = ran("echo begun; sleep 0.3; cat /proc/[0-9]*/environ", "bash", say=lambda _: seen.extend(look()))
    assert len(seen) >= 2 and not any(b"SHELL=" in environ or b"USER=" in environ for environ in seen), seen
    assert set(seen) == {b""}
    assert f"HOME={Path.home()}" not in got.output.replace("\0", "\n").splitlines()


CONNECT = "import socket\ns = socket.socket({family})\ns.settimeout(3)\ns.connect({to})\nprint('through')"


def test_there_is_no_network_unless_it_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = CONNECT.format(family="socket.AF_INET", to=listener.getsockname())
        assert "through" not in ran(code).output
        assert ran(code, network=True).output == "through\n"
    outside = ran(CONNECT.format(family="socket.AF_INET", to=("192.0.2.1", 80)))
    assert "Network is unreachable" in outside.output


def test_abstract_sockets_are_not_reached():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0dgemma-test-{os.getpid()}")
        listener.listen()
        assert "refused" in ran(CONNECT.format(family="socket.AF_UNIX", to=repr(listener.getsockname()))).output


@pytest.mark.skipif(seccomp_filter() is None, reason="no seccomp filter for this processor")
@pytest.mark.parametrize(("code", "said"), [
    ("print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())", "-1 1"),  # PTRACE_ATTACH
    ("print(libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno())", "-1 1"),
    ("print(libc.unshare(0x10000000), ctypes.get_errno())", "-1 1"),  # CLONE_NEWUSER
    ("print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), ctypes.get_errno())", "-1 1"),
    ("print(libc.ioctl(2, 0x5412, b'x'), ctypes.get_errno())", "-1 1"),  # TIOCSTI
    ("print(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())", "-1 1"),
    ("print(libc.memfd_create(b'x', 0), ctypes.get_errno())", "-1 38"),
    ("print(libc.socket(40, 1, 0), ctypes.get_errno())", "-1 97"),  # AF_VSOCK: a virtual machine's host
])
def test_what_attacks_begin_with_is_forbidden(code, said):
    got = ran(f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n{code}")
    assert got.output.strip() == said


def test_processes_outside_cannot_be_traced_without_the_filter_either():
    """By number: that of this process is none in there."""
    assert "No such process" in ran(f"kill -STOP {os.getpid()}", "bash").output


def test_nothing_is_written_outside_of_the_scratch_folder():
    places = ["/x", "/usr/x", "/etc/x", "/dev/x", "/proc/x", f"{sys.prefix}/x", f"{sys.base_prefix}/x", "/root/x"]
    got = ran("\n".join(f"echo x > {place} && echo WROTE {place}" for place in places) + "\necho x > y; cat y", "bash")
    assert "WROTE" not in got.output
    assert got.files == {"y": b"x\n"}


def test_it_has_no_rights_and_gets_none():
    got = ran("grep -E 'CapPrm|CapEff|NoNewPrivs' /proc/self/status; id -u; su -c id", "bash")
    assert "CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n" in got.output
    assert "uid=0" not in got.output
    assert "\n0\n" not in got.output


def test_links_and_devices_are_not_handed_out():
    got = ran("ln -s /etc/shadow a; ln -s /proc/self/environ b; ln -s / c; mkfifo d; ln -s e e; mkdir f\n"
              "ln -s /usr f/g; ln -s /etc/ld.so.cache h.png; echo real > i; ln i j; chmod 0 j", "bash")
    assert got.files == {} and set(got.left_out) == {"i", "j"}  # one file, which nobody may read
    got = ran("ln -s /etc/ld.so.cache h.png; echo real > i", "bash")
    assert got.files == {"i": b"real\n"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".bashrc", "a/.ssh", "~/x", "a\\b", "a\nb", "", ".",
                                  "a//b", "a/", "x" * 300, "\x1b[2J"])
def test_a_forged_name_of_a_file_is_not_believed(name):
    import json

    head = {"code": 0, "late": False, "files": [[name, 1], ["good", 2]], "left_out": [name]}
    assert _result("", json.dumps(head).encode() + b"\nabc", SMALL, "killed") == Ran("", 0, "exited", {"good": b"bc"})


@pytest.mark.parametrize("handed", [
    b"", b"\n", b"{}\n", b"[" * 100_000, b'{"code": 0, "late": false, "files": [["a", 9]], "left_out": []}\nab',
    b'{"code": 0, "late": false, "files": [["a", -1], ["b", 3]], "left_out": []}\nab', b"\xff\xfe\n",
    b'{"code": "x", "late": 0, "files": [], "left_out": []}\n', b'{"code": 0, "late": 0, "files": 3, "left_out": 0}\n'])
def test_a_forged_answer_is_not_believed(handed):
    assert _result("said", handed, SMALL, "killed") == Ran("said", None, "killed")


def test_code_that_kills_what_guards_it_ends():
    got = ran("import os, time\nprint('x')\nos.kill(os.getppid(), 9)\ntime.sleep(60)")
    assert got == Ran("x\n", None, "killed")


# Taking too much.

def test_a_fork_bomb_ends():
    got = ran(":(){ :|:& };:; sleep 1; echo still", "bash")
    assert "esource temporarily unavailable" in got.output or "still" in got.output
    assert is_gone("/tmp/code.sh")


def test_more_processes_than_allowed_cannot_be_started():
    got = ran("import os, time\ncount = 0\ntry:\n    while True:\n        if os.fork() == 0:\n"
              "            time.sleep(60)\n        count += 1\nexcept BlockingIOError:\n    print(count)")
    assert 0 < int(got.output) <= SMALL.processes


def test_a_memory_bomb_ends():
    assert "MemoryError" in ran("x = []\nwhile True: x.append(bytearray(1 << 20))").output


def test_memory_of_many_processes_is_counted_together():
    got = ran("import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'x' * (150 << 20)\n"
              "        time.sleep(60)\ntime.sleep(60)")
    assert got.ended == "memory"


@pytest.mark.parametrize("place", ["/scratch", "/tmp", "/dev/shm"])
def test_the_disk_cannot_be_filled(place):
    limits = Limits(seconds=8, disk=16 << 20)
    got = ran(f"for i in $(seq 20); do head -c 8M /dev/zero > {place}/$i || break; done; "
              f"du -smc {place}/[0-9]* | tail -1 | cut -f1",
              "bash", limits)
    assert "No space left" in got.output
    assert int(got.output.splitlines()[-1]) <= 65


def test_one_file_has_a_limit():
    got = ran(f"head -c {SMALL.file * 2} /dev/zero > x; ls -s --block-size=1M x", "bash")
    assert "16 x" in got.output


def test_too_many_files_end_it():
    got = ran("import os\ni = 0\nwhile True:\n    os.close(os.open(f'{i}', os.O_CREAT))\n    i += 1",
              limits=Limits(seconds=30, disk=2 << 30))
    assert got.ended in ("memory", "time")


def test_files_come_back_up_to_a_number_and_a_size():
    limits = Limits(seconds=8, returned_files=3, returned_bytes=1000)
    got = ran("head -c 2000 /dev/zero > a; for i in b c d e; do echo $i > $i; done", "bash", limits)
    assert sorted(got.files) == ["b", "c", "d"]
    assert got.left_out == ("a", "e")


def test_long_output_is_kept_in_part():
    got = ran("echo first; yes | head -c 5000000; echo last", "bash", Limits(seconds=20, output=1000))
    assert len(got.output) < 1100
    assert got.output.startswith("first\n") and got.output.endswith("last\n")
    assert "[… 4,999,0" in got.output


def test_endless_output_ends_with_the_time():
    got = ran("yes", "bash", Limits(seconds=1, output=1000))
    assert got.ended == "time" and len(got.output) < 1100


def test_what_is_late_is_ended_and_its_files_are_there():
    got = ran("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('a', 'w').write('x')\n"
              "print('begun')\nwhile True: time.sleep(9)", limits=Limits(seconds=1))
    assert (got.output, got.ended, got.files) == ("begun\n", "time", {"a": b"x"})


def test_what_stops_its_guard_is_ended_all_the_same():
    got = ran("import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(60)",
              limits=Limits(seconds=1))
    assert got.ended == "time" and got.code is None


def test_a_process_in_the_background_does_not_outlive_it():
    mark = f"98{os.getpid()}"
    got = ran(f"setsid nohup sleep {mark} >/dev/null 2>&1 & disown\n(trap '' TERM HUP INT; exec sleep {mark}) &\n"
              "echo x", "bash")
    assert got == Ran("x\n", 0, "exited")
    assert is_gone(f"sleep {mark}")


def test_cancelling_ends_all_of_it():
    mark = f"97{os.getpid()}"

    async def cancelled() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(run_code("bash", f"setsid sleep {mark} & echo begun; trap '' TERM INT; sleep {mark}",
                                            say=lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert is_gone(f"sleep {mark}")


def test_a_killed_program_takes_its_sandboxes_along():
    mark = f"96{os.getpid()}"
    code = ("import asyncio\nfrom dgemma.tools.sandbox import run_code\n"
            f"asyncio.run(run_code('bash', 'echo begun; sleep {mark}', say=lambda t: print(t, flush=True)))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stdout.readline() == b"begun\n"
        program.send_signal(signal.SIGKILL)
    assert is_gone(f"sleep {mark}")


def test_sandboxes_run_beside_each_other():
    async def both() -> list[Ran]:
        return await asyncio.gather(*(run_code("bash", f"echo {n} > x; sleep 0.2; cat x") for n in range(3)))

    assert [got.output for got in asyncio.run(both())] == ["0\n", "1\n", "2\n"]


def test_it_works_from_a_thread():
    found: list[Ran] = []
    thread = threading.Thread(target=lambda: found.append(ran("print(1)")))
    thread.start()
    thread.join()
    assert found == [Ran("1\n", 0, "exited")]


# Refusing.

def test_without_bubblewrap_nothing_is_run():
    with pytest.raises(SandboxError, match="install bubblewrap"):
        ran("open('/tmp/ran', 'w')", bwrap="no-such-bwrap")


@pytest.mark.parametrize(("says", "todo"), [
    ("bwrap: No permissions to create a new namespace, likely because the kernel does not allow it", "docs/tools.md"),
    ("bwrap: setting up uid map: Permission denied", "docs/tools.md"), ("bwrap: Unknown option --size", "0.8")])
def test_where_bubblewrap_may_not_nothing_is_run(tmp_path, says, todo):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SandboxError, match=todo):
        ran("print(1)", bwrap=str(fake))


def test_text_is_kept_at_both_ends():
    kept = Clipped(10)
    assert [kept.add(text) for text in ("abc", "defgh", "ijklmnop")] == ["abc", "de", ""]
    assert kept.text() == "abcde\n[… 6 characters left out …]\nlmnop"
    short = Clipped(10)
    short.add("abcdefghij")
    assert short.text() == "abcdefghij"
