"""The commands from end to end, with a tiny random model."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma
from dgemma.cli import session
from dgemma.cli.commands import chat as chat_module
from dgemma.cli.commands.chat import Conversation, checked, load, save
from dgemma.cli.terminal.drafts import printable
from dgemma.config import SAMPLER_SETTINGS, GenerationConfig
from dgemma.diffusion.events import Denoised, Generation
from dgemma.diffusion.trace import TraceWriter, read_trace
from dgemma.engine import Engine
from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer
from support.seeing import save_seeing_sudoku
from support.threads import in_thread

STEERING = "\x1b[2Ja\r\n  日本\x07 \u202eb\n\nc "  # what no terminal should get, and no pipe should lose


@pytest.fixture(scope="module")
def model(checkpoint):
    return dgemma.load(checkpoint, device="cpu")


@pytest.fixture
def run(dgemma_command, checkpoint):
    return lambda *arguments, **options: dgemma_command("run", "-m", checkpoint, *arguments, **options)


@pytest.fixture
def chat(dgemma_command, checkpoint):
    """A function that pipes lines into `dgemma chat`."""
    def talk(*lines, options=(), **more):
        return dgemma_command("chat", "-m", checkpoint, *options, stdin="".join(f"{line}\n" for line in lines), **more)

    return talk


@pytest.fixture
def submitted(monkeypatch):
    """The requests that reach the engine."""
    requests = []
    real = Engine.submit

    def submit(engine, request):
        requests.append(request)
        real(engine, request)

    monkeypatch.setattr(Engine, "submit", submit)
    return requests


@pytest.fixture
def answering(monkeypatch):
    """A function that makes every answer a given text, without a model's work."""
    def install(text):
        generation = Generation(text, None, [], [1], "stop", [1], 1.0, 1, 0.1)
        monkeypatch.setattr(session, "follow", lambda *_, **__: generation)

    return install


def refused(outcome, *words):
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ") or "\nError: " in outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


# run


def test_the_prompt_may_come_as_an_argument_or_on_stdin(run, model):
    said = model.generate("hello", seed=3).text
    assert said
    for outcome in (run("hello", "--seed", 3), run("--seed", 3, stdin="hello"), run("-", "--seed", 3, stdin="hello")):
        assert (outcome.code, outcome.out, outcome.err) == (0, said if said.endswith("\n") else said + "\n", "")


@pytest.mark.parametrize(("arguments", "stdin"), [((), ""), (("-",), " \n"), (("",), "not read"), (("  ",), "")])
def test_an_empty_prompt_is_refused(run, arguments, stdin):
    refused(run(*arguments, stdin=stdin), "the prompt is empty")


def test_a_prompt_that_is_no_text_is_refused(run):
    refused(run(stdin=b"caf\xe9"), "not utf-8 text", "byte 3")


def test_json_is_the_generation(run, model):
    outcome = run("hello", "--seed", 3, "--json")
    data = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert list(data) == [field.name for field in dataclasses.fields(Generation)]
    expected = dataclasses.asdict(model.generate("hello", seed=3))
    own = {"seconds": 0, "cached_tokens": 0}  # of this run; the other one may have read the prompt before
    assert data | own == expected | own


def test_a_seed_fixes_the_text(run):
    first, second, other = (run("hello", "--seed", seed).out for seed in (5, 5, 6))
    assert first == second != other
    assert run("hello").out != run("hello").out


def test_max_tokens(run):
    data = json.loads(run("hello", "--seed", 3, "--max-tokens", 5, "--json").out)
    assert (len(data["token_ids"]), data["finish_reason"]) == (5, "length")


