"""Groups of options that a command takes whole."""

from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from dgemma.cli import options
from dgemma.config import SAMPLER_SETTINGS

COLOURS = {"red": Annotated[int | None, typer.Option()], "dark_blue": Annotated[float | None, typer.Option()]}


@pytest.fixture
def paint():
    """Runs a command with a group of options; what it was called with, and how it ended."""
    called = {}

    @options.with_options(colours=COLOURS)
    def command(name: str, loud: bool = False, *, colours: dict[str, Any]) -> None:
        """Paint something."""
        called.update(name=name, loud=loud, colours=colours)

    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: (CliRunner().invoke(app, arguments), called)


def test_those_that_were_given_come_as_one(paint):
    outcome, called = paint("x", "--dark-blue", "0.5", "--loud")
    assert outcome.exit_code == 0 and called == {"name": "x", "loud": True, "colours": {"dark_blue": 0.5}}
    assert paint("y")[1] == {"name": "y", "loud": False, "colours": {}}
    assert paint("y", "--red", "0")[1]["colours"] == {"red": 0}


def test_their_types_are_checked_and_the_help_shows_them(paint):
    assert paint("x", "--red", "much")[0].exit_code == 2
    said = paint("--help")[0].output
    assert "Paint something." in said and "--dark-blue" in said and "--colours" not in said


def test_the_sampler_has_an_option_for_every_setting():
    assert tuple(options.SAMPLER) == tuple(SAMPLER_SETTINGS)
