"""`dgemma studio` as a process of its own, and what its tests ask the bundled model."""

from contextlib import contextmanager

from support.server_process import Process

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@contextmanager
def studio(folder, *arguments, **environment):
    """The process, with its data in a folder; `launch_link` has the link that it shows."""
    process = Process("--port", "0", "--no-browser", "--data", str(folder), *arguments, command="studio", **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def launch_link(process):
    """The link that the studio shows when it is ready."""
    return process.wait_for(r"open (http://\S+/launch\?token=\S+) ")[1]
