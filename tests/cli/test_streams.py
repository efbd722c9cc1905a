"""Standard streams as shells really give them: marked, in UTF-16, closed, broken; the answer, or one line."""

import codecs
import contextlib
import json
import os
import subprocess
import sys

import pytest

from dgemma.cli.streams import unicode_form

COMMAND = [sys.executable, "-c", "from dgemma.cli.main import main; main()"]
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
QUICK = ("--max-denoising-steps", "1", "--seed", "1")


def shell(line, **options):
    """A line of a shell with $DGEMMA in it; its exit code, stdout and stderr (without the hint)."""
    done = subprocess.run(["sh", "-c", line.replace("$DGEMMA", '"$PYTHON" -c "$CODE"')], capture_output=True,
                          env={**os.environ, "PYTHON": sys.executable, "CODE": COMMAND[2], "OMP_NUM_THREADS": "1"},
                          timeout=120, **options)
    err = [text for text in done.stderr.decode().splitlines() if not text.startswith("Using the bundled")]
    return done.returncode, done.stdout.decode(), err


@pytest.fixture
def said(dgemma_command, monkeypatch):
    """A function: the prompt that the model got when ``run`` reads these bytes."""
    from dgemma.model import Model

    prompts = []
    real = Model.stream

    def stream(model, prompt, **options):
        prompts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        return real(model, prompt, **options)

    monkeypatch.setattr(Model, "stream", stream)

    def say(data, command="run"):
        outcome = dgemma_command(command, *QUICK, stdin=data)
        assert outcome.code == 0, outcome.err
        return prompts
    return say


FORMS = {
    "utf-8": "é 日本 hi\n".encode(), "utf-8 marked": codecs.BOM_UTF8 + "é 日本 hi\n".encode(),
    "utf-16 le": codecs.BOM_UTF16_LE + "é 日本 hi\r\n".encode("utf-16-le"),
    "utf-16 be": codecs.BOM_UTF16_BE + "é 日本 hi\n".encode("utf-16-be"),
    "utf-32 le": codecs.BOM_UTF32_LE + "é 日本 hi\n".encode("utf-32-le"),
    "utf-32 be": codecs.BOM_UTF32_BE + "é 日本 hi\n".encode("utf-32-be"),
    "utf-16 le, no mark": "é 日本 hi\r\n".encode("utf-16-le"), "utf-16 be, no mark": "é 日本 hi\n".encode("utf-16-be"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_is_read_in_any_form_of_unicode(said, form):
    assert said(FORMS[form]) == ["é 日本 hi\n"]


@pytest.mark.parametrize("form", FORMS)
def test_so_are_the_lines_of_a_chat(said, form):
    assert said(FORMS[form], "chat") == ["é 日本 hi"]


@pytest.mark.parametrize("data", [b"a\0b", b"\0", b"hi\0there", b"x"])
def test_a_nul_is_not_taken_for_utf_16(data):
    assert unicode_form(data) is None


@pytest.mark.parametrize("data", [b"\xff\xfeh", b"\xff\xff\xff", b"caf\xe9 and more"])
def test_what_is_no_text_is_one_error(dgemma_command, data):
    outcome = dgemma_command("run", *QUICK, stdin=data)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: the prompt on stdin is not utf-") and outcome.err.count("\n") == 1


def test_closed_streams():
    quick = " ".join(QUICK)
    assert shell("$DGEMMA run <&-") == (
        1, "", ['Error: stdin is closed: give the prompt itself, as in dgemma run "…", or pipe one in'])
    assert shell("$DGEMMA chat <&-") == (1, "", ["Error: stdin is closed, and chat reads its messages there"])
    closed = "Error: stdout is closed: the answer would have nowhere to go; send it to a file or to /dev/null"
    for command in ("run Hello --json", "chat", "models", "doctor"):
        assert shell(f"echo | $DGEMMA {command} >&-") == (1, "", [closed]), command
    code, out, err = shell(f"$DGEMMA run Hello {quick} 2>&-")
    assert (code, err) == (0, []) and out.startswith("I am a small model")
    assert shell(f"echo Hello | $DGEMMA chat {quick} 2>&-")[:2] == (0, out)
    assert shell(f"$DGEMMA run Hello {quick} <&-")[:2] == (0, out)
    assert shell("$DGEMMA pull sudoku <&- >&- 2>&-") == (1, "", [])


def test_a_reader_that_has_seen_enough_and_a_full_disk():
    quick = " ".join(QUICK)
    code, out, err = shell(f"$DGEMMA run Hello {quick} | head -c1")
    assert (code, out, err) == (0, "I", [])
    for command in (f"run Hello {quick}", "inspect sudoku"):
        code, out, err = shell(f"$DGEMMA {command} >/dev/full")
        assert (code, err) == (1, ["Error: the output cannot be written (No space left on device)"]), command


def test_a_closed_stdout_s_number_is_not_given_to_a_file():
    """The next file that is opened would be written into by whoever prints."""
    code = "import sys, os\nsys.argv = ['dgemma', '--version']\nfrom dgemma.cli.main import main\n" \
           "try: main()\nexcept SystemExit: pass\nprint(os.open('/dev/null', os.O_RDONLY) > 2, file=sys.stderr)"
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&-', sys.executable, code], capture_output=True, text=True)
    assert done.stderr == "True\n"


@pytest.mark.parametrize(("lines", "sent"), [
    (["//etc/passwd"], ["/etc/passwd"]), (["//help"], ["/help"]), (["///"], ["//"]),
    (["/etc/passwd holds what?"], ["/etc/passwd holds what?"]), (["/usr/"], ["/usr/"]),
    (['"""/help', 'me"""'], ["/help\nme"]), (['"""//x"""'], ["//x"]), ([" /help"], [" /help"]),
])
def test_a_message_may_begin_with_a_slash(said, lines, sent):
    assert said("".join(f"{line}\n" for line in lines), "chat") == sent


@pytest.mark.parametrize("line", ["/etc", "/halp", "/", "/ x", "/sytem be / brief"])
def test_a_command_that_does_not_exist_is_not_sent(dgemma_command, line):
    outcome = dgemma_command("chat", stdin=f"{line}\n")
    assert (outcome.code, outcome.out) == (1, "")
    assert "there is no command /" in outcome.err and "// sends a message that begins with /" in outcome.err


def test_help_tells_how(dgemma_command):
    assert "is sent with //" in dgemma_command("chat", stdin="/help\n").out


def test_json_on_a_terminal_is_json_and_harmless():
    from dgemma.cli import streams

    class Terminal:
        encoding, closed, written = "utf-8", False, ""

        def isatty(self):
            return True

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    for text in ("plain é", "\x1b]52;c;x\x07 \x9b2J \u202e \x7f"):
        terminal = Terminal()
        with contextlib.redirect_stdout(terminal):
            streams.print_json({"text": text})
        assert json.loads(terminal.written) == {"text": text}
        assert not {*"\x1b\x07\x9b\u202e\x7f"} & {*terminal.written} or text == "plain é"
