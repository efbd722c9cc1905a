"""`dgemma chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from dgemma.cli import options
from dgemma.cli.media import dropped, media_part, said_of, waiting
from dgemma.cli.streams import has_stdin, is_terminal, need_stdout, print_text, recognise_stdin
from dgemma.cli.terminal.console import SafeConsole, say, say_error
from dgemma.config import SAMPLER_SETTINGS, GenerationConfig
from dgemma.errors import DgemmaError
from dgemma.fields import read_bytes
from dgemma.files import atomic_write, json_bytes
from dgemma.machine import signals_handled

if TYPE_CHECKING:
    from dgemma.cli.calls import TerminalTools
    from dgemma.cli.session import AnyModel
    from dgemma.diffusion.events import Generation

HELP = '''/help             this
/image FILE       show a picture with the next message (--image-tokens N: in so many);
                  a path dropped here does the same
/video FILE       show a film (--fps N: frames a second)
/system TEXT      set the system message (nothing: remove it)
/thinking on|off  let the model think before it answers
/set NAME VALUE   a setting: max_tokens, {settings}  (/set alone: show them)
/seed N           fix the randomness (nothing: random again)
/save FILE        keep this conversation
/load FILE        go on with a kept one
/clear            forget the conversation
/tools NAME WHAT  let a tool run by itself (auto), after a question (ask) or never
                  (off)  (/tools alone: show them)
/exit             leave (Ctrl-D too)
Ctrl-C stops an answer. \"\"\" starts and ends a message of several lines. A message
that begins with / is sent with // or in these quotes; a path (/etc/hosts) as it is.'''
SETTINGS = ("max_tokens", *SAMPLER_SETTINGS)


@options.with_options(local=options.LOCAL, settings=options.ANSWER)
def chat(
    model: options.ModelOption = None,
    seed: options.SeedOption = None,
    system: options.SystemOption = None,
    thinking: options.ThinkingOption = False,
    visual: options.VisualOption = True,
    preview: options.PreviewOption = options.PreviewKind.AUTO,
    pace: options.PaceOption = 0.1,
    url: options.UrlOption = None,
    api_key: options.ApiKeyOption = None,
    tools: options.ToolsOption = None,
    mcp_config: options.McpConfigOption = None,
    *,
    local: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Talk with a model; what it has read stays in its cache from turn to turn. /help lists the commands."""
    from dgemma.cli.session import open_model

    need_stdout()
    if not has_stdin():
        raise DgemmaError("stdin is closed, and chat reads its messages there")
    live = visual and is_terminal()
    with contextlib.ExitStack() as stack:
        callable_tools = None
        if tools is not None or mcp_config is not None:
            from dgemma.cli.calls import open_tools

            callable_tools = stack.enter_context(open_tools(tools, mcp_config))
        loaded = open_model(model, url=url, api_key=api_key, live=live, **local)
        conversation = checked(Conversation(system=system, thinking=thinking, seed=seed, settings=settings), loaded)
        _converse(loaded, conversation, Look(live, pace, preview), callable_tools)


def _converse(loaded: AnyModel, conversation: Conversation, look: Look, tools: TerminalTools | None) -> None:
    """Greet whoever sits there, and talk. Raises typer.Exit where nobody does and a message went wrong."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        SafeConsole().print(Text(loaded.name, "bold"), Text(": say something, /help for commands, /exit to leave"),
                            sep="")
    else:
        recognise_stdin()
    # Nothing that goes wrong with a message may cost the conversation. Ctrl-C never does more than stop an answer,
    # however often it comes: only at the prompt is it an exception.
    with signals_handled(lambda *_: loaded.cancel(), signal.SIGINT):
        sound = _talk(loaded, conversation, look, tools)
    if not sound and not interactive:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Look:
    """How things are shown: answers as they come into focus (``live``), every step for ``pace`` seconds, pictures."""

    live: bool
    pace: float
    preview: str


def _talk(model: AnyModel, conversation: Conversation, look: Look, tools: TerminalTools | None) -> bool:
    """Read and handle messages until there are no more; whether every one of them went well."""
    sound = True
    while True:
        try:
            message = _read_message()
            if message is None or not handle(model, conversation, message, look, tools):
                return sound
        except KeyboardInterrupt:
            say("(stopped)", dim=True, err=True)
        except DgemmaError as error:
            sound = False
            say_error(error)
        except (RuntimeError, MemoryError, ArithmeticError) as error:  # memory for so long a conversation, the device
            sound = False
            say(f"Error: the answer failed ({type(error).__name__}: {error})", fg="red", err=True)


@dataclass
class Conversation:
    """What /save keeps: the messages so far and the settings in force."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    thinking: bool = False
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def checked(conversation: Conversation, model: AnyModel) -> Conversation:
    """The conversation, if every part of it is what it should be and ``model`` takes its settings; else DgemmaError."""
    from dgemma.chat.messages import normalise_messages

    if not isinstance(conversation.messages, list):
        raise DgemmaError(f"messages must be a list, got {conversation.messages!r:.60}")
    if conversation.messages:
        try:
            normalise_messages(conversation.messages)
        except TypeError as error:  # a list where a name should be
            raise DgemmaError(f"messages are malformed ({error})") from error
    if conversation.system is not None and not isinstance(conversation.system, str):
        raise DgemmaError(f"system must be text, got {conversation.system!r:.60}")
    if not isinstance(conversation.thinking, bool):
        raise DgemmaError(f"thinking must be true or false, got {conversation.thinking!r:.60}")
    seed = conversation.seed
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise DgemmaError(f"a seed is a whole number from 0 to 2^63 - 1, got {seed!r:.60}")
    if not isinstance(conversation.settings, dict):
        raise DgemmaError(f"settings must be names with values, got {conversation.settings!r:.60}")
    if unknown := conversation.settings.keys() - set(SETTINGS):
        raise DgemmaError(f"there is no setting {min(unknown)}; there are {', '.join(SETTINGS)}")
    try:
        model.generation_config.replace(**conversation.settings)
    except ValueError as error:
        raise DgemmaError(str(error)) from error
    return conversation


