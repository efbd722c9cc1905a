"""What README and docs show works as written."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = [page for page in PAGES if page.name != "serving.md"]  # that needs a server: test_serving_docs.py
# A download, hours, a server, a model that sees (test_fine_tuning_docs.py).
SKIPPED = ("26B", "ORG/", "recipes/", "runs/extraction/", "dgemma serve", "dgemma studio", "--url", "scans")
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"

RECIPE = """
name: mails
model: sudoku
data: {train: mails.jsonl, held_out_share: 0.25, fill: pad}
max_steps: 1
batch_size: 2
adapter: {r: 2}
evaluation: {examples: 1}
"""


def blocks(language):
    for page in HERE:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(text, id=f"{page.name}-{number}")


def commands():
    """The `dgemma` lines of console blocks that need neither a download nor hours."""
    for page in HERE:
        for text in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            for line in text.splitlines():
                if line.startswith("$ dgemma") and not any(word in line for word in SKIPPED):
                    yield line[2:].replace("--count 300", "--count 1 --max-denoising-steps 2")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_a_python_example_runs(code):
    exec(compile(code, "example", "exec"), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run_in_order(tmp_path, dgemma_command, working_folder):
    """In one process: each of them alone takes seconds to start."""
    working_folder(tmp_path)
    (tmp_path / "puzzle.txt").write_text(PUZZLE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("mails", "conversations"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "Is it open?", "response": "Yes."}\n' * 4)
    (tmp_path / "mails.yaml").write_text(RECIPE)
    lines = list(commands())
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.split(" | ")[0], comments=True)
        stdin = (tmp_path / words.pop()).read_text() if "<" in words else ""
        outcome = dgemma_command(*(word for word in words[1:] if word != "<"), stdin=stdin)
        assert outcome.code == 0, (line, outcome.err)
        assert outcome.out.strip(), line


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", page.read_text()):
            path = page.parent / (target[0] or target[1])
            assert path.exists(), f"{page.name}: {path}"