def test_every_sampler_option_reaches_the_request(run, submitted):
    wanted = dict(zip(SAMPLER_SETTINGS, (3, 0.25, 0.3, 0.9, 2, 0.01), strict=True))
    options = [str(part) for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("hello", "--system", "Be brief.", "--thinking", "--max-tokens", 7, *options).code == 0
    (request,) = submitted
    assert request.settings == GenerationConfig(**wanted, max_tokens=7, eos_token_id=(1, 106))
    run("hello")
    assert len(submitted[1].prompt_ids) < len(request.prompt_ids)


@pytest.mark.parametrize(("option", "value"), [
    ("--max-denoising-steps", 0), ("--entropy-bound", 0), ("--t-min", -1), ("--t-max", 0.1),
    ("--stability-threshold", -1), ("--confidence-threshold", "nan"), ("--max-tokens", 0), ("--seed", -1),
    ("--seed", 2**63),
])
def test_bad_values_are_refused_in_one_line(run, option, value):
    refused(run("hello", option, value), option[2:].replace("-", "_"))
    refused(run("hello", option, value, "--json"))


def test_values_of_another_kind_are_a_mistake_of_usage(run):
    outcome = run("hello", "--t-min", "warm")
    assert outcome.code == 2
    assert "--t-min" in outcome.err


def test_a_pipe_gets_the_text_as_it_is_and_a_terminal_harmlessly(run, answering):
    answering(STEERING)
    assert run("hello").out == STEERING + "\n"
    assert run("hello", "--no-visual").out == STEERING + "\n"
    assert run("hello", "--no-visual", terminal=True).out == printable(STEERING) + "\n"
    assert "\x1b" not in run("hello", "--no-visual", terminal=True).out
    shown = run("hello", "--json", terminal=True).out  # JSON has its own way to write what would steer
    assert json.loads(shown)["text"] == STEERING and printable(shown) == shown
    for text in ("", "a", "a\n"):
        answering(text)
        assert run("hello").out == text.rstrip("\n") + "\n"


def test_an_ascii_stdout_gets_escapes_and_json_stays_json(run, answering):
    answering("é日🎉")
    assert run("hello", encoding="ascii").out == "\\xe9\\u65e5\\U0001f389\n"
    assert json.loads(run("hello", "--json", encoding="ascii").out)["text"] == "é日🎉"
    refused(run("hello", "--device", "é", encoding="ascii"), "device 'é' cannot be used")  # Typer writes UTF-8 anyway


def test_a_trace_has_candidates_where_they_are_asked_for(run, tmp_path):
    trace = tmp_path / "a.jsonl"
    run("hello", "--seed", 3, "--trace", trace, "--candidates", 2)
    steps = [event for event in read_trace(trace).events if isinstance(event, Denoised)]
    assert steps and all(len(place) == 2 for step in steps for place in step.candidates)
    refused(run("hello", "--candidates", 2), "--candidates are for a trace")
    refused(run("hello", "--trace", trace, "--candidates", -1), "candidates must be")


def test_a_trace_replays_the_same_text(run, dgemma_command, tmp_path):
    trace = tmp_path / "a.jsonl"
    said = run("hello", "--seed", 3, "--trace", trace).out
    assert read_trace(trace).header.prompt == "hello"
    assert all(event.candidates is None for event in read_trace(trace).events if isinstance(event, Denoised))
    replayed = dgemma_command("replay", trace)
    assert (replayed.code, replayed.out) == (0, said)
    refused(run("hello", "--trace", tmp_path), str(tmp_path), "this is a folder")
    refused(run("hello", "--trace", tmp_path / "none" / "a"), "cannot be written")
    assert os.listdir(tmp_path) == ["a.jsonl"]


# which model


def test_an_unknown_model_lists_those_there_are(dgemma_command, bundled):
    refused(dgemma_command("run", "-m", "sudoko", "hello"), "sudoko", "bundled: chess, sudoku")


@pytest.mark.parametrize("command", [("run", "hello"), ("chat",), ("eval", "sudoku"), ("inspect",)])
def test_an_empty_model_name_is_not_the_bundled_model(dgemma_command, checkpoint, working_folder, command):
    working_folder(checkpoint)
    model = [""] if command == ("inspect",) else ["-m", ""]
    refused(dgemma_command(*command, *model), "the model's name is empty")


def test_inspect(dgemma_command, checkpoint, tmp_path):
    outcome = dgemma_command("inspect", checkpoint)
    assert (outcome.code, outcome.err) == (0, "")
    assert "No problems found" in outcome.out
    assert "288 tokens, with a chat template" in outcome.out
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    outcome = dgemma_command("inspect", broken)
    assert outcome.code == 1
    assert "truncated" in outcome.out
    assert "No problems found" not in outcome.out
    refused(dgemma_command("inspect", tmp_path / "none"), "no such file or folder")


# chat


def test_turns_follow_each_other_and_only_new_tokens_are_read(chat, model, submitted, monkeypatch):
    read = []
    real = DiffusionTransformer.encode

    def encode(network, inputs, cache, **options):
        read.extend((sequence.length, count) for sequence, count in zip(cache.sequences, cache.counts, strict=True))
        return real(network, inputs, cache, **options)

    monkeypatch.setattr(DiffusionTransformer, "encode", encode)
    outcome = chat("hello", "", '"""and', 'so on"""', options=("--seed", 3, "--max-tokens", 16))
    pieces = list(read)
    said = model.generate("hello", seed=3, max_tokens=16).text
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(said)
    first, second = (request.prompt_ids for request in submitted[:2])
    assert second == model.prompt_ids([{"role": "user", "content": "hello"}, {"role": "assistant", "content": said},
                                       {"role": "user", "content": "and\nso on"}])
    assert pieces[0] == (0, len(first))
    assert [known for known, count in pieces[1:] if known + count == len(second)] >= [len(first)]


def test_commands(chat, submitted, tmp_path):
    kept = tmp_path / "kept.json"
    outcome = chat("/help", "/system Be brief.", "/thinking on", "/set max-tokens 9", "/set t_max 1", "/set", "/seed 4",
                   "hello", f"/save {kept}", "/clear", "/seed", "/system", "/thinking off", "hello",
                   f"/load {kept}", "again", "/exit", "never read")
    assert (outcome.code, outcome.err) == (0, "")
    for line in ("system message set", "thinking on", "max_tokens 9", "t_max 1.0", "seed 4", "conversation forgotten",
                 f"2 messages saved to {kept}", f"2 messages loaded from {kept}", "random seeds", "no system message"):
        assert line in outcome.out.splitlines(), line
    assert "/thinking on|off" in outcome.out
    assert len(submitted) == 3
    assert [request.seed for request in (submitted[0], submitted[2])] == [4, 4]
    assert submitted[0].settings.max_tokens == 9
    assert submitted[0].settings.t_max == 1.0
    # The one in the middle had no system message and no thoughts; the last one has a turn before it.
    sizes = [len(request.prompt_ids) for request in submitted]
    assert sizes[1] < sizes[0] < sizes[2]


MISTAKES = [
    "/nonsense", "/thinking maybe", "/seed -1", "/seed 1.5", "/seed 99999999999999999999", "/set nonsense 1",
    "/set t_min", "/set t_min warm", "/set t_min 9", "/set max_tokens 1.5", "/set max_tokens 0", "/save", "/save .",
    "/save /", "/save none/a", "/save ~nobody-of-that-name/a", "/load", "/load .", "/load none", "/load a\0b",
]


def test_mistakes_do_not_end_a_conversation_but_count(chat, submitted, tmp_path, working_folder):
    working_folder(tmp_path)
    outcome = chat(*MISTAKES, "hello")
    errors = outcome.err.splitlines()
    assert len(errors) == len(MISTAKES)
    for line, error in zip(MISTAKES, errors, strict=True):
        assert error.startswith("Error: "), line
    assert outcome.code == 1
    assert len(submitted) == 1
    to_the_end = 131_072 - len(submitted[0].prompt_ids)
    expected = GenerationConfig(max_denoising_steps=4, max_tokens=to_the_end, eos_token_id=(1, 106))
    assert submitted[0].settings == expected
    assert chat(MISTAKES[0], "/exit").code == 1
    assert os.listdir(tmp_path) == []


def test_what_fails_in_an_answer_does_not_end_a_conversation(chat, monkeypatch):
    answers = iter([MemoryError(), RuntimeError("out of memory"), OverflowError("too large"), None])
    real = chat_module.answer

    def answer(*arguments):
        if (error := next(answers)) is not None:
            raise error
        real(*arguments)

    monkeypatch.setattr(chat_module, "answer", answer)
    outcome = chat("one", "two", "three", "four")
    assert outcome.err.count("Error: the answer failed") == 3
    assert (outcome.code, bool(outcome.out)) == (1, True)


def test_an_interruption_anywhere_does_not_end_a_conversation(chat, monkeypatch, submitted):
    real = chat_module.answer
    turns = iter(range(3))

    def answer(*arguments):
        turn = next(turns)
        if turn == 0:
            raise KeyboardInterrupt
        if turn == 1:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(chat_module, "answer", answer)
    outcome = chat("one", "two", "three")
    assert outcome.err == "(stopped)\n"
    assert (outcome.code, len(submitted)) == (0, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_answer_stays_as_far_as_it_came(chat, monkeypatch, tmp_path):
    real = DiffusionTransformer.denoise
    calls = iter(range(1000))

    def denoise(*arguments):
        if next(calls) == 5:  # within the second canvas
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(DiffusionTransformer, "denoise", denoise)
    kept = tmp_path / "kept.json"
    outcome = chat("one", f"/save {kept}", "two", options=("--seed", 3, "--confidence-threshold", 1e-9))
    assert (outcome.code, outcome.err) == (0, "(stopped)\n")
    assert len(json.loads(kept.read_text())["messages"]) == 2


def test_bytes_that_are_no_text_do_not_end_a_conversation(dgemma_command, checkpoint):
    outcome = dgemma_command("chat", "-m", checkpoint, stdin=b"caf\xe9\n")
    assert outcome.err.startswith("Error: that is not utf-8 text")
    assert outcome.code == 1


def test_bad_options_are_refused_before_the_first_message(chat):
    refused(chat("hello", options=("--t-min", "9")), "t_max")
    refused(chat("hello", options=("--seed", "-1")), "seed")


def test_save_and_load(tmp_path, model):
    messages = [{"role": "user", "content": "日 \udc80"}]
    conversation = Conversation(messages, "s", True, 3, {"max_tokens": 4, "t_min": 0.1})
    save(conversation, tmp_path / "a")
    assert load(tmp_path / "a", model) == conversation
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("change", [
    {"messages": "hello"}, {"messages": {}}, {"messages": [1]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": [], "content": "a"}]}, {"messages": [{"role": "user", "content": [{"type": []}]}]},
    {"messages": [{"role": "tool", "content": "a", "tool_call_id": []}]}, {"messages": None},
    {"system": 3}, {"system": ["a"]}, {"thinking": 1}, {"thinking": None}, {"thinking": "on"},
    {"seed": -1}, {"seed": True}, {"seed": 1.0}, {"seed": "1"}, {"seed": 2**63},
    {"settings": None}, {"settings": []}, {"settings": {"max_tokens": "9"}}, {"settings": {"t_min": 5}},
    {"settings": {"eos_token_id": 3}}, {"settings": {"nonsense": 1}}, {"settings": {"max_tokens": 1.5}},
    {"extra": 1},
])
def test_a_file_that_is_no_sound_conversation(tmp_path, model, change):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**dataclasses.asdict(Conversation()), **change}))
    with pytest.raises(DgemmaError, match=re.escape(str(path))):
        load(path, model)


