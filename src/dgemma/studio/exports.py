"""An answer's denoising as a file to keep: a page that needs nothing else, a film, a trace; and traces as recordings.

Works on: recordings. Knows nothing of: pages of the studio, the network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished
from dgemma.diffusion.trace import TraceWriter, read_trace
from dgemma.errors import DgemmaError
from dgemma.studio.films import to_gif, to_svg
from dgemma.studio.recording import Canvas, Recording, Step
from dgemma.tokenizer_files import STOPS

_STATIC = Path(__file__).parent / "static"
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=class|const|function)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """What a file tells of where its denoising comes from; ``stops`` are the spellings of tokens that end an answer."""

    model: str
    prompt: str
    stops: Collection[str]


def to_trace(recording: Recording, source: Source) -> bytes:
    """A file that `dgemma replay`, and the studio, can show again. Raises DgemmaError when nothing was recorded."""
    if not recording.canvases:
        raise DgemmaError("no step of this answer was recorded")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        with TraceWriter(file, model=source.model, prompt=source.prompt, piece_of=recording.piece) as writer:
            for canvas in recording.canvases:
                for event in _events_of(canvas):
                    writer.write(event)
            if recording.generation is not None:
                writer.write(Finished(0, recording.generation))
        return file.read_bytes()


def _events_of(canvas: Canvas) -> list[Event]:
    made: list[Event] = [CanvasStarted(0, canvas.index, canvas.start.tolist(), canvas.pinned.tolist(),
                                       canvas.context_tokens, canvas.max_steps, canvas.steps_before)]
    made += [_denoised(canvas.index, step) for step in canvas.steps]
    if canvas.committed is not None:
        made.append(CanvasCommitted(0, canvas.index, canvas.committed, len(canvas.steps), canvas.seconds))
    return made


def _denoised(canvas: int, step: Step) -> Denoised:
    candidates = None
    if step.candidates is not None:
        candidates = [list(zip(tokens, shares, strict=True)) for tokens, shares in
                      zip(step.candidates[0].tolist(), step.candidates[1].tolist(), strict=True)]
    return Denoised(0, canvas, step.step, step.token_ids.tolist(), step.canvas_ids.tolist(), step.entropies.tolist(),
                    step.accepted.tolist(), step.changed.tolist(), step.temperature, step.seconds, candidates)


def recording_of(data: bytes) -> tuple[Recording, Source]:
    """The recording that the bytes of a trace are; raises DgemmaError when they are none, or hold no step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        file.write_bytes(data)
        try:
            trace = read_trace(file)
        except DgemmaError as error:
            raise DgemmaError(str(error).replace(str(file), "this file")) from error
    made = Recording.of_trace(trace)
    if not any(canvas.steps for canvas in made.canvases):
        raise DgemmaError("this trace holds no step of a denoising")
    return made, Source(trace.header.model, trace.header.prompt, STOPS)


def to_html(recording: Recording, source: Source) -> bytes:
    """A page that shows the denoising step by step, in one file that asks nobody for anything.

    Its policy lets no script run but the one that is written into it. Raises DgemmaError when nothing was recorded.
    """
    if not any(canvas.steps for canvas in recording.canvases):
        raise DgemmaError("no step of this answer was recorded")
    modules = (_STATIC / "film.js", _STATIC / "player.js")
    script = "".join(_EXPORT.sub("", _IMPORT.sub("", module.read_text("utf-8"))) for module in modules)
    script = f'"use strict";\n{{\n{script}}}\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'"
    film = json.dumps({"recording": recording.for_page(), "stops": sorted(source.stops)}, separators=(",", ":"))
    told = f"{html.escape(source.model)} · {recording.count}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">
<title>{html.escape(_line(source.prompt)) or "A text is denoised"}</title>
<style>{_styles()}</style></head>
<body><main><h1>A text comes into focus</h1><p class="told">{told}</p>
<blockquote>{html.escape(source.prompt)}</blockquote>
<section class="cv open" id="player" aria-label="Canvas"></section>
<p class="told">Solid: settled. Faint: uncertain. Green: believed in this step. Underlined: changed. Framed: pinned.
Arrow keys go from step to step, space plays. Made by dgemma.</p></main>
<script type="application/json" id="film">{film.replace("<", chr(92) + "u003c")}</script>
<script>{script}</script></body></html>
""".encode()


def _line(text: str) -> str:
    return " ".join(text.split())[:80]


def _styles() -> str:
    """The page's own styles: the colours and the canvas of the studio's style sheet, and a few of this page's."""
    sheet = (_STATIC / "studio.css").read_text("utf-8")
    light = re.search(r":root \{(.*?)\n\}", sheet, re.DOTALL)
    dark = re.search(r"\.body--dark \{(.*?)\n\}", sheet, re.DOTALL)
    canvas = re.search(r"/\* ---- the live canvas ---- \*/\n(.*?)/\* ---- ", sheet, re.DOTALL)
    assert light and dark and canvas, "studio.css has its colours and the section of the live canvas"
    return (f":root {{ color-scheme: light dark; {light[1]}}}\n"
            f"@media (prefers-color-scheme: dark) {{ :root {{ {dark[1]} }} }}\n"
            f"{canvas[1]}{(_STATIC / 'player.css').read_text('utf-8')}")


def export(kind: str, recording: Recording, source: Source) -> bytes:
    """The file of a kind of `KINDS`; raises DgemmaError when nothing was recorded, or there is no such kind."""
    if kind not in KINDS:
        raise DgemmaError(f"a denoising can be saved as {', '.join(KINDS)}, not as {kind!r:.20}")
    return KINDS[kind].write(recording, source)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how its name ends, and what writes it."""

    ending: str
    write: Callable[[Recording, Source], bytes]


KINDS: Mapping[str, Kind] = {
    "svg": Kind("svg", lambda recording, source: to_svg(recording, source.stops, source.prompt)),
    "gif": Kind("gif", lambda recording, source: to_gif(recording, source.stops)),
    "html": Kind("html", to_html),
    "trace": Kind("jsonl", to_trace),
}
