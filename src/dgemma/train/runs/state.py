"""What a recipe trains: a network with its tokenizer and settings, and how it is written as a checkpoint or an adapter.

Works on recipes, networks and folders; knows nothing of losses and steps.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dgemma import seeds
from dgemma.chat.pictures import PICTURE_TOKENS, with_picture_tokens
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import (
    MODEL_TYPE,
    GenerationConfig,
    generation_config_from_dict,
    model_config_from_dict,
    vision_config_to_dict,
)
from dgemma.engine.pictures import PictureEncoder
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.fields import is_there, read_json
from dgemma.files import make_folder
from dgemma.model import Model, Parts, read_parts, seeing
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import attach, install
from dgemma.nn.passes import Passes
from dgemma.nn.vision import Vision
from dgemma.train.data import tokenizer as bundled_tokenizer
from dgemma.train.data.sources import Report, Source, few, source_of
from dgemma.train.eval.baseline import CausalModel
from dgemma.train.eval.tasks import Answering
from dgemma.train.recipe import Recipe, beginning
from dgemma.weights.adapters import read_adapter, save_adapter
from dgemma.weights.files import weight_files
from dgemma.weights.gguf_model import load_gguf_network
from dgemma.weights.load import load_network
from dgemma.weights.merge import copy_companions, replace_weights
from dgemma.weights.names import trained_name
from dgemma.weights.save import save_checkpoint
from dgemma.weights.towers import find_tower


@dataclass(frozen=True)
class TrainState:
    """A network in training. ``source`` is the checkpoint that it comes from, None for fresh weights; ``pictures`` sees
    them by the network's tower, where it has one."""

    network: DiffusionTransformer
    tokenizer: Tokenizer
    generation_config: GenerationConfig
    recipe: Recipe
    source: Path | None
    pictures: PictureEncoder | None = None

    @property
    def name(self) -> str:
        """The base model, as the adapter's file and the report call it."""
        return str(self.recipe.model) if isinstance(self.recipe.model, str) else str(self.source or "fresh weights")

    def model(self) -> Answering:
        """The network as what answers prompts: by denoising, or from left to right where nothing else is trained."""
        parts = (self.network, self.tokenizer, self.generation_config, self.recipe.name)
        if not self.recipe.objective.denoising_weight:
            return CausalModel(*parts)
        # What a tower in training saw it sees otherwise by now.
        return Model(*parts, pictures=PictureEncoder.of(self.network) if self.trains_tower else self.pictures)

    @property
    def trains_tower(self) -> bool:
        """Whether anything of the tower changes."""
        vision = self.network.vision
        return vision is not None and any(parameter.requires_grad for parameter in vision.parameters())

    def seeing(self, passes: Passes) -> Passes:
        """Passes to train with that see pictures: by a tower that stays as it is each picture once, as far as that is
        kept (`PictureEncoder`)."""
        if self.pictures is None or self.trains_tower:
            return passes
        return replace(passes, see=self.pictures.see)

    def export(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write what is trained, as `dgemma run` takes it: an adapter, or a whole checkpoint.

        ``tensors`` are the network's by name, None: its ``state_dict()``. A complete new folder takes the place of the
        one that is there. Raises DgemmaError when it cannot be written.
        """
        beside = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        make_folder(beside)
        try:
            if self.recipe.adapter is not None:
                save_adapter(self.network, self.recipe.adapter, beside, self.name)
            elif self.source is not None and self.recipe.vision is not None:
                self._write_seeing(self.source, beside, tensors)
            elif self.source is not None:
                replace_weights(self.source, self.network.state_dict() if tensors is None else tensors, beside)
            else:
                bundled_tokenizer.save(beside)
                # In float32: what is evaluated is what ships, every processor runs it fast, and it is small.
                save_checkpoint(self.network, beside, _config_dict(self.recipe), _generation_dict(self.recipe),
                                torch.float32, tensors)
            _swap(beside, folder)
        except OSError as error:
            raise DgemmaError(f"{folder}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write_seeing(self, source: Path, folder: Path, tensors: Mapping[str, Tensor] | None) -> None:
        """Write a checkpoint of another one with the tower that it was given."""
        copy_companions(source, folder)
        generation = source / "generation_config.json"
        save_checkpoint(self.network, folder, _seeing_dict(self.recipe, source, self.tokenizer),
                        read_json(generation) if is_there(generation) else {}, self.network.dtype, tensors)

    @contextmanager
    def exported(self, folder: Path) -> Iterator[None]:
        """Within it the network is what `export` wrote to a folder; what it was waits in main memory."""
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
        try:
            if self.recipe.adapter is not None:
                adapter = read_adapter(folder, self.network)
                install(self.network, adapter.config, adapter.factors)
            else:
                _read_weights(folder, trained)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    trained[name].copy_(tensor)


def restore(folder: Path) -> None:
    """Put back a folder whose replacement was cut off between two renamings."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def parts_of(recipe: Recipe, base: Path | None = None) -> Parts:
    """The parts of the model that a recipe begins with; ``base`` is the checkpoint of the recipe that it goes on from.

    Raises DgemmaError when they cannot be had.
    """
    if recipe.fresh:
        return _fresh_parts(recipe)
    parts = read_parts(base or str(recipe.model))
    if recipe.vision is None:
        return replace(parts, config=seeing(parts)[0])
    if parts.gguf is not None or parts.source is None:
        raise DgemmaError(f"recipe {recipe.name}: vision: a GGUF file is given no tower here: put one beside it")
    config = _seeing_dict(recipe, parts.source, parts.tokenizer)
    return replace(parts, config=model_config_from_dict(config, f"recipe {recipe.name}: vision"))


def glimpse(recipe: Recipe, report: Report = lambda text: None) -> tuple[Parts, Source]:
    """What a recipe begins with, weights aside, and its examples; of what is made on the way only a few."""
    parts = parts_of(beginning(recipe))  # its base may not be trained yet
    with tempfile.TemporaryDirectory() as folder:
        return parts, source_of(few(recipe), parts.tokenizer, parts.config, parts.generation_config, Path(folder),
                                report)


def begin(recipe: Recipe, parts: Parts, device: torch.device, progress: Callable[[int, int], None] | None = None,
          sees: bool = False) -> TrainState:
    """The network that a recipe begins with, its adapter attached and everything else frozen that is to stay.

    ``sees``: with its tower, which a network of fresh weights always has where its config describes one, as has any
    that is given one. Raises DgemmaError when it cannot be had.
    """
    if parts.gguf is not None and recipe.adapter is None:
        raise DgemmaError(f"{parts.source}: a GGUF file is trained by an adapter only (a section `adapter:` in the "
                          "recipe); to train everything take the checkpoint that it was made of")
    if parts.source is None:
        network = DiffusionTransformer(parts.config)
        if parts.config.vision is not None:
            network.attach_vision(Vision(parts.config.vision, parts.config.hidden_size))
        initialise(network, recipe.seed, len(network.layers))
        network.to(device, None if recipe.dtype is None else getattr(torch, recipe.dtype))
    elif parts.gguf is not None:
        network = load_gguf_network(replace(parts.gguf, config=parts.config), device, progress=progress,
                                    keep_packed=True)
    else:
        dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
        network = load_network(parts.source, parts.config, device=device, dtype=dtype, progress=progress)
    if isinstance(recipe.vision, dict):
        assert parts.config.vision is not None  # it describes one
        vision = Vision(parts.config.vision, parts.config.hidden_size)
        initialise(vision, recipe.seed, parts.config.vision.num_hidden_layers)
        network.attach_vision(vision.to(device, network.dtype))
    elif parts.source is not None and (sees or recipe.vision is not None):
        _, tower = seeing(parts, vision=recipe.vision)
        assert tower is not None  # otherwise its conversations could not have pictures
        network.attach_vision(tower.load(device, None if parts.gguf is not None else network.dtype))
    state = TrainState(network, parts.tokenizer, parts.generation_config, recipe, parts.source,
                       None if network.vision is None else PictureEncoder.of(network))
    if recipe.adapter is not None:
        attach(network, recipe.adapter, recipe.seed)
    else:
        _train_everything(state)
    network.train()
    return state


def initialise(network: nn.Module, seed: int, layers: int) -> None:
    """Fresh weights for a small network or tower of so many layers.

    Matrices are normal with std 1/√columns; the norms at the end of a residual branch start small, so that
    the residual stream grows slowly with depth; query and key norms make attention scores start near unit size,
    since there is no 1/√d in the softmax.
    """
    generator = seeds.generator(seed)
    depth = 2 * layers
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


def _fresh_parts(recipe: Recipe) -> Parts:
    config = model_config_from_dict(_config_dict(recipe), f"recipe {recipe.name}: model")
    with tempfile.TemporaryDirectory() as folder:
        bundled_tokenizer.save(folder)
        tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise DgemmaError(f"recipe {recipe.name}: the byte tokenizer of new models has {tokenizer.vocab_size} tokens, "
                          f"the model's vocab_size is {config.vocab_size}")
    return Parts(tokenizer, config, generation_config_from_dict(_generation_dict(recipe), config), None)


def _train_everything(state: TrainState) -> None:
    """Make every parameter trainable but those that the recipe freezes."""
    network, recipe = state.network, state.recipe
    frozen = recipe.frozen
    names = [name for name, _ in network.named_parameters()]
    # A tower may be frozen where no picture comes, too, and it is not there.
    known = names if network.config.vision is None else [*names, "vision.vision_tower", "vision.embed_vision"]
    for part in frozen:
        if recipe.freeze is not None and not any(part in f".{name}" for name in known):
            raise DgemmaError(f"recipe {recipe.name}: freeze: no parameter has {part!r} in its name; they are called "
                              f"{', '.join(names[:3])}, …")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(part in f".{name}" for part in frozen))


