"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

Works on those files and on a network's adapters; knows nothing of training. `transformers` keeps an encoder and a
decoder that share their weights, and PEFT gives each an adapter of its own; ours is one network with one adapter. So
every pair is written under both names, and a file whose two are not the same is refused, not half used.

Names, after ``base_model.model.``: ``MODULE.lora_A.weight`` [r, K], ``.lora_B.weight`` [N, r] and with DoRA
``.lora_magnitude_vector`` [N]. The fused experts are PEFT's ``target_parameters``: A [E·r, K] and B [N, r·E], experts
first in A and last in B, under ``experts.base_layer`` for gate_up_proj and ``experts`` for down_proj where a layer has
both, else under ``experts``. PEFT has no DoRA there: the magnitude [E, N] has that name, too, and only we read it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.config import LARGEST_SIZE
from dgemma.errors import CheckpointError, DgemmaError, describe, problems_of
from dgemma.fields import Fields, is_number, is_there, read_json, shown
from dgemma.files import atomic_write, json_bytes, make_folder
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import AdapterConfig, Factors, adaptable, adapter_parameters, adapters, install
from dgemma.weights.names import is_vision, pass_names, trained_name
from dgemma.weights.save import write_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")
_EXPERTS = ("gate_up_proj", "down_proj")  # in the order in which PEFT wraps them, the innermost first
# Settings of PEFT's that change what an adapter means; all but these are about how it was made.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
          **dict.fromkeys(("modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora",
                           "trainable_token_indices", "use_bdlora", "kasa_config", "velora_config", "arrow_config",
                           "monteclora_config", "alora_invocation_tokens"), ())}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it stands in its files: what is adapted, and the float32 numbers by the names of our matrices."""

    config: AdapterConfig
    factors: dict[str, Factors]


def save_adapter(network: DiffusionTransformer, config: AdapterConfig, folder: Path, base: str | None = None) -> None:
    """Write the network's adapter, attached with ``config``, into ``folder``; ``base`` names the model it is for.

    Each file is written beside its place and then renamed, the weights first. Raises DgemmaError when the network has
    no adapter or a file cannot be written.
    """
    found = adapters(network)
    if not found:
        raise DgemmaError(f"{folder}: there is nothing to save: the network has no adapter")
    tensors: dict[str, Tensor] = {}
    for name, adapter in found.items():
        parts = _stored(adapter.factors)
        for place in pass_names(_module_of(name, found)):
            tensors |= {f"{_PREFIX}{place}.{key}": tensor.to("cpu", copy=True) for key, tensor in parts.items()}
    make_folder(folder)
    write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    with atomic_write(folder / CONFIG_FILE) as beside:
        beside.write_bytes(json_bytes(_peft_config(config, list(found), list(adaptable(network)), base), indent=2)
                           + b"\n")


def load_adapter(network: DiffusionTransformer, path: str | Path, trainable: bool = False) -> AdapterConfig:
    """Give the network the adapter at ``path`` (see `read_adapter`) in place of any that it has; returns what it is.

    Everything is checked first: a file that does not fit leaves the network as it was. What a cache or a `PrefixStore`
    holds was computed without it.
    """
    adapter = read_adapter(path, network)
    install(network, adapter.config, adapter.factors)
    for parameter in adapter_parameters(network).values():
        parameter.requires_grad_(trainable)
    return adapter.config


def adapts_tower(path: str | Path) -> bool:
    """Whether an adapter changes the vision tower, too, which its network must hold then. Raises as `read_adapter`."""
    from safetensors import SafetensorError, safe_open

    file, _ = _open(Path(path))
    try:
        with safe_open(file, "pt") as mapped:
            return any(is_vision(key.removeprefix(_PREFIX)) for key in mapped.keys())  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors file ({error})") from error


def read_adapter(path: str | Path, network: DiffusionTransformer) -> Adapter:
    """The adapter in a folder, or in a safetensors file with its adapter_config.json beside it.

    Of the network only names and shapes count. Raises CheckpointError, with everything that is wrong, when files are
    missing or damaged, use what we do not know, or do not fit the network.
    """
    file, settings = _open(Path(path))
    config, tensors = _settings(file.parent / CONFIG_FILE, settings), _read(file)
    shapes = {name: tuple(getattr(module, attribute).shape)
              for name, (module, attribute) in adaptable(network).items()}
    if network.vision is None and any(is_vision(key.removeprefix(_PREFIX)) for key in tensors):
        raise CheckpointError(f"{file}: this adapter changes the vision tower, too, which is not there: the model has "
                              "none, or loads it with the first picture; give the adapter when the model is loaded "
                              "(adapter=). Several such adapters on one model are not supported yet")
    found, unknown = _sorted(tensors, shapes, settings.get("target_parameters") or ())
    config = _with_patterns(config, settings, found, file.parent / CONFIG_FILE)
    names = [name for name in shapes if any(place in found for place in pass_names(name))]
    places = {place: name for name in names for place in pass_names(name)}
    expected = {place: name for name in shapes for place in pass_names(name) if _is_target(place, name, settings)}
    missing, wrong, differ = [], [], []
    for place, name in {**expected, **places}.items():
        needed = _needed_shapes(shapes[name], config.rank_of(name), config.dora)
        have = found.get(place, {})
        missing += [f"{key} of {place}" for key in needed if key not in have]
        wrong += [f"{key} of {place}: expected {list(needed[key])}, found {list(tensor.shape)}"
                  for key, tensor in have.items() if key in needed and tuple(tensor.shape) != needed[key]]
        unknown += [f"{key} of {place}" for key in have if key not in needed]
    if not missing:
        differ = [name for name in names if not _alike([found[place] for place in pass_names(name)])]
    problems = {
        "unknown keys, of another model or of what cannot be adapted here": unknown,
        "missing keys": missing,
        "wrong shapes": wrong,
        "different in the encoder and the decoder, which share one adapter here": differ,
        "infinite numbers or no numbers (NaN)": [place for place, have in found.items()
                                                 if not all(bool(tensor.isfinite().all()) for tensor in have.values())],
    }
    if any(problems.values()) or not names:
        made_for = settings.get("base_model_name_or_path")
        raise CheckpointError(f"{file}: this adapter does not fit this model"
                              + (f" (it was made for {made_for})" if made_for else "") + "\n"
                              + describe(problems_of(problems)))
    factors = {name: _factors(found[pass_names(name)[0]], shapes[name], config.scale_of(name)) for name in names}
    return Adapter(replace(config, targets=tuple(names)), factors)


def _open(path: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and what adapter_config.json says."""
    is_folder = os.path.isdir(path)  # of the two ways to ask, the one that takes any path
    file = path / WEIGHTS_FILE if is_folder else path
    if not os.path.isfile(file):
        pickled = is_folder and (path / "adapter_model.bin").exists()
        raise CheckpointError(f"{path}: there is no {WEIGHTS_FILE} in this folder" + (
            "; adapter_model.bin is a pickle, which is not read here: save it as safetensors" if pickled else "")
            if is_folder else f"{path}: no such adapter (a folder with {CONFIG_FILE} and {WEIGHTS_FILE})")
    config = file.parent / CONFIG_FILE
    if not is_there(config):
        raise CheckpointError(f"{config}: cannot be read (no such file); an adapter needs it")
    settings = read_json(config)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{config}: peft_type must be LORA, got {shown(settings.get('peft_type'))}")
    return file, settings


