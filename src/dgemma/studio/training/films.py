"""A film of a fixed prompt at every new best checkpoint of a run, by `dgemma run --trace` in a process of its own.

Works on: runs' folders. Knows nothing of: pages.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from dgemma.diffusion.trace import read_trace
from dgemma.errors import DgemmaError
from dgemma.files import make_folder
from dgemma.studio.recording import Recording
from dgemma.studio.training.ask import ask
from dgemma.studio.training.runs import Run

PROMPT, FOLDER = "film-prompt.txt", "films"


def film_prompt(run: Run) -> str:
    """What is asked of every checkpoint; "" for nothing."""
    path = run.folder / PROMPT
    return path.read_text(encoding="utf-8") if path.exists() else ""


def set_film_prompt(run: Run, prompt: str) -> None:
    (run.folder / PROMPT).write_text(prompt, encoding="utf-8")


def films(run: Run) -> dict[int, Path]:
    """The traces that there are, by the step of their checkpoint."""
    return {int(path.stem): path for path in sorted((run.folder / FOLDER).glob("*.jsonl"), key=lambda path: path.stem)}


def best_step(run: Run) -> int | None:
    """The step that the best checkpoint is of; None where there is none, or there are several."""
    history = run.histories().get("")
    if history is None or not (run.folder / "best").is_dir():
        return None
    if (best := history.best()) is not None:
        return best.step
    losses = [(record.values["loss"], record.step) for record in history.of("validation", "loss")]
    return min(losses)[1] if losses else None


async def film(run: Run) -> Path | None:
    """Film the best checkpoint, if it is a new one and there is a prompt. Raises DgemmaError where it cannot be run."""
    step, prompt = best_step(run), film_prompt(run)
    if step is None or not prompt or step in films(run):
        return None
    path = make_folder(run.folder / FOLDER) / f"{step:07d}.jsonl"
    begun = path.with_suffix(".part")
    try:
        await ask("run", *model_arguments(run.folder / "best", run), prompt, "--seed", "0", "--trace", str(begun))
        begun.rename(path)
    finally:
        begun.unlink(missing_ok=True)
    return path


def model_arguments(result: Path, run: Run) -> list[str]:
    """The options of `dgemma run` that load a result: a checkpoint, or an adapter on the model it was trained on."""
    if not (result / "adapter_config.json").exists():
        return ["-m", str(result)]
    return ["-m", base_of(run), "--adapter", str(result)]


def base_of(run: Run) -> str:
    """The model that a run trains an adapter for; raises DgemmaError where its recipe does not name one."""
    model = yaml.safe_load(run.recipe.read_text(encoding="utf-8")).get("model")
    if not isinstance(model, str):
        raise DgemmaError(f"{run.name}: goes on from another recipe; its adapter's model is not named here")
    return model


def recording(path: Path) -> Recording:
    """A film for the scrubber; raises DgemmaError for a damaged one."""
    return Recording.of_trace(read_trace(path))
