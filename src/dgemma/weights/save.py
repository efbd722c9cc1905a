"""Writing a network as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from dgemma.nn import DiffusionTransformer
from dgemma.weights.names import checkpoint_name


def save_checkpoint(network: DiffusionTransformer, folder: Path, config: dict[str, Any],
                    generation_config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model.safetensors, config.json and generation_config.json into ``folder``.

    ``config`` is the whole ``config.json``. Each file is written beside its place and then renamed.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(name): tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in network.state_dict().items()}
    beside = folder / f"model.safetensors.{os.getpid()}.tmp"
    try:
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(folder / "model.safetensors")
    finally:
        beside.unlink(missing_ok=True)
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    for name, data in (("config.json", config), ("generation_config.json", generation_config)):
        part = folder / f"{name}.{os.getpid()}.tmp"
        part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / name)
