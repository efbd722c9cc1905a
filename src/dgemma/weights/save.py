"""Writing a network as a Hugging Face checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, json_bytes, make_folder
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import adapters
from dgemma.weights.hub.locate import INDEX_FILE, SINGLE_FILE
from dgemma.weights.names import checkpoint_name


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors beside a file's place and then rename; raises DgemmaError when they cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as beside:
        try:
            save_file(tensors, beside, metadata=metadata)
        except SafetensorError as error:  # a full disk is one, too
            raise DgemmaError(f"{path}: cannot be written ({error})") from error


def save_checkpoint(network: DiffusionTransformer, folder: Path, config: dict[str, Any],
                    generation_config: dict[str, Any], dtype: torch.dtype = torch.bfloat16,
                    state: Mapping[str, Tensor] | None = None) -> None:
    """Write model.safetensors, config.json and generation_config.json into ``folder``.

    ``config`` is the whole ``config.json``; ``state`` the network's tensors by name, None: its ``state_dict()``. Each
    file is written beside its place and then renamed, the weights first. An index that is there is taken away: it
    speaks of other files. Raises DgemmaError when one cannot be written, and for a network with an adapter.
    """
    if adapters(network):
        raise DgemmaError(f"{folder}: a checkpoint has no place for an adapter: merge it into the network, or save "
                          "it by itself")
    make_folder(folder)
    tensors = {checkpoint_name(name): tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in (network.state_dict() if state is None else state).items()}
    write_safetensors(folder / SINGLE_FILE, tensors, {"format": "pt"})
    (folder / INDEX_FILE).unlink(missing_ok=True)
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    for name, data in (("config.json", config), ("generation_config.json", generation_config)):
        with atomic_write(folder / name) as beside:
            beside.write_bytes(json_bytes(data, indent=2) + b"\n")
