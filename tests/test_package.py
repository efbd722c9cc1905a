"""The package as its users meet it: fast to import, complete, with a model in it."""

import subprocess
import sys

import pytest

import dgemma

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = ("534678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286179")
HEAVY = ("torch", "numpy", "transformers", "jinja2", "tokenizers")


@pytest.mark.parametrize("module", ["dgemma", "dgemma.cli.main"])
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_running_a_model_never_imports_transformers():
    code = ("import sys, dgemma; dgemma.load('sudoku').generate('hi', max_denoising_steps=1);"
            "print('transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    for name in dgemma.__all__:
        assert getattr(dgemma, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = dgemma.nothing


class TestTheBundledModel:
    """It is real: it solves, it says what it is, it reads a puzzle however it is written."""

    @pytest.fixture(scope="class")
    def model(self):
        return dgemma.load("sudoku")

    @pytest.mark.parametrize("text", [
        PUZZLE,
        PUZZLE.replace(".", "0"),
        "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9)),
        "\n".join(" ".join(PUZZLE[i : i + 9]) for i in range(0, 81, 9)),
        f"Could you please solve this Sudoku: {PUZZLE} and tell me the answer?",
    ], ids=["dots", "zeros", "lines", "spaces", "sentence"])
    def test_a_puzzle_is_solved_however_it_is_written(self, model, text):
        assert model.generate(text, seed=1).text == SOLUTION

    @pytest.mark.parametrize("text", ["Hello!", "What is the capital of France?", "12345", PUZZLE[:80]])
    def test_what_is_no_puzzle_gets_an_honest_sentence(self, model, text):
        answer = model.generate(text, seed=1).text
        assert "Sudoku" in answer
        assert "I am a small model" in answer

    def test_a_second_puzzle_in_a_conversation_is_solved_too(self, model):
        messages = [{"role": "user", "content": "Hello!"},
                    {"role": "assistant", "content": model.generate("Hello!", seed=1).text},
                    {"role": "user", "content": PUZZLE}]
        assert model.generate(messages, seed=1).text == SOLUTION

    def test_the_same_seed_gives_the_same_answer_in_a_batch(self, model):
        alone = model.generate(PUZZLE, seed=5)
        batch = model.generate_batch(["Hello!", PUZZLE, "What?"], seeds=[1, 5, 2])
        assert batch[1].token_ids == alone.token_ids
        assert batch[1].steps == alone.steps

    def test_it_fits_the_package(self):
        from dgemma.weights.hub.locate import locate

        assert sum(path.stat().st_size for path in locate("sudoku").iterdir()) < 16 * 2**20
