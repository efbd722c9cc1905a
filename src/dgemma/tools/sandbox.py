"""Python and Bash that a model wrote, run in a sandbox of bubblewrap's, or not at all.

Works on: source text, bytes of files. Knows nothing of: models, calls, HTTP.

What the code has: the system's programs and this Python with its packages, read-only; a scratch folder in memory; no
home folder, no network unless it is allowed, no process but its own, no rights. What it may use is limited (`Limits`),
and when it ends, is stopped or is late, everything that it started ends with it. What holds, and what does not:
docs/tools.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dgemma.errors import DgemmaError
from dgemma.tools.seccomp import seccomp_filter

LANGUAGES = ("python", "bash")
_NOBODY = 65534
_GRACE = 3.0  # seconds for starting, and for handing files out, beside those that the code has
_LOOK = 0.1  # seconds between two looks at the memory that it uses
_PROBE_SECONDS = 20.0
_SHARED_MEMORY = 64 << 20  # bytes of /dev/shm
_MOST_ENTRIES = 100_000  # files in its folders: each takes memory that no limit of size counts
_HEAD_BYTES = 1 << 20  # a line that names the files takes less
_INSIDE = Path(__file__).with_name("inside.py")
# What of /etc programs need to find libraries, fonts, certificates and the time.
_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "fonts", "localtime", "mime.types", "ssl",
        "ca-certificates", "pki", "protocols", "services")
_ETC_FOR_NETWORK = ("resolv.conf", "hosts", "nsswitch.conf", "gai.conf")
_INSTALL = "install bubblewrap 0.8 or later (apt install bubblewrap, dnf install bubblewrap)"
_ALLOW = "this system forbids user namespaces to programs; docs/tools.md says how they are allowed"


class SandboxError(DgemmaError):
    """Code is not run here: there is no sandbox to run it in. ``why``, and ``mend``: what to do."""

    def __init__(self, why: str, mend: str):
        super().__init__(f"code runs in a sandbox only, and {why}: {mend}")
        self.why, self.mend = why, mend


@dataclass(frozen=True)
class Limits:
    """What code may use. ``memory`` is that of all its processes together with its files, ``disk`` its files' share."""

    seconds: float = 60.0
    memory: int = 2 << 30
    processes: int = 64
    disk: int = 256 << 20
    file: int = 128 << 20  # bytes of one file
    output: int = 16_000  # characters that are kept of what it prints
    returned_files: int = 20
    returned_bytes: int = 16 << 20


