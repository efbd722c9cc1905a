"""Chat templates, rendered in the environment that transformers documents for them.

Works on: template source and plain data. Knows nothing of: tokens, files.

A template comes with a checkpoint, so it is somebody else's program: it runs in Jinja's immutable sandbox and is
given nothing but strings, numbers, lists and dictionaries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from dgemma.errors import CheckpointError, DgemmaError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def compiled(source: str, where: str) -> Template:
    """Template `source` as a program; `where` names the template in errors.

    Raises `CheckpointError` when it does not compile.
    """
    from jinja2 import TemplateSyntaxError

    try:
        return _compile(source)
    except Exception as error:  # it is somebody else's program, on which the compiler may fail in any way
        at = f" at line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise CheckpointError(f"{where}: the chat template is broken{at}: "
                              f"{str(error) or type(error).__name__}") from error


def render(source: str, variables: Mapping[str, Any], where: str) -> str:
    """The text that template `source` makes of `variables`; `where` names the template in errors.

    Raises `DgemmaError` when the template does not compile, refuses the conversation or fails on it.
    """
    from jinja2 import TemplateError

    template = compiled(source, where)
    try:
        return template.render(plain(variables))
    except TemplateError as error:
        raise DgemmaError(f"the chat template of {where} refuses this conversation: {error}") from error
    except Exception as error:  # it is somebody else's program, which may fail in any way
        what = str(error) or type(error).__name__
        raise DgemmaError(f"the chat template of {where} fails on this conversation: {what}") from error


def plain(value: Any, text: Callable[[str], str] = str) -> Any:
    """`value` rebuilt from JSON's types, with `text` applied to every string in it, keys included.

    Anything else (an image, an array, bytes) becomes its type's name in angle brackets: templates ask only
    whether it is there, and no foreign object's methods come within their reach.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(str.__str__(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {plain(key, text): plain(item, text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, text) for item in value]
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what training counts; here its body is just rendered."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class SafeNamespace(Namespace):
        """A namespace that keeps no underscored name, and so offers no way to Python's own attributes."""

        def __init__(*args: Any, **values: Any) -> None:
            Namespace.__init__(*args, **values)
            for name in dict(*args[1:], **values):
                _refuse_underscore(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a template may not set {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        # Jinja's own escapes <, > and & for HTML: a model should read what was written.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = SafeNamespace
    environment.globals["dict"] = lambda *args, **values: dict(*args, **values)
    return environment
