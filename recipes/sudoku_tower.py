"""Teaches a small vision tower to tell the digits of Sudoku pictures apart, before the network learns to read with it:

    python recipes/sudoku_tower.py runs/sudoku-tower
    dgemma train recipes/sudoku-pictures.yaml

A network whose tower sees nothing yet does not know what to look for. So the tower learns by itself first, with two
heads that are thrown away: one says of every patch in which row and column of the grid it lies and which digit is
there, the other asks the soft tokens for each of the 81 cells, as the canvas will. Grids are of random digits:
nothing but the picture says what is in them. An hour and a half of one busy CPU core. Ctrl-C stops; the same
command goes on from the last hundredth step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.chat.pictures import prepare
from dgemma.config import VisionConfig, vision_config_to_dict
from dgemma.files import atomic_write, make_folder
from dgemma.nn.vision import Vision
from dgemma.tasks.sudoku_pictures import picture
from dgemma.tasks.sudoku_questions import random_digits
from dgemma.train.runs.state import initialise
from dgemma.weights.files import SINGLE_FILE
from dgemma.weights.save import write_safetensors

BUNDLED = Path(__file__).parents[1] / "src" / "dgemma" / "models" / "sudoku"
BUDGET = 70
TOWER = VisionConfig(hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=3,
                     num_key_value_heads=3, head_dim=64, patch_size=20, pooling_kernel_size=2,
                     position_embedding_size=64, vision_soft_tokens_per_image=BUDGET,
                     vision_soft_token_budgets=(BUDGET,))
OUTSIDE = 9  # the row and column of patches beside the grid
AVERAGED = 0.998


class Seen:
    """A picture: what the tower sees [rows, columns, 3p²] (bytes), its grid [81], and of every patch its row, column
    and digit [3, rows · columns]."""

    def __init__(self, seed: tuple[int, ...], photo: bool, held_out: bool):
        rng = np.random.default_rng(seed)
        self.grid = random_digits(rng)
        drawn = picture(self.grid, rng, photo=photo, held_out=held_out)
        seen = prepare(drawn.image, BUDGET, TOWER)
        size, (height, width) = TOWER.patch_size, seen.pixels.shape[:2]
        self.pixels = seen.pixels.reshape(height // size, size, width // size, size, 3).swapaxes(1, 2)
        y, x = (np.mgrid[: height // size, : width // size].reshape(2, -1) + 0.5) * size
        scale = np.array(drawn.image.size) / (width, height)
        columns, rows = np.floor(drawn.cells(np.stack([x, y], 1) * scale)).astype(int).T
        rows, columns = (np.where((place >= 0) & (place < 9), place, OUTSIDE) for place in (rows, columns))
        within = np.pad(self.grid.reshape(9, 9), (0, 1))  # nothing is written beside the grid
        self.labels = np.stack([rows, columns, within[rows, columns]])

    def patches(self, rng: np.random.Generator | None) -> Tensor:
        """Between 0 and 1; with ``rng`` in another light, now and then as a negative."""
        x = torch.from_numpy(self.pixels.astype(np.float32) / 255)
        if rng is not None:
            tint = torch.from_numpy(rng.uniform(0.8, 1.2, 3) * rng.uniform(0.8, 1.2)).float()
            x = (x * tint + float(rng.uniform(-0.1, 0.1))).clamp(0, 1)
            x = 1 - x if rng.random() < 0.05 else x
        return x.flatten(2)


class CellReader(nn.Module):
    """Asks soft tokens for each of the 81 cells by two layers of attention: blank, or which digit."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(81, width) / 2)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, F.gelu, batch_first=True,
                                                               norm_first=True) for _ in range(2))
        self.out = nn.Linear(width, 10)

    def forward(self, soft: list[Tensor]) -> Tensor:
        """soft [n, D] of each picture -> logits [B, 81, 10]."""
        padded = nn.utils.rnn.pad_sequence(soft, batch_first=True)
        absent = torch.arange(padded.shape[1]) >= torch.tensor([len(tokens) for tokens in soft])[:, None]
        x = self.cells.expand(len(soft), -1, -1)
        for layer in self.layers:
            x = layer(x, padded, memory_key_padding_mask=absent)
        return self.out(x)