def handle(model: AnyModel, conversation: Conversation, message: str, look: Look,
           tools: TerminalTools | None = None) -> bool:
    """Carry out or answer what was entered; False means leave.

    The path of a picture that is there, and nothing else, shows it. A message may begin with a slash: as a path does
    (``/etc/hosts``), which no command's name has a second one in, or by one more (``//help`` sends ``/help``).
    """
    if message.startswith("//"):
        message = message[1:]
    elif (found := dropped(message)) is not None:
        show(model, conversation, look, *found)
        return True
    elif message.startswith("/") and "/" not in message.split(maxsplit=1)[0][1:]:
        return command(model, conversation, message, look, tools)
    if message.strip():
        answer(model, conversation, message, look, tools)
    return True


def _read_message() -> str | None:
    """A message from stdin, None at its end. A line that starts with three quotes goes on to the next three."""
    interactive = sys.stdin.isatty()
    try:
        with signals_handled(signal.default_int_handler, signal.SIGINT):  # whatever it is around it
            line = _line(">>> ", interactive)
            if not line.lstrip().startswith('"""'):
                return line
            lines = [line.lstrip()[3:]]
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(_line("... ", interactive))
            text = "\n".join([*lines[:-1], lines[-1].rstrip()[:-3]]).strip("\n")
            return f"/{text}" if text.startswith("/") else text  # whatever is between quotes is a message
    except EOFError:
        if interactive:
            print()
        return None
    except UnicodeDecodeError as error:
        raise DgemmaError(f"that is not {error.encoding} text ({error.reason})") from error
    except KeyboardInterrupt:  # at the prompt: drop the line, as shells do
        print()
        return ""


def _line(prompt: str, interactive: bool) -> str:
    """The next line of stdin without its end; raises EOFError after the last one."""
    if interactive:
        return input(prompt)
    line = sys.stdin.readline()  # `input` would want a stdout and a stderr, too
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def answer(model: AnyModel, conversation: Conversation, message: str, look: Look,
           tools: TerminalTools | None = None) -> None:
    """Send a message and show the answer, with what the model calls on the way to it; all of it joins the conversation.

    A stopped answer stays as far as it came.
    """
    from dgemma.cli.session import follow

    def ask(messages: list[dict[str, Any]], declared: list[dict[str, Any]]) -> Generation:
        settings = {**conversation.settings, "tools": declared} if declared else conversation.settings
        events = model.stream(messages, system=conversation.system, thinking=conversation.thinking,
                              seed=conversation.seed, **settings)
        generation = follow(model, events, visual=look.live, pace=look.pace, insist=False)
        if not look.live and (generation.text or not generation.tool_calls):
            print_text(generation.text)
        return generation

    before, shown = waiting(conversation.messages)
    messages = [*before, said_of(shown, message)]
    try:
        if tools is None:
            generation = ask(messages, [])
            said = [*messages, {"role": "assistant", "content": generation.text}]
            stopped = generation.finish_reason == "cancelled"
        else:
            said, stopped = tools.answer(ask, messages)
    except Exception:
        conversation.messages = before  # a picture may be what is wrong: the next message must not fail of it, too
        raise
    if not stopped or said[-1]["content"]:
        conversation.messages = said
    if stopped:
        say("(stopped)", dim=True, err=True)


