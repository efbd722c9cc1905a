"""Nothing from outside steers the terminal: every command, fed with names and texts that try."""

import json
import re
import warnings

import numpy as np
import pytest
from rich.text import Text

import dgemma
from dgemma.cli.terminal.console import SafeConsole, printable, say
from dgemma.diffusion.events import CanvasCommitted, Finished, Generation
from dgemma.diffusion.trace import TraceWriter
from dgemma.errors import DgemmaError
from support.openai_server import OpenAIStandIn, text_chunks

EVIL = "a\x1b[2Jb\x1b]52;c;eHg=\x07c\x9b31md\x9d0;t\x9ce\u202ef\u2066g\rh\x00i\x7fj\x85k\u200fl"
OURS = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?(?:25|7|2026)[hl]|\x1b\[\d*[AB]|\x1b\[[02]?K|\r")  # what rich and we send


def steers(text):
    """What of a terminal's input is not text, but for styles and the movements of the live canvas."""
    left = OURS.sub("", text)
    return {char for char in left if char not in "\n\t" and printable(char) != char}


def shown(outcome):
    assert "Traceback" not in outcome.err
    return steers(outcome.out) | steers(outcome.err)


def test_the_filter_changes_nothing_that_is_plain_and_nothing_twice():
    assert printable("plain é 日本 👩‍👩‍👧 \t\n") == "plain é 日本 👩‍👩‍👧 \t\n"
    assert printable(printable(EVIL)) == printable(EVIL)
    assert not steers(printable(EVIL))


@pytest.mark.parametrize("thing", [EVIL, Text(EVIL, "bold"), Text.assemble("a", (EVIL, "red"))])
def test_the_console_lets_styles_through_and_nothing_else(capsys, thing):
    console = SafeConsole(force_terminal=True, color_system="standard")
    console.print(thing, markup=False)
    with console.status(EVIL):
        pass
    out = capsys.readouterr().out
    assert not steers(out)
    assert not isinstance(thing, Text) or "\x1b[" in out


def test_lines_of_the_program(capsys):
    say(EVIL)
    say(EVIL, err=True, fg="red")
    out, err = capsys.readouterr()
    assert not steers(out) and not steers(err)
    assert out == f"{printable(EVIL)}\n"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("arguments", [
    ["inspect", EVIL], ["inspect", f"/no{EVIL}/x.gguf"], ["run", "-m", EVIL, "x"], ["pull", EVIL], [EVIL],
    ["models", "remove", EVIL], ["models", "remove", EVIL, "-y"], ["quantize", EVIL, EVIL],
    ["merge", EVIL, EVIL, "-o", EVIL],
    ["replay", EVIL], ["train", EVIL], ["train", "--preview", "--data", EVIL], ["bench", EVIL], ["run", f"--{EVIL}"],
    ["run", "--adapter", EVIL, "x"], ["run", "--url", f"http://{EVIL}", "x"], ["run", "--seed", EVIL, "x"],
    ["eval", "sudoku", "--band", EVIL], ["chat", "-m", EVIL], ["run", "--device", EVIL, "x"], ["serve", "--host", EVIL],
], ids=lambda value: value[0] if isinstance(value, list) and value[0] != EVIL else None)
def test_names_that_cannot_be_meant(dgemma_command, terminal, arguments):
    arguments = [argument.replace("\x00", "") for argument in arguments]  # no argument has one
    outcome = dgemma_command(*arguments, terminal=terminal)
    assert outcome.code != 0
    assert not shown(outcome)


@pytest.fixture
def checkpoint_with_evil_names(checkpoint, tmp_path):
    """A copy of the tiny model with one tensor more, a damaged setting and names that try."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model\x1b[2J\u202e"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"model.{EVIL}": next(iter(tensors.values())).clone()}, folder / "model.safetensors",
              metadata={"format": "pt", EVIL: EVIL})
    return folder


@pytest.mark.parametrize("terminal", [False, True])
def test_tensors_of_a_checkpoint(dgemma_command, checkpoint_with_evil_names, terminal):
    for command in (["inspect"], ["run", "x", "-m"], ["bench"]):
        assert not shown(dgemma_command(*command, checkpoint_with_evil_names, terminal=terminal))


@pytest.mark.parametrize("terminal", [False, True])
def test_names_in_a_gguf_file(dgemma_command, tmp_path, terminal):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    writer.add_string("general.name", EVIL)
    writer.add_string(f"k{EVIL}", EVIL)
    writer.add_string("tokenizer.chat_template", "{{ raise_exception('" + EVIL.replace("\x00", "") + "') }}")
    writer.add_tensor(EVIL, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for command in (["inspect", path], ["run", "x", "-m", path], ["quantize", path, tmp_path / "y.gguf"]):
        outcome = dgemma_command(*command, terminal=terminal)
        assert outcome.code != 0
        assert not shown(outcome)


@pytest.mark.parametrize("command", [["run", "hello"], ["chat"]])
def test_a_chat_template_s_own_error(dgemma_command, checkpoint, tmp_path, command):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(EVIL) + ") }}")
    outcome = dgemma_command(*command, "-m", folder, stdin="hello\n", terminal=True)
    assert outcome.code == 1
    assert not shown(outcome)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_trace(dgemma_command, tmp_path, terminal):
    path = tmp_path / "x.trace"
    answer = Generation(EVIL, None, [], [5, 6], "stop", [1], 2.0, 1, 0.1)
    with TraceWriter(path, model=EVIL, prompt=EVIL,
                     piece_of=lambda token: (EVIL.encode(), token == 6)) as writer:
        writer.write(CanvasCommitted(0, 0, [5, 6], 1, 0.1))
        writer.write(Finished(0, answer))
    outcome = dgemma_command("replay", path, terminal=terminal)
    assert outcome.code == 0
    if terminal:
        assert not shown(outcome)
    else:
        assert outcome.out == f"{EVIL}\n"  # a pipe gets the text as it is
    path.write_text(f'{{"{EVIL}')
    assert not shown(dgemma_command("replay", path, terminal=terminal))


@pytest.mark.parametrize("fields", [
    {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]},
    {"messages": [{"role": EVIL, "content": EVIL}]}, {EVIL: EVIL}, {"prompt": EVIL, "response": EVIL},
])
def test_rows_of_a_dataset(dgemma_command, tmp_path, fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields) + "\n")
    for more in ([], ["--skip-bad"]):
        assert not shown(dgemma_command("train", "--preview", "--data", path, *more, terminal=True))


@pytest.mark.parametrize("options", [
    dict(models=[{"id": EVIL}], chunks=text_chunks(EVIL)),
    dict(models=[{"id": EVIL}], status=400, answer={"error": EVIL}),
    dict(status=500, answer={"error": {"message": EVIL}}), dict(models_status=500), dict(models=EVIL),
    dict(chunks=[{"error": EVIL}]), dict(chunks=[{"choices": EVIL}]), dict(chunks=[EVIL]),
    dict(chunks=text_chunks(EVIL, reason=EVIL)), dict(status=302, headers={"Location": EVIL.replace("\r", "").replace(
        "\x00", "").encode("latin-1", "replace").decode("latin-1")}),
], ids=range(10))
@pytest.mark.parametrize("command", [["run", "hello"], ["chat"]])
def test_a_server(dgemma_command, options, command):
    with OpenAIStandIn(**options) as server:
        outcome = dgemma_command(*command, "--url", server.url, stdin="hello\n", terminal=True)
    assert not shown(outcome)


def test_warnings_are_one_harmless_line(capsys, dgemma_command):
    with warnings.catch_warnings():  # which puts back how they are shown
        dgemma_command("--version")
        warnings.showwarning(UserWarning(EVIL), UserWarning, "lib/dgemma/x.py", 1)
        assert capsys.readouterr().err == f"Note: {printable(EVIL)}\n"
        warnings.showwarning(UserWarning(EVIL), UserWarning, "x.py", 1)
        assert printable(EVIL) in capsys.readouterr().err


def test_errors_of_the_library_keep_what_was_there():
    """The filter is at the edge: a program that catches an error gets the name as it is."""
    with pytest.raises(DgemmaError) as caught:
        dgemma.load(f"/no\x1b[2J/{'x'}")
    assert "\x1b[2J" in str(caught.value)
