"""A checkpoint's tokenizer files as they stand: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.

Works on files and plain data. `chat.tokenizer` makes a tokenizer of them, `gguf.tokenizer` the keys of a GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.errors import CheckpointError
from dgemma.fields import Fields, decoded, is_there, parse_json, read_bytes, read_text

if TYPE_CHECKING:
    import tokenizers

# The tokens with a role, as the family spells them, and the settings that may name others.
ROLES = ("bos", "eos", "pad", "unk", "mask")
ROLE_KEYS = tuple(f"{role}_token" for role in ROLES)
STOPS = ("<eos>", "<turn|>", "<|tool_response>")  # the spellings of the family's stop ids: 1, 106, 50


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder's files say; ``config_text`` is empty and ``config`` has no fields where there is none.

    ``backend`` is what ``json_text``, the file at ``path``, describes. ``templates`` are one chat template or several
    by name, None where there is none; ``templates_from`` is the file that they stand in.
    """

    path: Path
    json_text: str
    backend: tokenizers.Tokenizer
    config_text: str
    config: Fields
    templates: str | dict[str, str] | None
    templates_from: Path


def read_tokenizer_files(folder: Path, why: str) -> TokenizerFiles:
    """A folder's tokenizer files; ``why`` is said of a ``tokenizer.json`` that is missing, which alone is needed.

    ``tokenizer_config.json`` (roles of special tokens, templates in older checkpoints) and ``chat_template.jinja``
    (which wins) may be absent. Raises CheckpointError.
    """
    path, config_path, template_path = (folder / name for name in ("tokenizer.json", "tokenizer_config.json",
                                                                   "chat_template.jinja"))
    if not is_there(path):
        raise CheckpointError(f"{path} is missing: {why}")
    json_text = read_text(path)
    backend = read_backend(json_text, str(path))
    data = read_bytes(config_path) if is_there(config_path) else None
    config = Fields({} if data is None else parse_json(data, str(config_path)), str(config_path))
    apart = is_there(template_path)
    return TokenizerFiles(path, json_text, backend, decoded(data or b"", str(config_path)), config,
                          read_text(template_path) if apart else _config_templates(config),
                          template_path if apart else config_path)


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """What the library of tokenizers refuses in this block is a CheckpointError that begins with ``what``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic in it is not even that
        raise CheckpointError(f"{what}: {str(error)[:300]}") from error


def read_backend(text: str, where: str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a ``tokenizer.json`` describes; `CheckpointError` naming ``where`` if none."""
    from tokenizers import Tokenizer as Backend

    with refused_as(f"{where} cannot be read as a tokenizer"):
        backend = Backend.from_str(text)
    # A file may ask for truncation or padding, which would quietly change prompts.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _config_templates(config: Fields) -> str | dict[str, str] | None:
    """The template(s) that older checkpoints keep in their tokenizer_config.json."""
    found: Any = config.data.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    named: dict[str, str] = {}
    for entry in found if isinstance(found, list) else [None]:
        name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise config.wrong("chat_template", "must be text, or a list of names and templates")
        named[name] = source
    return named


def special_roles(config: Fields) -> dict[str, str]:
    """`bos_token`, `eos_token`…: a string, or an object with the string as its content."""
    roles = {}
    for key, value in config.data.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            roles[key] = text
        elif key in ROLE_KEYS and text is not None:
            raise config.wrong(key, "must be text, or an object with text as its content")
    return roles


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's), indexed by byte.

    Visible Latin-1 characters stand for themselves, and the others take the characters from U+0100 on, in byte order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]