@dataclass(frozen=True)
class Ran:
    """What came of it. ``code``: its exit code, None if it did not come to that.

    ``ended``: "exited", "time" (it was late), "memory" (it used too much), "killed" (by itself, or the kernel).
    ``files``: name in the scratch folder -> bytes; ``left_out``: those that were too many or too large.
    """

    output: str
    code: int | None
    ended: Literal["exited", "time", "memory", "killed"]
    files: dict[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Clipped:
    """Text of any length, of which the head and the tail are kept: ``most`` characters together."""

    def __init__(self, most: int):
        self._head, self._tail, self._each, self._count = "", "", most // 2, 0

    def add(self, text: str) -> str:
        """Take in more; what of it belongs to the head comes back."""
        self._count += len(text)
        taken = text[: self._each - len(self._head)]
        self._head += taken
        self._tail = (self._tail + text[len(taken) :])[-self._each :]
        return taken

    def text(self) -> str:
        """What was kept, with a line that says how much was not."""
        left_out = self._count - len(self._head) - len(self._tail)
        if left_out <= 0:
            return self._head + self._tail
        return f"{self._head}\n[… {left_out:,} characters left out …]\n{self._tail}"


def clipped(text: str, most: int) -> str:
    """A text's head and tail (`Clipped`)."""
    kept = Clipped(most)
    kept.add(text)
    return kept.text()


def probe_sandbox(bwrap: str = "bwrap") -> None:
    """Runs nothing, in the sandbox. Raises `SandboxError` that says what is missing if that does not work."""
    if sys.platform != "linux":
        raise SandboxError(f"there is none for {sys.platform}", "use Linux, or do without python and bash")
    if shutil.which(bwrap) is None:
        raise SandboxError(f"there is no {bwrap}", _INSTALL)
    limits = Limits(seconds=10)
    with _seccomp() as rules:
        try:
            ran = subprocess.run(_command(bwrap, limits, False, rules), capture_output=True, pass_fds=rules, env={},
                                 input=_settings("bash", "true & wait", limits, {}), timeout=_PROBE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"{bwrap} fails ({error})", _INSTALL) from error
    with suppress(ValueError, TypeError, KeyError):
        if ran.returncode == 0 and json.loads(ran.stdout)["code"] == 0:
            return
    said = clipped(ran.stderr.decode(errors="replace").strip(), 400) or f"exit code {ran.returncode}"
    forbidden = any(word in said for word in ("namespace", "uid map", "Operation not permitted", "Permission denied"))
    raise SandboxError(f"bubblewrap cannot make one here ({said})", _ALLOW if forbidden else _INSTALL)


@cache
def check_sandbox(bwrap: str = "bwrap") -> None:
    """`probe_sandbox`, until it has once worked."""
    probe_sandbox(bwrap)


async def run_code(language: str, code: str, *, limits: Limits = Limits(), network: bool = False,
                   files: Mapping[str, bytes] | None = None, say: Callable[[str], Any] | None = None,
                   bwrap: str = "bwrap") -> Ran:
    """Run code of a language of `LANGUAGES` in a sandbox of its own; cancelling ends it and all that it started.

    ``files`` lie in its scratch folder. ``say`` hears what it prints, as it does, up to half of ``limits.output``.
    Raises `SandboxError` where there is no sandbox: nothing is run then.
    """
    await asyncio.to_thread(check_sandbox, bwrap)
    if language not in LANGUAGES:
        raise DgemmaError(f"code is {' or '.join(LANGUAGES)}, not {language!r:.40}")
    with _seccomp() as rules:
        process = await asyncio.create_subprocess_exec(
            *_command(bwrap, limits, network, rules), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, pass_fds=rules, start_new_session=True, env={})
    output, handed, over = Clipped(limits.output), bytearray(), False
    most = limits.returned_bytes + _HEAD_BYTES
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None

    async def feed(stdin: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # it ended before
            stdin.write(_settings(language, code, limits, files or {}))
            await stdin.drain()
            stdin.close()

    async def listen(stderr: asyncio.StreamReader) -> None:
        import codecs

        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        while data := await stderr.read(1 << 16):
            if (text := output.add(decode(data))) and say is not None:
                say(text)

    async def receive(stdout: asyncio.StreamReader) -> None:
        while data := await stdout.read(1 << 16):
            if len(handed) + len(data) > most:
                break  # it is not `inside` that says this
            handed.extend(data)

    async def watch() -> None:
        nonlocal over
        while process.returncode is None:
            over = await asyncio.to_thread(_uses_more, process.pid, limits)
            if over:
                _kill(process)
                return
            await asyncio.sleep(_LOOK)

    late = False
    watching = asyncio.ensure_future(watch())
    try:
        async with asyncio.timeout(limits.seconds + _GRACE):
            await asyncio.gather(feed(process.stdin), listen(process.stderr), receive(process.stdout))
    except TimeoutError:
        late = True
    finally:
        watching.cancel()
        _kill(process)  # its namespace's first process dies with it, and with that all others
        await process.wait()
    return _result(output.text(), bytes(handed), limits, "memory" if over else "time" if late else "killed")


def _result(output: str, handed: bytes, limits: Limits, otherwise: Literal["memory", "time", "killed"]) -> Ran:
    """What `inside` handed out, believed as far as it can be true; ``otherwise``: what it was if there is nothing."""
    line, _, data = handed.partition(b"\n")
    try:
        head = json.loads(line)
        code, late = int(head["code"]), bool(head["late"])
        named = [(str(name), int(size)) for name, size in head["files"]]
        left_out = tuple(str(name) for name in head["left_out"] if _is_name(str(name)))
        if sum(size for _, size in named) != len(data) or min((size for _, size in named), default=0) < 0:
            raise ValueError("more or less than was said")
    except (ValueError, TypeError, KeyError, RecursionError):
        return Ran(output, None, otherwise)
    files, start = {}, 0
    for name, size in named:
        if _is_name(name) and len(files) < limits.returned_files:
            files[name] = data[start : start + size]
        start += size
    ended = "memory" if otherwise == "memory" else "time" if late else "exited"
    return Ran(output, code, ended, files, left_out[: limits.returned_files])


def _is_name(name: str) -> bool:
    """Whether a file's name leads nowhere but below the folder that it is put in."""
    path = PurePosixPath(name)
    return (0 < len(name) <= 200 and name.isprintable() and "\\" not in name and not path.is_absolute()
            and str(path) == name != "." and not any(part.startswith((".", "~")) for part in path.parts))


def _settings(language: str, code: str, limits: Limits, files: Mapping[str, bytes]) -> bytes:
    """What `inside` reads first."""
    if wrong := next((name for name in files if not _is_name(name)), None):
        raise DgemmaError(f"{wrong!r:.80} is no name of a file in the sandbox")
    script = "/tmp/code.py" if language == "python" else "/tmp/code.sh"
    return json.dumps({
        "argv": [sys.executable, "-u", script] if language == "python" else ["/bin/bash", script],
        "script": script, "code": code, "seconds": limits.seconds, "uid": _NOBODY if os.geteuid() == 0 else None,
        "limits": {"RLIMIT_AS": limits.memory, "RLIMIT_NPROC": limits.processes, "RLIMIT_FSIZE": limits.file,
                   "RLIMIT_NOFILE": 512, "RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 1 << 20},
        "returned_files": limits.returned_files, "returned_bytes": limits.returned_bytes,
        "files": [[name, len(data)] for name, data in files.items()],
    }).encode() + b"\n" + b"".join(files.values())


def _command(bwrap: str, limits: Limits, network: bool, rules: tuple[int, ...]) -> list[str]:
    """The command that makes the sandbox and runs `inside` in it. Mounts come in order: later ones lie on earlier.

    It is to be started without an environment: the namespace's first process keeps what it began with, and the code can
    read that.
    """
    command = [shutil.which(bwrap) or bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
               "--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # real root needs no user namespace, and becomes nobody inside; both are these
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    if not network:
        command += ["--unshare-net"]
    if rules:
        command += ["--seccomp", str(rules[0])]
    command += ["--proc", "/proc", "--dev", "/dev", *_tmpfs("/dev/shm", _SHARED_MEMORY), "--remount-ro", "/dev",
                "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    command += _folders("/etc")
    for name in (*_ETC, *(_ETC_FOR_NETWORK if network else ())):
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    command += [*_tmpfs("/tmp", limits.disk // 2), *_tmpfs("/scratch", limits.disk // 2)]
    for folder in _python_folders():
        command += [*_folders(*reversed(list(map(str, Path(folder).parents))[:-1])), "--ro-bind", folder, folder]
    command += ["--remount-ro", "/", "--chdir", "/scratch", "--clearenv"]
    for name, value in {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp",
                        "LANG": "C.UTF-8", "TMPDIR": "/tmp", "PYTHONPATH": "/scratch",
                        "MPLBACKEND": "Agg", "MPLCONFIGDIR": "/tmp/matplotlib",
                        "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}.items():
        command += ["--setenv", name, value]
    return [*command, "--", sys.executable, "-I", "-S", "-c", _INSIDE.read_text(encoding="utf-8")]


def _tmpfs(place: str, size: int) -> list[str]:
    return ["--perms", "1777", "--size", str(size), "--tmpfs", place]


def _folders(*places: str) -> list[str]:
    """Folders that anybody may look into: those that bwrap makes by itself are its user's alone."""
    return [word for place in places for word in ("--perms", "0755", "--dir", place)]


def _python_folders() -> list[str]:
    """Where this Python and its packages are, unless that is in the system or has the home folder in it."""
    home = Path.home().resolve()
    wanted = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent.parent,
              *(Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages"))}
    if site.ENABLE_USER_SITE and site.USER_SITE:
        wanted.add(Path(site.USER_SITE))
    found = [folder for folder in sorted(wanted) if folder.is_dir() and not folder.is_relative_to("/usr")
             and not home.is_relative_to(folder.resolve())]
    return [str(folder) for folder in found
            if not any(folder.is_relative_to(other) for other in found if other != folder)]


@contextmanager
def _seccomp() -> Iterator[tuple[int, ...]]:
    """A file that the filter can be read from, to hand down; none where there is no filter for this processor."""
    rules = seccomp_filter()
    if rules is None:
        yield ()
        return
    reading, writing = os.pipe()
    try:
        with open(writing, "wb") as pipe:
            pipe.write(rules)  # less than a pipe holds
        yield (reading,)
    finally:
        os.close(reading)


def _kill(process: asyncio.subprocess.Process) -> None:
    """End a process unless it has ended. Its own method would look whether it has, and take that from asyncio."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _uses_more(pid: int, limits: Limits) -> bool:
    """Whether a process and those below it hold more memory than they may, or more files."""
    used, below = 0, [pid]
    for process in below:  # grows while it is walked
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/{process}/status").read_text()
            used += sum(int(line.split()[1]) << 10 for line in status.splitlines()
                        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")))
            for task in os.listdir(f"/proc/{process}/task"):
                below += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
    if used > limits.memory:
        return True
    for place in ("/scratch", "/tmp"):
        try:
            held = os.statvfs(f"/proc/{below[1]}/root{place}")
        except (OSError, IndexError):  # the sandbox does not stand yet, or this is not ours to see
            break
        used += (held.f_blocks - held.f_bfree) * held.f_frsize
        if held.f_files - held.f_ffree > _MOST_ENTRIES:
            return True
    return used > limits.memory
