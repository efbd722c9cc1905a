"""The settings an answer is made with: the sampler's real controls, each with a sentence that says what it does.

Works on: a model's defaults, the options of answers, presets. Knows nothing of: conversations. What is left empty is
chosen from what is asked (`dgemma.studio.automatic`), or is the checkpoint's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from dgemma.config import BUDGETS, GenerationConfig
from dgemma.errors import DgemmaError
from dgemma.studio.buttons import text_button
from dgemma.studio.presets import PRESET_ABOUT, PRESETS, preset_of, with_preset


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
    Control("max_tokens", "Longest answer", "Tokens after which the answer is cut off. Empty: as what is asked needs, "
            "or to the end of the context.", whole=True, least=1),
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
_THINKING = {"auto": "Auto", "on": "On", "off": "Off"}
_THOUGHTS = {"auto": None, "on": True, "off": False}
_CUSTOM = "Custom"  # settings that are no preset's
_USUAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "candidates": 0}


class Controls:
    """The panel. ``changed`` is called with all that is set, whenever that changes; ``sees``: of a model with eyes."""

    def __init__(self, defaults: GenerationConfig, options: dict[str, Any], changed: Callable[[dict[str, Any]], None],
                 sees: bool = False):
        self._defaults, self._options, self._changed = defaults, dict(options), changed
        self._fields: dict[str, ui.number] = {}
        self._quiet = False
        ui.label("Speed").classes("group-name")
        self._preset = ui.toggle([*PRESETS, _CUSTOM], value=preset_of(options) or _CUSTOM, on_change=self._choose)
        self._preset.props('no-caps unelevated dense spread toggle-color=primary role=group aria-label="Preset"')
        self._preset.classes("wide")
        self._about = ui.label().classes("control-about")
        self._tell_preset()
        with ui.row().classes("control"):
            self._words_of("Thinking", "Whether it thinks before it answers. Auto: where what is asked looks hard.")
            self._thinking = ui.toggle(_THINKING, value=_thinking_of(options), on_change=self._tell)
            self._thinking.props('no-caps unelevated dense toggle-color=primary role=group aria-label="Thinking"')
        with ui.row().classes("control") as row:
            self._words_of("Picture budget", "Most tokens of a picture. Auto: more where something is to be read.")
            self._budget = ui.select({0: "auto", **{budget: str(budget) for budget in BUDGETS}},
                                     value=options.get("image_tokens") or 0, on_change=self._tell)
            self._budget.props('outlined dense aria-label="Picture budget"').classes("control-number")
        row.set_visibility(sees)
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
            self._words_of(control.label, control.about)
            field = ui.number(value=self._options.get(control.name), min=control.least, max=control.most,
                              step=control.step, placeholder="auto" if usual is None else f"{usual:g}",
                              on_change=self._tell)
            field.props(f'outlined dense debounce=300 aria-label="{control.label}"').classes("control-number")
            self._fields[control.name] = field

    def _words_of(self, name: str, about: str) -> None:
        with ui.element("div").classes("control-words"):
            ui.label(name).classes("control-name")
            ui.label(about).classes("control-about")

    @property
    def options(self) -> dict[str, Any]:
        """What is set, by the names of `dgemma.studio.asking.OPTIONS`."""
        thinking = _THOUGHTS[self._thinking.value or "auto"]
        made: dict[str, Any] = {} if thinking is None else {"thinking": thinking}
        if self._budget.value:
            made["image_tokens"] = self._budget.value
        for control in (*ANSWER, *SAMPLER, *DRAW, *WATCH):
            value = self._fields[control.name].value
            if value is not None:
                made[control.name] = int(value) if control.whole else float(value)
        return made

    def set(self, options: dict[str, Any]) -> None:
        """Show other settings, as of another conversation."""
        self._quiet = True
        try:
            self._thinking.value, self._budget.value = _thinking_of(options), options.get("image_tokens") or 0
            for name, field in self._fields.items():
                field.value = options.get(name)
            self._preset.value = preset_of(options) or _CUSTOM
        finally:
            self._quiet = False
        self._tell_preset()

    def reset(self) -> None:
        self.set({})
        self._tell()

    def _choose(self) -> None:
        if not self._quiet and self._preset.value in PRESETS:
            self.set(with_preset(self.options, self._preset.value))
            self._tell()

    def _tell_preset(self) -> None:
        self._about.set_text(PRESET_ABOUT.get(self._preset.value or "", "The settings below."))

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
        self._quiet = True
        self._preset.value = preset_of(options) or _CUSTOM
        self._quiet = False
        self._tell_preset()
        self._changed(options)

    def _check(self, options: dict[str, Any]) -> None:
        try:
            self._defaults.replace(**{control.name: options.get(control.name) for control in SAMPLER})
        except ValueError as error:
            raise DgemmaError(str(error)) from error


def _thinking_of(options: dict[str, Any]) -> str:
    return next(name for name, value in _THOUGHTS.items() if value == options.get("thinking"))
