"""The training loop: one recipe, one folder of results, resumable at any step.

The folder holds ``state.pt`` (everything needed to go on), ``checkpoint/`` (a model that `dgemma run -m` takes),
``tensorboard/`` and ``puzzles.npz`` (the base puzzles, computed once).
"""

from __future__ import annotations

import math
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgemma.api import parse_device
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import generation_config_from_dict, model_config_from_dict
from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, make_folder
from dgemma.nn import DiffusionTransformer
from dgemma.train import tokenizer as bundled_tokenizer
from dgemma.train.muon import build_optimizers
from dgemma.train.objective import block_diffusion_loss, draw_noise
from dgemma.train.recipe import OptimizerSettings, Recipe
from dgemma.train.sudoku_data import SudokuBatches
from dgemma.weights.save import save_checkpoint

Report = Callable[[str], None]


def initialise(network: DiffusionTransformer, seed: int) -> None:
    """Fresh weights for a small network.

    Matrices are normal with std 1/√columns; the norms at the end of a residual branch start small, so that
    the residual stream grows slowly with depth; query and key norms make attention scores start near unit size,
    since there is no 1/√d in the softmax.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * len(network.layers)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(parameter.shape[0] ** -0.25)
            elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                parameter.fill_(depth**-0.5)
            else:
                parameter.fill_(1.0)


def learning_rate_factor(step: int, max_steps: int, settings: OptimizerSettings) -> float:
    """Warm-up, plateau, then a linear fall to zero over the last ``decay_fraction`` of the run."""
    decay = max(1, int(settings.decay_fraction * max_steps))
    return min(1.0, (step + 1) / max(1, settings.warmup_steps), max(0.0, (max_steps - step) / decay))


class Trainer:
    """Builds a recipe's network, data and optimizers in ``folder``, or picks up where an earlier run stopped."""

    def __init__(self, recipe: Recipe, folder: Path, report: Report = print, device: str | None = None):
        self.recipe, self.folder, self.report = recipe, folder, report
        self.device = parse_device(device)
        make_folder(folder)
        bundled_tokenizer.save(folder / "checkpoint")
        self.tokenizer = Tokenizer.from_folder(folder / "checkpoint")
        self.config_dict = {"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"],
                            **recipe.model}
        self.network = DiffusionTransformer(model_config_from_dict(self.config_dict, f"recipe {recipe.name}: model"))
        initialise(self.network, recipe.seed)
        self.network.to(self.device)
        self.optimizers = build_optimizers(self.network, recipe.optimizer.muon_lr, recipe.optimizer.adam_lr,
                                           recipe.optimizer.weight_decay)
        self.step = 0
        self.best = -1.0
        report("preparing base puzzles (computed once)")
        self.data = SudokuBatches(self.tokenizer, self.network.config.canvas_length, recipe.batch_size, recipe.seed,
                                  recipe.data.bases, folder / "puzzles.npz", recipe.data.givens,
                                  recipe.data.easy_givens, recipe.data.curriculum_steps)
        self._resume()

    def train(self) -> None:
        """Run until ``max_steps``; Ctrl-C or SIGTERM saves and stops at the next step."""
        from torch.utils.tensorboard import SummaryWriter

        stopping = False

        def stop(*_: Any) -> None:
            nonlocal stopping
            stopping = True

        previous = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step)
        loss_of = torch.compile(block_diffusion_loss) if self.recipe.compile else block_diffusion_loss
        clock, since = time.perf_counter(), self.step
        try:
            while self.step < self.recipe.max_steps and not stopping:
                parts = self._train_step(loss_of)
                self.step += 1
                if self.step % 20 == 0:
                    pace = (time.perf_counter() - clock) / (self.step - since)
                    clock, since = time.perf_counter(), self.step
                    for name, value in parts.items():
                        writer.add_scalar(name, value, self.step)
                    writer.add_scalar("seconds_per_step", pace, self.step)
                    shown = "  ".join(f"{name} {value:.4f}" for name, value in parts.items())
                    left = (self.recipe.max_steps - self.step) * pace / 60
                    self.report(f"step {self.step}/{self.recipe.max_steps}  {shown}  {pace:.2f} s/step  "
                                f"{left:.0f} min left")
                if self.step % self.recipe.evaluate_every == 0 or self.step == self.recipe.max_steps:
                    self._evaluate(writer)
                    self.save()  # with what is best so far
                    clock, since = time.perf_counter(), self.step
                elif self.step % self.recipe.save_every == 0:
                    self.save()
        finally:
            self.save()
            writer.close()
            for name, handler in previous.items():
                signal.signal(name, handler)
        self.report(f"{'stopped' if stopping else 'done'} at step {self.step}; results in {self.folder}")

    def _train_step(self, loss_of: Callable[..., Any]) -> dict[str, float]:
        recipe, config = self.recipe, self.network.config
        batch = self.data.batch(self.step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        noise = draw_noise(recipe.objective, len(batch.canvas), config.canvas_length, config.vocab_size, generator)
        prompt, canvas, noise = batch.prompt.to(self.device), batch.canvas.to(self.device), noise.to(self.device)
        # Only the commonest shape is worth compiling for; the others run eagerly.
        function = loss_of if batch.kind == "plain" else block_diffusion_loss
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.autocast):
            loss, parts = function(self.network, prompt, canvas, recipe.objective, noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.optimizer.clip)
        if not math.isfinite(norm.item()):
            raise DgemmaError(f"training diverged at step {self.step}: the gradient is not finite; lower the learning "
                              f"rates and start again from {self.folder / 'state.pt'}")
        factor = learning_rate_factor(self.step, recipe.max_steps, recipe.optimizer)
        for optimizer, rate in zip(self.optimizers, (recipe.optimizer.muon_lr, recipe.optimizer.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: value.item() for name, value in parts.items()}

    def _evaluate(self, writer: Any) -> None:
        from dgemma.train.evaluate import evaluate_network

        settings = generation_config_from_dict(self.generation_config(), self.network.config)
        scores = evaluate_network(self.network, self.tokenizer, settings, self.recipe.evaluate_count)
        for band, score in scores.items():
            writer.add_scalar(f"exact/{band}", score.exact, self.step)
            writer.add_scalar(f"steps/{band}", score.mean_steps, self.step)
            self.report(f"step {self.step}: {band}: {score.exact:.1%} solved, {score.mean_steps:.1f} steps")
        mean = sum(score.exact for score in scores.values()) / len(scores)
        if mean >= self.best:
            self.best = mean
            self.export(self.folder / "best")

    def generation_config(self) -> dict[str, Any]:
        """The ``generation_config.json`` of the checkpoint."""
        return {"eos_token_id": [1, 106, 50], "pad_token_id": 0, "bos_token_id": 2,
                "max_new_tokens": self.network.config.canvas_length, **self.recipe.generation}

    def export(self, folder: Path) -> None:
        """Write a checkpoint that `dgemma run -m` takes."""
        bundled_tokenizer.save(folder)
        # In float32: what is evaluated is what ships, every processor runs it fast, and it is small.
        save_checkpoint(self.network, folder, self.config_dict, self.generation_config(), torch.float32)

    def save(self) -> None:
        """Write state.pt and checkpoint/; an interruption leaves the old ones."""
        with atomic_write(self.folder / "state.pt") as beside:
            torch.save({"step": self.step, "best": self.best, "network": self.network.state_dict(),
                        "optimizers": [o.state_dict() for o in self.optimizers]}, beside)
        self.export(self.folder / "checkpoint")

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.step, self.best = state["step"], state["best"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise DgemmaError(f"{path}: is damaged ({error}); remove it to start anew") from error
        try:
            self.network.load_state_dict(state["network"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise DgemmaError(f"{path}: was made by another model ({error}); choose another --out folder") from error
        self.report(f"resuming at step {self.step}")
