"""The settings an answer is made with: the sampler's real controls, each with a sentence that says what it does.

Works on: a model's defaults, the options of answers. Knows nothing of: conversations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from dgemma.config import GenerationConfig
from dgemma.errors import DgemmaError
from dgemma.studio.buttons import text_button


@dataclass(frozen=True)
class Control:
    """A number that may be set; None in its place leaves it to the checkpoint."""

    name: str
    label: str
    about: str
    whole: bool = False
    least: float = 0.0
    most: float | None = None
    step: float = 1.0


ANSWER = (
    Control("max_tokens", "Longest answer", "Tokens after which the answer is cut off. Empty: the end of the context.",
            whole=True, least=1),
    Control("seed", "Seed", "The same seed and settings make the same answer. Empty: another one each time.",
            whole=True),
    Control("reasoning_budget", "Thinking budget", "Most tokens to think; then the thought is closed and it answers.",
            whole=True),
)
SAMPLER = (
    Control("max_denoising_steps", "Steps", "Most looks at a canvas. Fewer is faster; hard texts want more.",
            whole=True, least=1),
    Control("entropy_bound", "Entropy bound", "How much uncertainty, in nats, is believed in one step. Higher is "
            "faster and bolder.", least=1e-4, step=0.05),
    Control("t_max", "First temperature", "How freely tokens are drawn in the first step.", least=0.01, most=10,
            step=0.05),
    Control("t_min", "Last temperature", "How freely in the last one; in between it falls evenly.", least=0.01, most=10,
            step=0.05),
    Control("confidence_threshold", "Confidence", "A canvas may be done when its mean entropy is below this, in nats.",
            least=1e-5, step=0.005),
    Control("stability_threshold", "Stability", "… and when so many drafts before agree with it.", whole=True),
)
WATCH = (
    Control("candidates", "Candidates", "Keep so many of the likeliest tokens at every place and step, to look at; it "
            "costs time at every step.", whole=True, most=16),
)
DRAW = (
    Control("temperature", "Temperature", "Scales the draw on top of the schedule; 0 takes the likeliest token.",
            most=10, step=0.1),
    Control("top_k", "Top k", "Draw among so many of the likeliest tokens only; 0 is all.", whole=True),
    Control("top_p", "Top p", "Draw among the likeliest tokens that make up this share.", least=0.01, most=1,
            step=0.05),
)
_USUAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "candidates": 0}


class Controls:
    """The panel. ``changed`` is called with all that is set, whenever that changes."""

    def __init__(self, defaults: GenerationConfig, options: dict[str, Any], system: str,
                 changed: Callable[[dict[str, Any], str], None]):
        self._defaults, self._options, self._system, self._changed = defaults, dict(options), system, changed
        self._fields: dict[str, ui.number] = {}
        self._quiet = False
        self._words = ui.textarea("System prompt", value=system, placeholder="How it should answer, in general",
                                  on_change=self._tell).props("autogrow outlined debounce=400").classes("wide")
        with ui.row().classes("control"):
            with ui.element("div").classes("control-words"):
                ui.label("Thinking").classes("control-name")
                ui.label("Let the model think before it answers.").classes("control-about")
            self._thinking = ui.switch(value=bool(options.get("thinking")), on_change=self._tell)
            self._thinking.props('aria-label="Thinking"')
        for title, group in (("Answer", ANSWER), ("Denoising", SAMPLER), ("Draw", DRAW), ("Watch", WATCH)):
            ui.label(title).classes("group-name")
            for control in group:
                self._row(control)
        self._error = ui.label().classes("control-error").props("role=alert")
        self._error.set_visibility(False)
        text_button("Back to the model's own settings", self.reset).classes("wide")

    def _row(self, control: Control) -> None:
        usual = getattr(self._defaults, control.name, None) if control.name != "max_tokens" else None
        usual = _USUAL.get(control.name, usual)
        with ui.row().classes("control"):
            with ui.element("div").classes("control-words"):
                ui.label(control.label).classes("control-name")
                ui.label(control.about).classes("control-about")
            field = ui.number(value=self._options.get(control.name), min=control.least, max=control.most,
                              step=control.step, placeholder="auto" if usual is None else f"{usual:g}",
                              on_change=self._tell)
            field.props(f'outlined dense debounce=300 aria-label="{control.label}"').classes("control-number")
            self._fields[control.name] = field

    @property
    def options(self) -> dict[str, Any]:
        """What is set, by the names of `dgemma.studio.answers.OPTIONS`."""
        made: dict[str, Any] = {"thinking": True} if self._thinking.value else {}
        for control in (*ANSWER, *SAMPLER, *DRAW, *WATCH):
            value = self._fields[control.name].value
            if value is not None:
                made[control.name] = int(value) if control.whole else float(value)
        return made

    @property
    def system(self) -> str:
        return self._words.value or ""

    def set(self, options: dict[str, Any], system: str) -> None:
        """Show other settings, as of another conversation."""
        self._quiet = True
        try:
            self._words.value, self._thinking.value = system, bool(options.get("thinking"))
            for name, field in self._fields.items():
                field.value = options.get(name)
        finally:
            self._quiet = False

    def reset(self) -> None:
        self.set({}, self.system)
        self._tell()

    def _tell(self) -> None:
        if self._quiet:
            return
        options = self.options
        try:
            self._check(options)
        except DgemmaError as error:
            self._error.set_text(str(error))
            self._error.set_visibility(True)
            return
        self._error.set_visibility(False)
        self._changed(options, self.system)

    def _check(self, options: dict[str, Any]) -> None:
        try:
            self._defaults.replace(**{control.name: options.get(control.name) for control in SAMPLER})
        except ValueError as error:
            raise DgemmaError(str(error)) from error