def test_what_cannot_be_loaded_changes_nothing(chat, submitted, tmp_path):
    (tmp_path / "a").write_text(json.dumps({**dataclasses.asdict(Conversation(seed=9)), "settings": {"max_tokens": 0}}))
    outcome = chat(f"/load {tmp_path / 'a'}", "hello", options=("--seed", 3))
    assert "max_tokens" in outcome.err
    assert (outcome.code, [request.seed for request in submitted]) == (1, [3])


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_conversation(tmp_path, model, text):
    (tmp_path / "a").write_text(text)
    with pytest.raises(DgemmaError, match="is not a saved conversation"):
        load(tmp_path / "a", model)


def test_what_checked_lets_through(model):
    sound = Conversation([], None, False, 2**63 - 1, {"max_tokens": 1, "t_max": 1})
    assert checked(sound, model) is sound


# eval, train, and the command itself


def test_eval_sudoku(dgemma_command, checkpoint, tmp_path):
    options = ("-m", checkpoint, "--max-denoising-steps", 1)
    outcome = dgemma_command("eval", "sudoku", "--count", 1, "--band", "easy", *options)
    assert outcome.code == 0
    assert re.search(r"easy\s.*\b1\b.*0\.0%", outcome.out)
    line = {"puzzle": "." * 9 + SOLVED[9:], "solution": SOLVED}
    (tmp_path / "puzzles").write_text(json.dumps(line) + "\n")
    outcome = dgemma_command("eval", "sudoku", "--puzzles", tmp_path / "puzzles", "--json", *options)
    (score,) = json.loads(outcome.out).values()
    assert (score["count"], score["exact"], score["mean_steps"]) == (1, 0.0, 3.0)  # a step for each of three canvases
    for option in (("--count", 100), ("--band", "easy")):
        refused(dgemma_command("eval", "sudoku", "--puzzles", tmp_path / "puzzles", *option, *options), option[0])
    refused(dgemma_command("eval", "sudoku", "--band", "none", *options), "easy, medium, hard")


