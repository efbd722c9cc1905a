"""The `dgemma` command: one thin file per subcommand, loaded when it is called."""

from __future__ import annotations

import errno
import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from dgemma import __version__
from dgemma.cli.commands.bench import bench
from dgemma.cli.commands.chat import chat
from dgemma.cli.commands.doctor import doctor
from dgemma.cli.commands.evaluate import evaluate_app
from dgemma.cli.commands.inspect import inspect
from dgemma.cli.commands.merge import merge
from dgemma.cli.commands.models import models_app
from dgemma.cli.commands.pull import pull
from dgemma.cli.commands.quantize import quantize
from dgemma.cli.commands.replay import replay
from dgemma.cli.commands.run import run
from dgemma.cli.commands.serve import serve
from dgemma.cli.commands.studio import studio
from dgemma.cli.commands.train import train
from dgemma.cli.streams import give_up_stdout, occupy_descriptors
from dgemma.cli.terminal.console import printable, say, say_error, say_warning
from dgemma.errors import DgemmaError

_CANNOT_WRITE = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class Commands(TyperGroup):
    """The commands, whose complaints about their arguments (a shell's ``*`` may be names of files) steer nothing."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Typer's own kind, which it has from click, or from its copy of it; what it prints of one is the message.
            if isinstance(message := getattr(error, "message", None), str):
                setattr(error, "message", printable(message))  # noqa: B010
            raise


app = typer.Typer(name="dgemma", cls=Commands, no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False,
                  help="Run, watch and train DiffusionGemma: text by denoising a whole canvas at a time.",
                  context_settings={"help_option_names": ["-h", "--help"]})
for command in (run, chat, serve, studio, pull, inspect, quantize, merge, bench, replay, train, doctor):
    app.command()(command)
app.add_typer(models_app, name="models")
app.add_typer(evaluate_app, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        say(f"dgemma {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                   help="Print the version.")] = False) -> None:
    pass


def _say_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                 file: TextIO | None = None, line: str | None = None) -> None:
    """What the library has to say to its user, as one; all else as Python shows it."""
    if category is UserWarning and "dgemma" in Path(filename).parts:
        say_warning(message)
    else:
        sys.stderr.write(printable(warnings.formatwarning(message, category, filename, lineno, line)))


def main() -> None:
    """Run the command line; a user's mistake ends in one line on stderr and exit code 1.

    Typer itself ends quietly on Ctrl-C (exit code 130) and when whoever reads the output has seen enough (1).
    """
    occupy_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an ASCII terminal cannot spell is escaped, not a traceback
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _say_warning
    try:
        app()
    except DgemmaError as error:
        say_error(error)
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in _CANNOT_WRITE:
            raise
        give_up_stdout()
        say_error(f"the output cannot be written ({error.strerror})")
        sys.exit(1)


if __name__ == "__main__":
    main()
