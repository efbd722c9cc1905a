"""The tensors of a Hugging Face DiffusionGemma checkpoint and the names they have in our network.

Text weights stand once, under ``model.decoder.*``; the encoder has only its layer scalars (and the vision tower)
of its own. A file may carry the other name of a tied tensor too. The tower's names are those of `dgemma.nn.vision`.
"""

from __future__ import annotations

import re

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."
_ENCODER_SCALAR = re.compile(r"model\.encoder\.language_model\.layers\.(\d+)\.layer_scalar")
_ENCODER_SCALAR_OURS = re.compile(r"layers\.(\d+)\.encoder_layer_scalar")
_ABOVE_VISION = "model.encoder."
_VISION = (_ABOVE_VISION + "vision_tower.", _ABOVE_VISION + "embed_vision.")
_TOWER = "vision."
_STRAY = _ABOVE_VISION + "embed_vision.embedding."  # in some checkpoints; nothing reads it


def network_name(checkpoint_name: str) -> str | None:
    """Our name for a checkpoint's tensor; None when it is not one of the text network's."""
    scalar = _ENCODER_SCALAR.fullmatch(checkpoint_name)
    if scalar:
        return f"layers.{scalar[1]}.encoder_layer_scalar"
    if checkpoint_name == "lm_head.weight":
        return "embed_tokens.weight"
    for prefix in (_DECODER, _ENCODER):
        if checkpoint_name.startswith(prefix):
            return checkpoint_name[len(prefix) :]
    return None


def is_tied_copy(checkpoint_name: str) -> bool:
    """Whether this is the other name of a tensor that stands under ``model.decoder.*``."""
    if checkpoint_name == "lm_head.weight":
        return True
    return checkpoint_name.startswith(_ENCODER) and not _ENCODER_SCALAR.fullmatch(checkpoint_name)


def is_vision(checkpoint_name: str) -> bool:
    """Whether the tensor belongs to the vision tower or its projection."""
    return checkpoint_name.startswith(_VISION)


def vision_name(checkpoint_name: str) -> str | None:
    """Our name, within `dgemma.nn.vision.Vision`, for a checkpoint's tensor; None when it is not one of the tower's."""
    used = is_vision(checkpoint_name) and not checkpoint_name.startswith(_STRAY)
    return checkpoint_name[len(_ABOVE_VISION) :] if used else None


def vision_checkpoint_name(vision_name: str) -> str:
    """The inverse of `vision_name`."""
    return _ABOVE_VISION + vision_name


def trained_name(checkpoint_name: str) -> str | None:
    """`network_name`, or the name that a tensor of the tower has in a network that holds it (`network.vision`)."""
    seeing = vision_name(checkpoint_name)
    return network_name(checkpoint_name) if seeing is None else f"{_TOWER}{seeing}"


def within_vision(network_name: str) -> str | None:
    """The name within `dgemma.nn.vision.Vision` of what a network that holds its tower calls so; None for the text
    network's."""
    return network_name.removeprefix(_TOWER) if network_name.startswith(_TOWER) else None


def pass_names(network_name: str) -> tuple[str, ...]:
    """Where `transformers` has a module or matrix of ours: in the decoder, and in the encoder if that has it, too; the
    tower's only there."""
    if seen := within_vision(network_name):
        return (vision_checkpoint_name(seen),)
    shared = network_name.startswith("layers.")
    return (_DECODER + network_name, _ENCODER + network_name) if shared else (_DECODER + network_name,)


def checkpoint_name(network_name: str) -> str:
    """The inverse of `trained_name`: where a tensor of ours stands in a checkpoint."""
    if seen := within_vision(network_name):
        return vision_checkpoint_name(seen)
    scalar = _ENCODER_SCALAR_OURS.fullmatch(network_name)
    if scalar:
        return f"{_ENCODER}layers.{scalar[1]}.layer_scalar"
    return _DECODER + network_name