@torch.no_grad()
def _read_weights(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Give parameters the numbers that a checkpoint has for them."""
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118 (it is no dict)
                    name = trained_name(stored)
                    if name is not None and name in parameters:
                        parameters[name].copy_(file.get_tensor(stored))
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: another shape
            raise CheckpointError(f"{path}: cannot be read as this model's weights ({error})") from error


def _swap(new: Path, folder: Path) -> None:
    """Put a complete folder in the place of another; `restore` mends what a kill in between leaves."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _seeing_dict(recipe: Recipe, source: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``config.json`` of the checkpoint ``source`` with the tower that its recipe gives it, whose soft tokens
    see all of their picture unless it says something else. Raises DgemmaError where there can be none."""
    data, where = read_json(source / "config.json"), f"recipe {recipe.name}: vision"
    if isinstance(recipe.vision, str):
        tower = find_tower(source, model_config_from_dict(data, str(source)), vision=recipe.vision)
        found = None if tower is None else tower.config
    else:
        found = model_config_from_dict({**data, **(recipe.vision or {})}, where).vision
    known = None if found is None else with_picture_tokens(found, tokenizer.token_to_id)
    if known is None:
        raise DgemmaError(f"{where}: the tokenizer of {recipe.model} has no tokens for pictures")
    text = {"use_bidirectional_attention": "vision", **data["text_config"]}
    return {**data, "text_config": text, **vision_config_to_dict(known)}


def _config_dict(recipe: Recipe) -> dict[str, Any]:
    assert isinstance(recipe.model, dict)
    sees = "vision_config" in recipe.model
    ids = {name: bundled_tokenizer.SPECIAL_IDS[token] for name, token in PICTURE_TOKENS.items()} if sees else {}
    return {"model_type": MODEL_TYPE, "architectures": ["DiffusionGemmaForBlockDiffusion"], **ids, **recipe.model}


def _generation_dict(recipe: Recipe) -> dict[str, Any]:
    """The ``generation_config.json`` of a new checkpoint."""
    assert isinstance(recipe.model, dict)
    return {"eos_token_id": [1, 106, 50], "pad_token_id": 0, "bos_token_id": 2,
            "max_new_tokens": recipe.model.get("canvas_length", 256), **recipe.generation}
