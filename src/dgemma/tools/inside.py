"""What runs first inside the sandbox, in place of the code: sets limits, starts it, ends all it left, hands files out.

Nothing of dgemma is there: this text is given to an interpreter (`sandbox` sends it), so it imports the standard
library only. stdin: a line of JSON (see `_settings` of `sandbox`), then the files' bytes. stderr: what the code
prints. stdout: a line of JSON, {"code", "late", "files": [[name, bytes], …], "left_out": [name, …]}, then the files'
bytes. The code may do to this process what it likes: who reads its answer believes nothing of it.
"""

import contextlib
import json
import os
import signal
import stat
import sys

SCRATCH = "/scratch"


def main():
    import resource  # not there on Windows, where this is never run but may be imported

    settings = json.loads(sys.stdin.buffer.readline())
    given = [(name, sys.stdin.buffer.read(size)) for name, size in settings["files"]]
    with open("/proc/self/oom_score_adj", "w") as file:  # where memory ends, this goes first
        file.write("1000")
    if settings["uid"] is not None:  # started by root: from here on it is nobody
        os.setgroups([])
        os.setresgid(*[settings["uid"]] * 3)
        os.setresuid(*[settings["uid"]] * 3)
    for name, data in given:
        path = os.path.join(SCRATCH, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    with open(settings["script"], "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(settings["code"])
    for kind, most in settings["limits"].items():
        hard = resource.getrlimit(getattr(resource, kind))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(getattr(resource, kind), (most, most))
    code, late = run(settings["argv"], settings["seconds"])
    with contextlib.suppress(ProcessLookupError):  # there is nobody else
        os.kill(-1, signal.SIGKILL)  # everybody but this process and the namespace's first
    names, left_out = found(settings["returned_files"], settings["returned_bytes"])
    head = {"code": code, "late": late, "files": [[name, len(data)] for name, data in names], "left_out": left_out}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + b"".join(data for _, data in names))
    sys.stdout.buffer.flush()


def run(argv, seconds):
    """The exit code of a program (negative: the signal that ended it), and whether it was ended for its time."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(2, 1)
        os.chdir(SCRATCH)
        try:
            os.execv(argv[0], argv)
        finally:
            os._exit(127)
    late = []

    def end(*_):
        late.append(True)
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(status), bool(late)


def found(most, most_bytes):
    """The plain files of the scratch folder as (name, bytes), and the names of those that are too many or too much."""
    names, left_out, size = [], [], 0
    for folder, folders, files in os.walk(SCRATCH):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(files):
            path = os.path.join(folder, name)
            short = os.path.relpath(path, SCRATCH)
            try:
                if name.startswith(".") or not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                if len(names) >= most or size + os.lstat(path).st_size > most_bytes:
                    left_out = [*left_out, short][:most]
                    continue
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                    data = file.read(most_bytes - size)
            except OSError:  # no right to read it
                left_out = [*left_out, short][:most]
                continue
            names.append((short, data))
            size += len(data)
    return names, left_out


if __name__ == "__main__":
    main()