def show(model: AnyModel, conversation: Conversation, look: Look, kind: str, path: Path, **how: Any) -> None:
    """Let a picture or film go along with the next message. Raises DgemmaError for what cannot be shown."""
    from dgemma.model import Model

    if isinstance(model, Model) and model.pictures is None:  # of a server that is not known
        raise DgemmaError("this model sees no pictures: it has no vision tower")
    part = media_part(kind, path, **how)
    size = ""
    if kind == "image":
        from dgemma.chat.pictures import fitted, open_picture

        image = open_picture(path)
        fitted(*image.size, how.get("tokens") or 280)
        size = f", {image.width:,} × {image.height:,} pixels"
    before, shown = waiting(conversation.messages)
    conversation.messages = [*before, {"role": "user", "content": [*shown, part]}]
    if look.live:
        from dgemma.cli.terminal.pictures import preview

        preview([part], look.preview)
    say(f"{path.name}{size}: shown with the next message")


def command(model: AnyModel, conversation: Conversation, line: str, look: Look,
            tools: TerminalTools | None = None) -> bool:
    """Carry out a /command; False means leave. Raises DgemmaError on a mistake."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit", "bye"):
        return False
    if name in ("help", "?"):
        say(HELP.format(settings=", ".join(SAMPLER_SETTINGS)))
    elif name in ("image", "video"):
        option = "image-tokens" if name == "image" else "fps"
        file, number = _with_number(rest, option)
        value = None if number is None else _number(f"--{option}", number, "int" if name == "image" else "float")
        show(model, conversation, look, name, _path(file, name), **{"tokens" if name == "image" else "fps": value})
    elif name == "system":
        conversation.system = rest or None
        say("system message set" if rest else "no system message")
    elif name == "thinking":
        if rest not in ("on", "off"):
            raise DgemmaError("/thinking takes on or off")
        conversation.thinking = rest == "on"
        say(f"thinking {rest}")
    elif name == "seed":
        conversation.seed = checked(Conversation(seed=int(_number("/seed", rest, "int")) if rest else None), model).seed
        say("random seeds" if conversation.seed is None else f"seed {conversation.seed}")
    elif name == "set":
        _set(model, conversation, rest)
    elif name == "tools":
        if tools is None:
            raise DgemmaError("there are no tools: dgemma chat --tools python,bash,web")
        tools.command(rest)
    elif name == "clear":
        conversation.messages = []
        model.prefixes.clear()
        say("conversation forgotten")
    elif name == "save":
        save(conversation, _path(rest, "save"))
        say(f"{len(conversation.messages)} messages saved to {rest}")
    elif name == "load":
        vars(conversation).update(vars(load(_path(rest, "load"), model)))
        say(f"{len(conversation.messages)} messages loaded from {rest}")
    else:
        raise DgemmaError(f"there is no command /{name}; /help lists them (// sends a message that begins with /)")
    return True


def _set(model: AnyModel, conversation: Conversation, text: str) -> None:
    if not text:
        current = model.generation_config.replace(**conversation.settings)
        for name in SETTINGS:
            value = getattr(current, name)
            if name == "max_tokens" and name not in conversation.settings and isinstance(value, int):
                value = "(to the end of the context)"  # the checkpoint's own number is no limit
            say(f"{name} {value}")
        return
    name, _, value = text.partition(" ")
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise DgemmaError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
    kind = next(str(field.type) for field in dataclasses.fields(GenerationConfig) if field.name == name)
    settings = {**conversation.settings, name: _number(f"/set {name}", value, kind)}
    conversation.settings = checked(Conversation(settings=settings), model).settings
    say(f"{name} {settings[name]}")


def _number(what: str, text: str, kind: str) -> int | float:
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError as error:
        raise DgemmaError(f"{what} takes a {'whole ' if kind == 'int' else ''}number, got {text!r:.60}") from error


def _with_number(text: str, option: str) -> tuple[str, str | None]:
    """A file's name, with or without quotes, and what follows an option behind it."""
    file, number = re.fullmatch(rf"(.*?)(?:\s+--{option}(?:\s+|=)(\S*))?", text, re.DOTALL).groups()  # type: ignore
    return file.strip("'\""), number


def _path(text: str, name: str) -> Path:
    if not text:
        raise DgemmaError(f"/{name} takes a file name")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~someone who does not exist
        raise DgemmaError(f"{text}: {error}") from error


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON."""
    with atomic_write(path) as beside:
        beside.write_bytes(json_bytes(dataclasses.asdict(conversation), indent=2) + b"\n")


def load(path: Path, model: AnyModel) -> Conversation:
    """Read what `save` wrote; raises DgemmaError naming the file and what is wrong with it, for ``model`` too."""
    try:
        data = json.loads(read_bytes(path, DgemmaError))
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{path}: is not a saved conversation ({error})") from error
    names = [field.name for field in dataclasses.fields(Conversation)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise DgemmaError(f"{path}: is not a saved conversation (that is an object of {', '.join(names)})")
    try:
        return checked(Conversation(**data), model)
    except DgemmaError as error:
        raise DgemmaError(f"{path}: is not a sound conversation: {error}") from error
