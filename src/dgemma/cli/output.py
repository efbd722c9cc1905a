"""What a command leaves on stdout: an answer's text, or one JSON object.

Not `typer.echo`: that takes escape sequences out of what is piped, and a pipe shall get what the model wrote.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def print_text(text: str) -> None:
    """Print an answer, exactly in a pipe or a file, harmlessly on a terminal; a line end is added if it has none."""
    if sys.stdout.isatty():
        from dgemma.cli.drafts import printable

        text = printable(text)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def print_json(data: Any) -> None:
    """Print one JSON value on a line of its own."""
    # What stdout cannot spell it escapes as Python does, which is not JSON's way.
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print_text(json.dumps(data, ensure_ascii=not unicode))
