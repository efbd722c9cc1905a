"""However a Sudoku is typed, the bundled template shows it in one form, and leaves everything else alone."""

import json
import time

import pytest

CELLS = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
ROWS = [CELLS[start : start + 9] for start in range(0, 81, 9)]
FORM = "\n".join(ROWS).replace("0", ".")
DOTS = CELLS.replace("0", ".")
OTHER = "1" + "." * 40 + "23456789" * 5

SPACED = "\n".join(" ".join(row) for row in ROWS)
RULED = "\n".join(
    ("------+-------+------\n" if at in (3, 6) else "")
    + " | ".join(" ".join(row[i : i + 3]) for i in (0, 3, 6))
    for at, row in enumerate(ROWS)
)
BOXED = "\n".join(
    ["┌───────┬───────┬───────┐"]
    + ["│ " + " │ ".join(" ".join(row[i : i + 3]) for i in (0, 3, 6)) + " │" for row in ROWS]
    + ["└───────┴───────┴───────┘"]
)
MARKDOWN = "\n".join("|" + "|".join(row) + "|" for row in ROWS)
LISTS = json.dumps([[int(cell) for cell in row] for row in ROWS])
COMMAS = ",".join(CELLS)

PUZZLES = [
    CELLS, DOTS, CELLS.replace("0", "*"), CELLS.replace("0", "_"), "\n".join(ROWS), FORM, FORM.replace("\n", "\r\n"),
    SPACED, SPACED.replace("0", "."), SPACED.replace("0", "_"), RULED, RULED.replace("0", "."), BOXED, MARKDOWN, LISTS,
    LISTS.replace(" ", ""), json.dumps(json.loads(LISTS), indent=1), COMMAS, " ".join(ROWS), "|".join(ROWS),
    "\n\n".join(ROWS), f"```\n{FORM}\n```", f'"{DOTS}"', f"'{CELLS}'", f"({DOTS})", f"`{DOTS}`",
]  # fmt: skip


def turn(tokenizer, content, role="user"):
    prompt = tokenizer.render([{"role": role, "content": content}], add_generation_prompt=False)
    return prompt.removeprefix(f"<bos><|turn>{role}\n").removesuffix("<turn|>\n")


@pytest.mark.parametrize("puzzle", PUZZLES)
@pytest.mark.parametrize(
    ("sentence", "others"),
    [
        ("{}", ""),
        ("\n {}\n", ""),
        ("{}.", ""),
        ("{} .", ""),
        ("Please solve this:\n{}", "Please solve this:\n"),
        ("Solve {}", "Solve\n"),
        ("Solve {}.", "Solve\n"),
        ("Can you solve {}?", "Can you solve\n"),
        ("Solve {}, please.\nThank  you!", "Solve please. Thank you!\n"),
        ("{}\n\nWhat is the solution?", "What is the solution?\n"),
        ("sudoku:{}", "sudoku:\n"),
        ("Hello!\n\nSudoku no. 3:\n{}\nin 5 minutes", "Hello! Sudoku no. 3: in 5 minutes\n"),
    ],
)
def test_every_form_becomes_one(tokenizer, puzzle, sentence, others):
    assert turn(tokenizer, sentence.format(puzzle)) == others + FORM


@pytest.mark.parametrize(
    ("text", "others"),
    [
        (f"Puzzle 3 {DOTS}", "Puzzle 3\n"),
        (f"Puzzle 12\n{FORM}", "Puzzle 12\n"),
        (f"1. {DOTS}", "1.\n"),
        (f"{DOTS} {OTHER}", OTHER + "\n"),  # the first of two
        (f"{DOTS} and {OTHER}", f"and {OTHER}\n"),
        (f"At 12:30 solve {DOTS}", "At 12:30 solve\n"),
    ],
)
def test_other_words_keep_their_numbers(tokenizer, text, others):
    assert turn(tokenizer, text) == others + FORM


@pytest.mark.parametrize(
    "text",
    [
        "Hi  there,\n  5 - 3 is 2...",
        CELLS[:80],
        f"{SPACED} 5 5",
        DOTS + "12",
        f"5 {SPACED}",  # 82 cells, and nothing tells which one is too many
        "." * 65 + "1234567812345678",  # 16 givens
        "x".join(ROWS),
        "0" * 81,
        "- one\n- two",
        "-----\n| a | b |",
        "",
    ],
)
def test_anything_else_stays_as_it_is(tokenizer, text):
    assert turn(tokenizer, text) == text.strip()


def test_only_users_puzzles(tokenizer):
    assert turn(tokenizer, DOTS, "system") == DOTS
    parts = [{"type": "text", "text": "Solve:"}, {"type": "text", "text": DOTS}]
    assert turn(tokenizer, parts) == f"Solve:\n{FORM}"


def test_seventeen_givens_are_enough(tokenizer):
    cells = "." * 64 + "12345678912345678"
    assert turn(tokenizer, cells) == "\n".join(cells[start : start + 9] for start in range(0, 81, 9))


@pytest.mark.parametrize("text", ["word " * 20_000, "1 " * 50_000, "1" * 200_000, "a:" * 20_000])
def test_long_messages_take_no_long_time(tokenizer, text):
    began = time.perf_counter()
    assert turn(tokenizer, text) == text.strip()
    assert time.perf_counter() - began < 20  # a walk for every character would take minutes
