"""Following a request: Ctrl-C, errors of whoever looks on, and all of it on a real terminal."""

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

import dgemma
from dgemma.cli import session
from dgemma.cli.session import follow
from dgemma.cli.terminal.canvas import LiveCanvas
from dgemma.diffusion.events import Denoised, Finished, Generation
from dgemma.diffusion.trace import read_trace
from dgemma.errors import DgemmaError
from dgemma.memory.inference import mapped_bytes
from dgemma.weights.files import bundled_path
from dgemma.weights.quantize import convert


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_that_memory_cannot_hold_are_told(quantised, machine_memory, capsys, tmp_path):
    """Mapped ones, packed or not, with room for a conversation beside them."""
    path = bundled_path("sudoku")
    if quantised:
        path = tmp_path / "m.gguf"
        convert(bundled_path("sudoku"), path, "Q8_0")
    machine_memory(1 << 40, 1 << 40)
    network = session.load_model(str(path)).network
    assert "Note:" not in capsys.readouterr().err
    mapped = mapped_bytes(network)
    assert mapped > 1_000_000
    for available, told in ((mapped * 11 // 10, False), (mapped, True)):
        machine_memory(available, 1 << 40)
        session.load_model(str(path))
        assert ("Note: this model wants about" in capsys.readouterr().err) == told


class Endless:
    """A model whose answer ends when it is cancelled often enough, not before; meanwhile somebody presses Ctrl-C."""

    name = "endless"

    def __init__(self, cancels: int = 1, presses: int = 0):
        self.tokenizer = self
        self.cancels, self.presses = cancels, presses
        self.cancelled = 0
        self.closed = False
        self.threads = set()

    def token_bytes(self, token):
        return b"a"

    def is_special(self, token):
        return False

    def cancel(self):
        self.cancelled += 1

    def events(self):
        try:
            step = 0
            while self.cancelled < self.cancels:
                self.threads.add(threading.current_thread())
                step += 1
                yield Denoised(0, 0, step, [1], [1], [1.0], [True], [True], 1.0, 0.1)
                self._press()
            yield Finished(0, Generation("a", None, [], [1], "cancelled", [step], 1.0, 1, 0.1))
        finally:
            self.closed = True

    @property
    def at_rest(self):
        return self.closed and not any(thread.is_alive() for thread in self.threads - {threading.main_thread()})

    def _press(self):
        before = self.cancelled
        if self.presses:
            self.presses -= 1
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            for _ in range(10_000):  # until it has come; a KeyboardInterrupt, too, makes `follow` cancel
                if self.cancelled > before:
                    break
                time.sleep(0.001)


@pytest.mark.parametrize("visual", [True, False])
def test_ctrl_c_ends_the_answer_as_often_as_it_comes(visual, tmp_path):
    model = Endless(cancels=3, presses=3)
    generation = follow(model, model.events(), visual=visual, insist=False, pace=60, trace=tmp_path / "a")
    assert generation.finish_reason == "cancelled"
    assert model.cancelled == 3
    assert model.at_rest
    assert (threading.main_thread() in model.threads) is not visual
    assert isinstance(read_trace(tmp_path / "a").events[-1], Finished)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("visual", [True, False])
def test_whoever_insists_interrupts_at_the_second_ctrl_c(visual, tmp_path):
    model = Endless(cancels=3, presses=2)
    with pytest.raises(KeyboardInterrupt):
        follow(model, model.events(), visual=visual, insist=True, trace=tmp_path / "a")
    assert read_trace(tmp_path / "a").events
    assert model.at_rest
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_insisting_does_not_wait_for_a_long_step(monkeypatch):
    monkeypatch.setattr(session, "PATIENCE", 0.01)
    release = threading.Event()
    model = Endless(cancels=3, presses=2)

    def events():
        for event in model.events():
            if not model.presses:
                release.wait(60)
            yield event

    with pytest.raises(KeyboardInterrupt):
        follow(model, events(), visual=True)
    assert not model.at_rest
    release.set()
    for thread in model.threads:
        thread.join()
    assert model.at_rest


@pytest.mark.parametrize("visual", [True, False])
def test_the_model_has_stopped_when_whoever_looks_on_fails(visual, tmp_path, monkeypatch):
    model = Endless()

    def fail(*_):
        raise OSError(errno.EPIPE, "Broken pipe")

    if visual:
        monkeypatch.setattr(LiveCanvas, "show", fail)
        with pytest.raises(BrokenPipeError):
            follow(model, model.events(), visual=True)
    else:
        model.token_bytes = fail
        with pytest.raises(BrokenPipeError):
            follow(model, model.events(), visual=False, trace=tmp_path / "a")
    assert model.at_rest
    assert list(tmp_path.iterdir()) == []


def test_a_failing_model_s_error_is_passed_on():
    def events():
        yield Denoised(0, 0, 1, [1], [1], [1.0], [True], [True], 1.0, 0.1)
        raise DgemmaError("out of luck")

    with pytest.raises(DgemmaError, match="out of luck"):
        follow(Endless(), events(), visual=True)


class Terminal:
    """A program on a terminal of its own, 80 × 24."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(Path(dgemma.__file__).parents[1])}
        # The session's first process takes its stdin for its terminal: then Ctrl-C there is a signal to it.
        code = ("import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
                "from dgemma.cli.main import main; main()")
        self.process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdin=slave, stdout=slave,
                                        stderr=slave, env=environment, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Wait until the pattern has been shown; what came up to its end."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError as error:  # Linux's way to say that the other end is closed
                raise AssertionError(f"no {pattern!r} to the end: {self.seen[-2000:]!r}") from error
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def insist(self, text: str, pattern: str) -> str:
        """Send, and again after a while: readline forgets a signal that comes between its prompt and its waiting."""
        for _ in range(60):
            self.send(text)
            try:
                return self.expect(pattern, 2)
            except AssertionError:
                assert self.process.poll() is None, self.seen[-2000:]
        raise AssertionError(f"no {pattern!r} in {self.seen[-2000:]!r}")

    def wait(self) -> int:
        try:
            while os.read(self.master, 65536):
                pass
        except OSError:
            pass
        return self.process.wait(120)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_a_conversation_on_a_terminal(checkpoint, tmp_path, working_folder):
    working_folder(tmp_path)
    options = ("--seed", 3, "--pace", 0.01, "--confidence-threshold", 1e-9, "--stability-threshold", 50)
    with Terminal("chat", "-m", checkpoint, *options) as terminal:
        terminal.expect(">>> ")
        terminal.insist("\x03", ">>> ")  # at the prompt: only a new line
        terminal.send("hello\n")
        shown = terminal.expect("tokens/forward")
        assert re.search("canvas 1.*step 4/4", shown, re.DOTALL)
        terminal.expect(">>> ")
        terminal.send("/set max_denoising_steps 1000000\n")
        terminal.expect(r"\nmax_denoising_steps 1000000\r")
        terminal.expect(">>> ")
        for presses in (1, 5):
            terminal.send("go on\n")
            shown = terminal.expect(r"step [1-9]\d*/1000000")
            assert "\x1b[?25l" in shown  # the cursor is hidden while the canvas is drawn
            for _ in range(presses):
                terminal.send("\x03")
            shown = terminal.expect(r"\(stopped\)")
            assert "\x1b[?25h" in shown
            terminal.expect(">>> ")
        terminal.insist("/save a\n", r"\n2 messages saved to a\r")  # what was stopped had said nothing yet
        terminal.expect(">>> ")
        terminal.send("\x04")
        assert terminal.wait() == 0
