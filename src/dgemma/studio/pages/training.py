"""Training: runs at the left, a new one by a form, or one of them as it goes on.

Works on: runs and their folders. Knows nothing of: networks.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import main_button, text_button
from dgemma.studio.frame import Frame, Page, Studio
from dgemma.studio.training.films import films, recording, set_film_prompt
from dgemma.studio.training.runs import Run, Runs
from dgemma.studio.widgets.recipe_form import RecipeForm
from dgemma.studio.widgets.run_view import STATES, RunView, comparison


def folder_of(studio: Studio) -> Path:
    """Where the studio keeps what belongs to training."""
    return studio.store.path.parent / "training"


def runs_of(studio: Studio) -> Runs:
    """The runs in the studio's folder."""
    return Runs(folder_of(studio) / "runs")


async def build(studio: Studio, frame: Frame, run: str | None = None) -> None:
    """The page: a new run, or the one of that name; "compare" sets all of them beside each other."""
    runs = runs_of(studio)
    ui.add_head_html('<link rel="stylesheet" href="/static/training.css">')
    found = runs.find(run) if run else None
    with frame.side:
        _list(runs, found)
    with frame.bar:
        ui.label(found.name if found else "All runs" if run == "compare" else "Train a model").classes("bar-title")
    with ui.element("div").classes("training"):
        if found is not None:
            RunView(runs, found, lambda path: _load(studio, found, path))
        elif run == "compare":
            _compare(runs)
        else:
            RecipeForm(folder_of(studio), studio.models.name, lambda text, prompt: _begin(
                runs, text, prompt))


async def _begin(runs: Runs, text: str, prompt: str) -> None:
    run = runs.begin(text)
    set_film_prompt(run, prompt)
    ui.navigate.to(f"/training/{run.name}")


def _list(runs: Runs, here: Run | None) -> None:
    main_button("New run", lambda: ui.navigate.to("/training"))

    @ui.refreshable
    def listed() -> None:
        for run in runs.all():
            with ui.element("div").classes("train-run" + (" here" if here and run.name == here.name else "")), \
                    ui.link(target=f"/training/{run.name}"):
                ui.label(run.name)
                ui.label(STATES[run.state]).classes(f"train-state {run.state}")

    listed()
    ui.timer(5.0, listed.refresh)
    text_button("Compare", lambda: ui.navigate.to("/training/compare"), icon="stacked_line_chart")


def _compare(runs: Runs) -> None:
    found = {}
    for run in runs.all():
        try:
            found |= {f"{run.name}/{name}" if name else run.name: history for name, history in run.histories().items()}
        except DgemmaError as error:
            ui.label(str(error)).classes("muted")
    if found:
        comparison(found)
    else:
        ui.label("There are no runs yet.").classes("muted")


def _load(studio: Studio, run: Run, path: Path) -> str:
    """Offer an adapter under its run's name, in the API and wherever a model is chosen."""
    studio.serving().backend.load_adapter(run.name, path)
    return f"The adapter {run.name} is loaded: programs ask for the model \"{run.name}\"."


def routes(app: FastAPI, studio: Studio) -> None:
    """Where the films of checkpoints are had."""

    @app.get("/films/{run}/{step}")
    def one(run: str, step: int) -> Response:
        found = runs_of(studio).find(run)
        path = films(found).get(step) if found is not None else None
        if path is None:
            return Response("there is no such film", 404)
        try:
            text = json.dumps(recording(path).for_page(), separators=(",", ":"))
        except DgemmaError as error:
            return Response(str(error), 500)
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


PAGE = Page("/training", "Training", "model_training", build, aliases=("/training/{run}",), routes=routes)
