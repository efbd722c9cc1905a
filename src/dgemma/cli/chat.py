"""`dgemma chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from dgemma.cli import options
from dgemma.config import SAMPLER_SETTINGS
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma.api import Model

HELP = '''/help             this
/system TEXT      set the system message (nothing: remove it)
/thinking on|off  let the model think before it answers
/set NAME VALUE   a setting: max_tokens, {settings}  (/set alone: show them)
/seed N           fix the randomness (nothing: random again)
/save FILE        keep this conversation
/load FILE        go on with a kept one
/clear            forget the conversation
/exit             leave (Ctrl-D too)
Ctrl-C stops an answer. \"\"\" starts and ends a message of several lines.'''


def chat(
    model: options.ModelOption = None,
    seed: options.SeedOption = None,
    max_tokens: options.MaxTokensOption = None,
    system: options.SystemOption = None,
    thinking: options.ThinkingOption = False,
    visual: options.VisualOption = True,
    pace: options.PaceOption = 0.1,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    max_denoising_steps: options.MaxStepsOption = None,
    entropy_bound: options.EntropyBoundOption = None,
    t_min: options.TMinOption = None,
    t_max: options.TMaxOption = None,
    stability_threshold: options.StabilityOption = None,
    confidence_threshold: options.ConfidenceOption = None,
) -> None:
    """Talk with a model; what it has read stays in its cache from turn to turn. /help lists the commands."""
    settings = options.sampler_settings(locals())
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens

    from dgemma.cli.session import is_terminal, load_model

    loaded = load_model(model, device, dtype)
    try:
        loaded.generation_config.replace(**settings)
    except ValueError as error:
        raise DgemmaError(str(error)) from error
    conversation = Conversation(system=system, thinking=thinking, seed=seed, settings=settings)
    live = visual and is_terminal()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        Console().print(f"[bold]{loaded.name}[/bold]: say something, /help for commands, /exit to leave",
                        highlight=False)
    while (message := _read_message()) is not None:
        if not message.strip():
            continue
        try:
            if message.startswith("/"):
                if not command(loaded, conversation, message):
                    return
            else:
                answer(loaded, conversation, message, live, pace)
        except DgemmaError as error:
            typer.secho(f"Error: {error}", fg="red", err=True)


@dataclass
class Conversation:
    """What /save keeps: the messages so far and the settings in force."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    thinking: bool = False
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def _read_message() -> str | None:
    """A message from stdin, None at its end. A line that starts with three quotes goes on to the next three."""
    shown = ">>> " if sys.stdin.isatty() else ""
    try:
        line = input(shown)
        if not line.lstrip().startswith('"""'):
            return line
        lines = [line.lstrip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... " if shown else ""))
        return "\n".join([*lines[:-1], lines[-1].rstrip()[:-3]]).strip("\n")
    except EOFError:
        return None
    except KeyboardInterrupt:  # at the prompt: drop the line, as shells do
        print()
        return ""


def answer(model: Model, conversation: Conversation, message: str, live: bool, pace: float = 0.0) -> None:
    """Send a message and show the answer; both join the conversation. A stopped answer stays as far as it came."""
    from dgemma.cli.session import follow

    messages = [*conversation.messages, {"role": "user", "content": message}]
    events = model.stream(messages, system=conversation.system, thinking=conversation.thinking,
                          seed=conversation.seed, **conversation.settings)
    generation = follow(model, events, visual=live, pace=pace)
    if not live:
        typer.echo(generation.text)
    if generation.finish_reason == "cancelled":
        typer.secho("(stopped)", dim=True, err=True)
        if not generation.text:
            return
    conversation.messages = [*messages, {"role": "assistant", "content": generation.text}]


def command(model: Model, conversation: Conversation, line: str) -> bool:
    """Carry out a /command; False means leave. Raises DgemmaError on a mistake."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit", "bye"):
        return False
    if name in ("help", "?"):
        typer.echo(HELP.format(settings=", ".join(SAMPLER_SETTINGS)))
    elif name == "system":
        conversation.system = rest or None
        typer.echo("system message set" if rest else "no system message")
    elif name == "thinking":
        if rest not in ("on", "off"):
            raise DgemmaError("/thinking takes on or off")
        conversation.thinking = rest == "on"
        typer.echo(f"thinking {rest}")
    elif name == "seed":
        conversation.seed = _seed(rest)
        typer.echo("random seeds" if conversation.seed is None else f"seed {conversation.seed}")
    elif name == "set":
        _set(model, conversation, rest)
    elif name == "clear":
        conversation.messages = []
        model.prefixes.clear()
        typer.echo("conversation forgotten")
    elif name == "save":
        save(conversation, _path(rest, "save"))
        typer.echo(f"{len(conversation.messages)} messages saved to {rest}")
    elif name == "load":
        loaded = load(_path(rest, "load"))
        for part in dataclasses.fields(Conversation):
            setattr(conversation, part.name, getattr(loaded, part.name))
        typer.echo(f"{len(conversation.messages)} messages loaded from {rest}")
    else:
        raise DgemmaError(f"there is no command /{name}; /help lists them")
    return True


def _seed(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise DgemmaError(f"/seed takes a whole number of at least 0, got {text!r}")
    return int(text)


def _set(model: Model, conversation: Conversation, text: str) -> None:
    current = model.generation_config.replace(**conversation.settings)
    names = ("max_tokens", *SAMPLER_SETTINGS)
    if not text:
        for name in names:
            typer.echo(f"{name} {getattr(current, name)}")
        return
    name, _, value = text.partition(" ")
    name = name.replace("-", "_")
    if name not in names:
        raise DgemmaError(f"there is no setting {name}; there are {', '.join(names)}")
    try:
        number = type(getattr(current, name))(value)
        current.replace(**{name: number})
    except ValueError as error:
        raise DgemmaError(f"/set {name}: {error}") from error
    conversation.settings = {**conversation.settings, name: number}
    typer.echo(f"{name} {number}")


def _path(text: str, name: str) -> Path:
    if not text:
        raise DgemmaError(f"/{name} takes a file name")
    return Path(text).expanduser()


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON, beside its place first."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(dataclasses.asdict(conversation), ensure_ascii=False, indent=2) + "\n",
                          encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DgemmaError(f"{path}: cannot be written ({error.strerror})") from error


def load(path: Path) -> Conversation:
    """Read what `save` wrote; raises DgemmaError naming the file and what is wrong with it."""
    from dgemma.chat import normalise_messages

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DgemmaError(f"{path}: is not a saved conversation ({error})") from error
    if not isinstance(data, dict) or set(data) != {part.name for part in dataclasses.fields(Conversation)}:
        raise DgemmaError(f"{path}: is not a saved conversation")
    if data["messages"]:
        normalise_messages(data["messages"])
    return Conversation(**data)