def test_eval_sudoku_pictures(dgemma_command, checkpoint, tmp_path):
    options = ("--images", "--count", 1, "--band", "easy", "--max-denoising-steps", 1, "-m",
               save_seeing_sudoku(tmp_path / "seeing"))
    outcome = dgemma_command("eval", "sudoku", *options)
    assert outcome.code == 0
    assert re.findall(r"(clean|photo)\s+(easy|all)\s+1\b", outcome.out) == [
        ("clean", "easy"), ("clean", "all"), ("photo", "easy"), ("photo", "all")]
    scores = json.loads(dgemma_command("eval", "sudoku", "--photos", "--json", *options).out)
    assert scores["photo"].keys() == {"easy", "all"} and scores.keys() == {"photo"}
    assert scores["photo"]["all"]["count"] == 1
    refused(dgemma_command("eval", "sudoku", "--photos"), "--images")
    refused(dgemma_command("eval", "sudoku", "--images", "--puzzles", "x"), "--puzzles")
    refused(dgemma_command("eval", "sudoku", "--images", "-m", checkpoint), "sees no pictures")


SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.mark.parametrize("missing", ["yaml", "tensorboard"])
def test_training_without_its_extra(dgemma_command, not_installed, missing):
    not_installed(missing, room="dgemma.train")
    refused(dgemma_command("train", "none.yaml"), missing, "pip install 'dgemma[train]'")


