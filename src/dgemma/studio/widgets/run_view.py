"""One training run, while it goes on and after: its state, checks, curves, films, and what can be done with it.

Works on: `dgemma.studio.training`. Knows nothing of: how recipes are made.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import main_button, text_button
from dgemma.studio.training.ask import ask
from dgemma.studio.training.films import base_of, film, film_prompt, films, model_arguments
from dgemma.studio.training.plots import options
from dgemma.studio.training.runs import Run, Runs
from dgemma.studio.widgets.canvas import Canvas
from dgemma.train.log.curves import Picture, comparison_pictures, loss_pictures, pace_pictures, task_pictures
from dgemma.train.log.history import Run as History
from dgemma.train.log.report import comparison_columns

SECONDS = 2.0  # between two looks at a run's folder
STATES = {"running": "runs", "finished": "finished", "stopped": "stopped, can go on", "failed": "ended with an error",
          "new": "not begun"}


class Plots:
    """Charts that are made once and then changed."""

    def __init__(self) -> None:
        self._box = ui.element("div").classes("train-plots")
        self._charts: dict[str, ui.echart] = {}

    def show(self, pictures: list[Picture]) -> None:
        for picture in pictures:
            made = options(picture)
            if (chart := self._charts.get(picture.name)) is None:
                with self._box:
                    chart = self._charts[picture.name] = ui.echart(made)
                chart.props(f'role="img" aria-label="{picture.name}"')
            elif chart.options != made:
                chart.options.clear()
                chart.options.update(made)
                chart.update()


def pictures_of(histories: dict[str, History]) -> list[Picture]:
    """The curves of a run; of one with variants those that compare them."""
    if len(histories) == 1:
        (run,) = histories.values()
        return [*loss_pictures(run), *task_pictures(run), *pace_pictures(run)]
    return comparison_pictures(histories)


def comparison(histories: dict[str, History]) -> None:
    """Runs beside each other: a table and curves."""
    columns = comparison_columns(histories)
    with ui.element("div").classes("prose"), ui.element("table"):
        for cells in ([["run", *columns]] + [[name, *(column[row] for column in columns.values())]
                                             for row, name in enumerate(histories)]):
            with ui.element("tr"):
                for cell in cells:
                    with ui.element("td"):
                        ui.label(cell)
    Plots().show(comparison_pictures(histories))


class RunView:
    """A run's page. ``load_adapter`` offers an adapter in the chat, where its base is what answers there."""

    def __init__(self, runs: Runs, run: Run, load_adapter: Callable[[Path], str]):
        self._runs, self._run, self._load_adapter = runs, run, load_adapter
        self._filming = False
        self._seen: Any = None
        with ui.row().classes("line"):
            self._state = ui.label().classes("train-state").props('role="status"')
            with ui.row().classes("fields"):
                self._stop = text_button("Stop and save", self.stop, icon="stop")
                self._go_on = main_button("Go on", self.go_on)
        self._progress = ui.linear_progress(value=0, show_value=False).props('aria-label="Progress"')
        self._problem = ui.element("div").classes("wide")
        self._plots = Plots()
        self._films = ui.element("div").classes("train-card")
        self._checks = ui.element("div").classes("train-card")
        self._after = ui.element("div").classes("train-card")
        self.refresh()
        ui.timer(SECONDS, self.look)

    async def look(self) -> None:
        """Show what is new, and film a checkpoint that is."""
        self.refresh()
        if not self._filming:
            self._filming = True
            try:
                if await film(self._run) is not None:
                    self.refresh()
            except DgemmaError as error:  # the checkpoint may just have been replaced: the next one is filmed
                self._state.props(f'title="{str(error)[:200]}"'.replace("\n", " "))
            finally:
                self._filming = False

    def refresh(self) -> None:
        self._run = run = self._runs.look(self._run.folder)
        try:
            histories = run.histories()
        except DgemmaError as error:
            histories = {}
            self._state.props(f'title="{str(error)[:200]}"')
        made = films(run)
        now = (run.state, run.stopping, len(made), len(run.checks()), len(run.results()))
        self._plots.show(pictures_of(histories) if histories else [])
        self._tell(run, max((history.last_step for history in histories.values()), default=0))
        if now != self._seen:
            self._seen = now
            self._show_problem(run)
            self._show_films(run, made)
            self._show_checks(run)
            self._show_after(run)

    def _tell(self, run: Run, step: int) -> None:
        steps = run.steps()
        text = "is saving, and stops" if run.state == "running" and run.stopping else STATES[run.state]
        if run.state == "running" and not step:
            text += ": reads data, checks that it trains what it will sample"
        self._state.set_text(f"{text} · step {step:,}" + (f" of {steps:,}" if steps else ""))
        self._state.classes(add=run.state, remove=" ".join(name for name in STATES if name != run.state))
        self._progress.set_value(min(1, step / steps) if steps else 0)
        self._progress.set_visibility(run.state == "running" and bool(steps))
        self._stop.set_visibility(run.state == "running")
        self._stop.set_text("End at once" if run.stopping else "Stop and save")
        self._go_on.set_visibility(run.state in ("stopped", "failed", "new"))

    def _show_problem(self, run: Run) -> None:
        self._problem.clear()
        if run.state == "failed":
            with self._problem, ui.row().classes("failure").props('role="alert"'):
                ui.icon("error_outline")
                ui.label(run.log_end().strip() or "It ended without a word: memory may have run out.").style(
                    "white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0")

    def _show_films(self, run: Run, made: dict[int, Path]) -> None:
        self._films.clear()
        self._films.set_visibility(bool(film_prompt(run)))
        with self._films:
            ui.html("<h2>The same prompt at every better checkpoint</h2>", sanitize=False)
            ui.label(film_prompt(run)).classes("muted")
            if not made:
                ui.label("The first one comes with the first evaluation.").classes("muted small")
            for step in made:
                ui.label(f"after {step:,} steps").classes("small")
                Canvas(f"/films/{run.name}/{step}", summary="")

    def _show_checks(self, run: Run) -> None:
        self._checks.clear()
        checks = run.checks()
        self._checks.set_visibility(bool(checks))
        with self._checks:
            ui.html("<h2>Checked before the first step</h2>", sanitize=False)
            for check in checks:
                with ui.element("div").classes("train-check"):
                    icon, look = ("check_circle", "good") if check["passed"] else ("cancel", "bad")
                    ui.icon(icon).classes(look)
                    with ui.element("div"):
                        ui.label(str(check["name"]))
                        ui.label(str(check["measured"])).classes("muted small")
                        if not check["passed"]:
                            ui.label(str(check["meaning"])).classes("bad")

    def _show_after(self, run: Run) -> None:
        self._after.clear()
        results = run.results()
        self._after.set_visibility(bool(results) and run.state != "running")
        with self._after:
            ui.html("<h2>What it made</h2>", sanitize=False)
            for result in results:
                self._show_result(run, result)

    def _show_result(self, run: Run, result: Path) -> None:
        is_adapter = (result / "adapter_config.json").exists()
        try:
            options_ = model_arguments(result, run)
        except DgemmaError as error:
            ui.label(str(error)).classes("muted")
            return
        ui.label(f"dgemma studio {shlex.join(options_)}").classes("train-shown")
        with ui.row().classes("fields"):
            if is_adapter:
                main_button("Chat with it", lambda: self._chat(result))
                text_button("Write the merged model", lambda: self._export(
                    "merge", base_of(run), str(result), "--out", str(result.parent / "merged")), icon="merge")
                text_button("Write a GGUF file", lambda: self._export(
                    "merge", base_of(run), str(result), "--out", str(result.parent / f"{run.name}.gguf"), "--force"),
                    icon="save_alt")
            else:
                text_button("Write a GGUF file", lambda: self._export(
                    "quantize", str(result), str(result.parent / f"{run.name}.gguf"), "--force"), icon="save_alt")

    def _chat(self, result: Path) -> None:
        try:
            ui.notify(self._load_adapter(result), type="positive", position="top")
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)

    async def _export(self, *arguments: str) -> None:
        ui.notify("It is being written …", position="top")
        try:
            said = await ask(*arguments)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)
            return
        ui.notify(said.strip() or "It is written.", type="positive", position="top", multi_line=True)

    def stop(self) -> None:
        """Have the run save and end."""
        self._runs.stop(self._run)
        self.refresh()

    def go_on(self) -> None:
        """Start the run's process again."""
        try:
            self._runs.go_on(self._run.folder)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")
        self.refresh()