def _settings(file: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    fields = Fields(settings, str(file))
    for key, allowed in _PLAIN.items():
        value = settings.get(key)
        if value not in (None, False, [], {}) and value not in allowed:
            raise CheckpointError(f"{file}: {key} {shown(value)} is not supported")
    expression = settings.get("target_modules")
    if not isinstance(expression, str):
        for key in ("target_modules", "target_parameters", "exclude_modules"):
            if not (key == "exclude_modules" and isinstance(settings.get(key), str)):
                fields.texts(key)
    else:
        fields.texts("target_parameters")
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise fields.wrong("target_modules", f"is no regular expression ({error})") from error
    for key in ("r", "lora_alpha", "lora_dropout"):
        if settings.get(key) is None and key != "lora_dropout":
            raise fields.missing(key)
        if is_number(settings.get(key)) and abs(settings[key]) > LARGEST_SIZE:
            raise fields.wrong(key, f"must be at most {LARGEST_SIZE:,}")
    dropout = fields.data.get("lora_dropout") or 0.0
    if not is_number(dropout):
        raise fields.wrong("lora_dropout", "must be a number")
    dora, rslora = bool(fields.flag("use_dora")), bool(fields.flag("use_rslora"))
    try:
        return AdapterConfig(r=settings["r"], alpha=settings["lora_alpha"], dora=dora, rslora=rslora, dropout=dropout)
    except (DgemmaError, OverflowError) as error:
        raise CheckpointError(f"{file}: {str(error)[:300]}") from error


def _with_patterns(config: AdapterConfig, settings: Mapping[str, Any], places: Iterable[str],
                   file: Path) -> AdapterConfig:
    """With the ranks and alphas of single matrices, whose patterns are of transformers' names, by our names."""
    fields = Fields(settings, str(file))
    patterns = {key: dict(found.data) if (found := fields.within(key)) else {}
                for key in ("rank_pattern", "alpha_pattern")}
    for key, values in patterns.items():
        for name, value in values.items():
            if not is_number(value) or abs(value) > LARGEST_SIZE:
                raise CheckpointError(f"{file}: {key}: {shown(name)} must be a number of at most {LARGEST_SIZE:,}, got "
                                      f"{shown(value)}")
    try:
        theirs = replace(config, **patterns)
        values = [(trained_name(place) or place, theirs.rank_of(place), theirs.alpha_of(place)) for place in places]
    except (DgemmaError, re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{file}: rank_pattern or alpha_pattern: {str(error)[:300]}") from error
    if len(set(values)) > len({name for name, *_ in values}):
        raise CheckpointError(f"{file}: rank_pattern or alpha_pattern differs between the encoder and the decoder, "
                              "which share one adapter here")
    return replace(config, rank_pattern={re.escape(name): rank for name, rank, _ in values if rank != config.r},
                   alpha_pattern={re.escape(name): alpha for name, _, alpha in values if alpha != config.alpha})


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: corrupt safetensors file ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error


def _sorted(tensors: Mapping[str, Tensor], known: Mapping[str, Any],
            target_parameters: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """transformers' name of a matrix -> its tensors by PEFT's last part; and the keys that belong to no matrix."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    parsed = {key: _KEY.fullmatch(key) for key in tensors}
    modules = {match[1] for match in parsed.values() if match}
    for key, match in parsed.items():
        place = _place(match[1], modules, target_parameters) if match else ""
        ours = trained_name(place)
        if match is None or ours is None or ours not in known or place not in pass_names(ours):
            unknown.append(key)
        else:
            found.setdefault(place, {})[match[2]] = tensors[key].float()
    return found, unknown


def _place(module: str, modules: Iterable[str], target_parameters: Iterable[str]) -> str:
    """The matrix that PEFT's module stands for: itself, or one of the experts' parameters."""
    if module.endswith(".experts.base_layer"):
        return f"{module.removesuffix('base_layer')}{_EXPERTS[0]}"
    if not module.endswith(".experts"):
        return module
    targeted = [name for part in _EXPERTS if _ends_in(name := f"{module}.{part}", target_parameters)]
    both = f"{module}.base_layer" in modules
    return targeted[0] if len(targeted) == 1 and not both else f"{module}.{_EXPERTS[1]}"


def _is_target(place: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether the settings promise a pair for this matrix, as far as they say so plainly."""
    if ".experts." in name:
        return _ends_in(place, settings.get("target_parameters") or ())
    targets = settings.get("target_modules")
    if not targets or targets == "all-linear" or settings.get("layers_to_transform") is not None or (
            settings.get("exclude_modules")):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, place) is not None
    return _ends_in(place, targets)


def _ends_in(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _needed_shapes(shape: tuple[int, ...], rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    *stack, outputs, inputs = shape
    count = stack[0] if stack else 1
    needed: dict[str, tuple[int, ...]] = {"lora_A.weight": (count * rank, inputs),
                                          "lora_B.weight": (outputs, rank * count)}
    return {**needed, "lora_magnitude_vector": (*stack, outputs)} if dora else needed


def _alike(pairs: list[dict[str, Tensor]]) -> bool:
    return all(pairs[0].keys() == other.keys() and all(torch.equal(tensor, other[key])
                                                       for key, tensor in pairs[0].items()) for other in pairs[1:])


def _factors(parts: Mapping[str, Tensor], shape: tuple[int, ...], scale: float) -> Factors:
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    if len(shape) == 3:
        a = a.view(shape[0], -1, shape[2])
        b = b.view(shape[1], -1, shape[0]).permute(2, 0, 1).contiguous()
    return Factors(a, b, parts.get("lora_magnitude_vector"), scale)


def _stored(factors: Factors) -> dict[str, Tensor]:
    """The inverse of `_factors`."""
    a, b = factors.a, factors.b
    if a.ndim == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    return parts if factors.magnitude is None else {**parts, "lora_magnitude_vector": factors.magnitude}


def _module_of(name: str, names: Iterable[str]) -> str:
    """Our name of the module that PEFT keeps a matrix' pair in."""
    module, _, part = name.rpartition(".")
    if part not in _EXPERTS or not module.endswith(".experts"):
        return name
    nested = part == _EXPERTS[0] and f"{module}.{_EXPERTS[1]}" in names
    return f"{module}.base_layer" if nested else module


def _peft_config(config: AdapterConfig, names: list[str], all_names: list[str], base: str | None) -> dict[str, Any]:
    modules = [name for name in names if ".experts." not in name]
    parameters = [name for name in names if ".experts." in name]
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": config.r, "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout, "use_rslora": config.rslora, "use_dora": config.dora, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": _expression(modules, all_names) if modules else None,
        "target_parameters": parameters or None,
    }


def _expression(names: Iterable[str], all_names: Iterable[str]) -> str:
    """A regular expression of transformers' names of our modules: of the vision tower only those that are named."""
    def by_module(those: Iterable[str]) -> dict[str, list[str]]:
        layers: dict[str, list[str]] = {}
        for name in those:
            if found := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
                layers.setdefault(found[2], []).append(found[1])
        return layers

    names, every = list(names), by_module(all_names)
    by_layers: dict[str, list[str]] = {}
    for module, layers in by_module(names).items():
        which = r"\d+" if layers == every[module] else f"({'|'.join(layers)})"
        by_layers.setdefault(which, []).append(re.escape(module))
    parts = [rf"model\.(decoder|encoder\.language_model)\.layers\.{which}\.({'|'.join(modules)})"
             for which, modules in by_layers.items()]
    parts += [re.escape(place) for name in names if not name.startswith("layers.") for place in pass_names(name)]
    return "|".join(parts)