class Learner(nn.Module):
    """The tower and the heads that are thrown away."""

    def __init__(self, text_width: int):
        super().__init__()
        self.vision = Vision(TOWER, text_width)
        self.reader = CellReader(text_width)
        self.of_patches = nn.Linear(TOWER.hidden_size, 30)
        self._patches = torch.empty(0)
        self.vision.vision_tower.encoder.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._patches = output

    def forward(self, pictures: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pictures of one shape after the other -> the cells [B, 81, 10]; of all patches row, column, digit [N, 10]."""
        soft = self.vision(pictures)
        patches = F.rms_norm(self._patches.float(), (TOWER.hidden_size,))
        return self.reader(soft).float(), self.of_patches(patches).split(10, dim=-1)


def draw(seed: int, start: int, count: int, photos: float, held_out: bool = False) -> list[Seen]:
    """Pictures number ``start`` and so many after it."""
    return [Seen((seed, number, held_out), number % 100 < 100 * photos, held_out)
            for number in range(start, start + count)]


def drawn(pool: ThreadPoolExecutor, seed: int, step: int, size: int) -> Iterator[list[Seen]]:
    """The pictures of every step from ``step`` on, drawn some steps ahead."""
    ahead = [pool.submit(draw, seed, (step + i) * size, size, 0.6) for i in range(16)]
    while True:
        yield ahead.pop(0).result()
        step += 1
        ahead.append(pool.submit(draw, seed, (step + 15) * size, size, 0.6))


def optimizers_of(learner: Learner, muon: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the tower's matrices, AdamW for the rest."""
    matrices = [p for name, p in learner.named_parameters() if p.ndim == 2 and "encoder.layers" in name]
    rest = [p for p in learner.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def loss_of(learner: Learner, pictures: list[Seen], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The loss of a step, and that of the cells alone."""
    pictures = sorted(pictures, key=lambda seen: seen.pixels.shape[:2])  # the order that the tower takes them in
    pictures.sort(key=lambda seen: math.prod(seen.pixels.shape[:2]))
    with torch.autocast("cpu", torch.bfloat16):
        cells, of_patches = learner([seen.patches(rng) for seen in pictures])
    grids = torch.from_numpy(np.stack([seen.grid for seen in pictures]))
    labels = torch.from_numpy(np.concatenate([seen.labels for seen in pictures], axis=1))
    read = F.cross_entropy(cells.flatten(0, 1), grids.flatten())
    return read + sum(F.cross_entropy(found, label) for found, label in zip(of_patches, labels, strict=True)), read


@torch.no_grad()
def score(learner: Learner, pictures: list[Seen]) -> tuple[float, float]:
    """The share of cells that are told right, and of pictures of which all are."""
    right = []
    for start in range(0, len(pictures), 16):
        part = pictures[start : start + 16]
        cells, _ = learner([seen.patches(None) for seen in part])
        right.append(cells.argmax(-1) == torch.from_numpy(np.stack([seen.grid for seen in part])))
    found = torch.cat(right)
    return found.float().mean().item(), found.all(1).float().mean().item()


def save(learner: Learner, averages: dict[str, Tensor], folder: Path) -> None:
    """The tower and its embedder, as a checkpoint that ``vision:`` of a recipe takes them from."""
    tensors = {f"model.encoder.{name}": tensor for name, tensor in learner.vision.state_dict().items()}
    tensors |= {f"model.encoder.{name.removeprefix('vision.')}": tensor for name, tensor in averages.items()
                if name.startswith("vision.")}
    config = json.loads((BUNDLED / "config.json").read_text()) | vision_config_to_dict(TOWER)
    write_safetensors(folder / SINGLE_FILE, {name: tensor.contiguous() for name, tensor in tensors.items()}, {})
    with atomic_write(folder / "config.json") as beside:
        beside.write_text(json.dumps(config, indent=2))


def train(folder: Path, steps: int, batch: int, muon: float, lr: float, seed: int, count: int) -> None:
    """Learn, and write the tower into ``folder`` every hundred steps; goes on with what is there."""
    torch.manual_seed(seed)
    learner = Learner(json.loads((BUNDLED / "config.json").read_text())["text_config"]["hidden_size"])
    initialise(learner.vision, seed, TOWER.num_hidden_layers)
    optimizers = optimizers_of(learner, muon, lr)
    averages = {name: p.detach().clone() for name, p in learner.named_parameters()}
    state_file, done = make_folder(folder) / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        learner.load_state_dict(state["learner"])
        averages, done = state["averages"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    kept = {name: draw(seed + 1, 0, count, photos, held_out=True) for name, photos in (("screens", 0), ("photos", 1))}
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        for step, pictures in zip(range(done, steps), drawn(pool, seed, done, batch), strict=False):
            factor = min(1, (step + 1) / 50, max(0.02, (steps - step) / (0.75 * steps)))
            loss, read = loss_of(learner, pictures, np.random.default_rng((seed, step, 2)))
            learner.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, (muon, lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                optimizer.step()
            weight = min(AVERAGED, (step + 1) / (step + 20))
            for name, parameter in learner.named_parameters():
                averages[name].lerp_(parameter.detach(), 1 - weight)
            if (step + 1) % 20 == 0:
                print(f"step {step + 1}/{steps}: loss {loss.item():.3f}, cells {read.item():.3f}, "
                      f"{(time.monotonic() - began) / (step + 1 - done):.2f} s a step", flush=True)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                with atomic_write(state_file) as beside:
                    torch.save({"learner": learner.state_dict(), "averages": averages, "step": step + 1,
                                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, beside)
                save(learner, averages, folder)
            if (step + 1) % 500 == 0 or step + 1 == steps:
                now = {name: p.detach().clone() for name, p in learner.named_parameters()}
                learner.load_state_dict(averages, strict=False)
                for name, of in kept.items():
                    cells, whole = score(learner, of)
                    print(f"  {name} in fonts not trained on: {cells:.2%} of the cells, all in {whole:.1%}")
                learner.load_state_dict(now, strict=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the tower goes")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--muon", type=float, default=6e-3, help="learning rate of the tower's matrices")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the rest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=64, help="pictures of a kind to look at every 500 steps")
    given = parser.parse_args()
    try:
        train(given.folder, given.steps, given.batch, given.muon, given.lr, given.seed, given.count)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last hundredth step")


if __name__ == "__main__":
    main()
