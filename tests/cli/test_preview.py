"""The preview says of every token whether it has loss, with colours and without."""

import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

import dgemma
from dgemma.chat.tokenizer import Tokenizer
from dgemma.cli.main import app
from dgemma.cli.terminal.preview import preview, summary
from dgemma.train.data.conversations import conversation_of
from dgemma.train.data.examples import examples_of

ROW = {"messages": [{"role": "user", "content": "Is <turn|> a token?\x1b[31m"},
                    {"role": "assistant", "content": "Yes.\n" + "x" * 10}]}
PLAIN = """── talk, message 1 ──
context: 40 tokens, no loss
<bos><|turn>user↵
Is \\<turn|> a token?\\x1b[31m<turn|>↵
<|turn>model↵
canvas 1 of 2: 12 of 12 tokens are the response
[loss, weight 1] Yes.↵
xxxxxxx
canvas 2 of 2: 4 of 12 tokens are the response
[loss, weight 1] xxx<turn|>
[fill, weight 0.5: 8 × <eos>]
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from dgemma.train.data import tokenizer as bundled

    folder = tmp_path_factory.mktemp("tokenizer")
    bundled.save(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def examples(tokenizer):
    return examples_of(conversation_of(ROW, where="talk"), tokenizer, 12, fill_weight=0.5)


def test_the_plain_text_names_every_part(examples, tokenizer):
    assert [text.plain for text in preview(examples, tokenizer)] == [PLAIN]


def test_what_is_green_are_the_tokens_with_loss(examples, tokenizer):
    (text,) = preview(examples, tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == "Yes.↵\nxxxxxxxxxx<turn|>"
    dim = "".join(text.plain[span.start : span.end] for span in text.spans if "dim" in str(span.style))
    assert dim == PLAIN[PLAIN.index("<bos>") : PLAIN.index("\ncanvas 1")] + "\n"


def test_no_escape_of_the_data_reaches_the_terminal(examples, tokenizer):
    console = Console(force_terminal=False, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    for text in preview(examples, tokenizer):
        console.print(text)
    assert "\x1b" not in console.export_text()


def test_a_canvas_that_cuts_a_character_shows_so(tokenizer):
    row = {"prompt": "a", "response": "xé"}
    (text,) = preview(examples_of(conversation_of(row), tokenizer, 2), tokenizer)
    assert text.plain.count("\ufffd") == 2


def test_of_a_long_context_the_middle_is_left_out_and_of_no_canvas(tokenizer):
    row = {"prompt": "a" * 1000, "response": "b" * 1000}
    (text,) = preview(examples_of(conversation_of(row), tokenizer, 2000), tokenizer)
    assert re.search(r"\n\[… 4\d\d tokens …\]\n", text.plain)
    assert "b" * 1000 in text.plain


def test_only_as_many_turns_as_asked_for(tokenizer):
    turns = [{"role": role, "content": "x" * 20} for role in ("user", "assistant") * 3]
    examples = examples_of(conversation_of({"messages": turns}), tokenizer, 8)
    assert len(examples) == 9
    assert len(list(preview(examples, tokenizer, 2))) == 2


def test_the_summary_counts(examples):
    assert dict(summary(examples)) == {
        "turns": "1 of 1 conversations",
        "canvases": "2 of 12 tokens; 2.0 a turn, 2 at most",
        "tokens": "116: 92 context, 16 response, 8 fill",
        "with loss": "24 (20.7%); 80.0% of their weight is response",
        "longest response": "16 tokens",
        "longest context": "52 tokens (talk, message 1)",
    }


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_the_command_shows_data_as_the_model_would_be_trained(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"text": "?"}) + "\n")
    assert "rows.jsonl:2: columns text" in str(run("--preview", "--data", path).exception)
    done = run("--preview", "--data", path, "--skip-bad")
    assert done.exit_code == 0, done.output
    assert f"canvas 1 of 1: 16 of {dgemma.load('sudoku').config.canvas_length} tokens are the response" in done.output
    assert "Is \\<turn|> a token?" in done.output
    assert "\x1b" not in done.output
    assert re.search(r"left out +1\n", done.output)


def test_the_command_shows_what_a_sudoku_recipe_trains_on(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("{name: r, model: sudoku, max_steps: 1, batch_size: 2, data: {kind: sudoku, bases: 2}}")
    done = run(path, "--preview", "--count", 1)
    assert done.exit_code == 0, done.output
    assert "── step 0: plain, message 1 ──" in done.output
    assert re.search(r"\[loss, weight 1\] ([1-9]{9}↵\n){8}[1-9]{9}<turn\|>", done.output)


@pytest.mark.parametrize("arguments", [[], ["--preview"], ["--data", "x"], ["--preview", "r.yaml", "--data", "x"]])
def test_too_little_or_too_much_is_refused(arguments):
    assert "a recipe" in str(run(*arguments).exception)