@pytest.mark.parametrize("arguments", [
    ["run", "hi", "--max-denoising-steps", "1"], ["run", "hi", "--json", "--max-denoising-steps", "1"], ["models"],
    ["inspect", "sudoku"], ["chat", "--max-denoising-steps", "1"],
])
def test_a_command_runs_in_a_thread(dgemma_command, arguments):
    outcome = in_thread(lambda: dgemma_command(*arguments, stdin="hi\n"))
    assert outcome.code == 0 and outcome.out


def python(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(dgemma.__file__).parents[1]), **options.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen([sys.executable, "-c", code, *options.pop("arguments", ())], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "numpy", "transformers", "tokenizers", "jinja2", "safetensors", "huggingface_hub"}
    code = f"import sys, dgemma.cli.main; print(*{heavy} & {{*sys.modules}})"
    assert python(code).communicate(timeout=100) == (b"\n", b"")


COMMAND = "from dgemma.cli.main import main; main()"


@pytest.fixture
def trace(fake, tmp_path):
    made = fake("日本", words=False, canvas=16, steps=1)
    with TraceWriter(tmp_path / "trace", model="m", prompt="", piece_of=made.piece_of) as writer:
        for event in made.events():
            writer.write(event)
    return str(tmp_path / "trace")


def test_a_reader_who_has_seen_enough_is_no_error(trace):
    process = python(COMMAND, arguments=("replay", trace))
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(100) == 1  # Typer's
    process.stderr.close()


def test_ctrl_c_while_loading_is_no_traceback(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load_model", interrupted)
    outcome = run("hello")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "")


def test_an_ascii_stdout_is_no_error(trace):
    process = python(COMMAND, arguments=("replay", trace), env={"PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=100) == (b"\\u65e5\\u672c\n", b"")
