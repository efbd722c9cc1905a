"""What `dgemma` says, asked in a process of its own, so that a page answers while data and models are read.

Works on: commands, and text with a terminal's colours. Knows nothing of: pages.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import sys

from dgemma.errors import DgemmaError

_NAMES = {"2": "context", "32": "loss", "33": "fill", "36": "border", "1": "special", "31": "wrong"}
_CODE = re.compile(r"\x1b\[([0-9;]*)m")


async def ask(*arguments: str, colours: bool = False) -> str:
    """What a command prints; raises DgemmaError with what it says when it fails."""
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    environment |= {"FORCE_COLOR": "1"} if colours else {"NO_COLOR": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dgemma.cli.main", *arguments, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    try:
        out, problems = await process.communicate()
    finally:
        if process.returncode is None:  # the page is gone
            process.kill()
    if process.returncode:
        said = _CODE.sub("", problems.decode("utf-8", "replace")).strip()
        raise DgemmaError(said.removeprefix("error: ") or f"dgemma {arguments[0]} ended with {process.returncode}")
    return out.decode("utf-8", "replace")


def as_html(text: str) -> str:
    """A terminal's text as HTML, its colours as classes; everything else is escaped."""
    parts, last = [], 0
    open_ = False
    for found in _CODE.finditer(text):
        parts.append(html.escape(text[last : found.start()]))
        last = found.end()
        classes = " ".join(_NAMES[code] for code in found[1].split(";") if code in _NAMES)
        if open_:
            parts.append("</span>")
        open_ = bool(classes)
        if classes:
            parts.append(f'<span class="{classes}">')
    parts.append(html.escape(text[last:]))
    return "".join(parts) + ("</span>" if open_ else "")
