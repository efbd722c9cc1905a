"""llama.cpp as an oracle: it knows no `diffusion-gemma`, but our encoder is what it calls `gemma4`.

As a program (in a process of its own, for a second server in one process finds its threads taken):

    python llamacpp.py FILE.gguf '[[1, 2, 3], …]'  ->  for each prompt the log-probabilities of the token after it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def relabelled(source: Path, out: Path, as_type: str | None = None) -> Path:
    """A copy of one of our GGUF files as `gemma4`, written by the `gguf` package.

    What belongs to diffusion goes, and the prompt's layer scales take the canvas's place. ``as_type`` unpacks every
    matrix into F32 or F16.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "gemma4")
    for key, field in reader.fields.items():
        if key.startswith("diffusion-gemma.") and not key.endswith(".attention.causal"):
            key = key.replace("diffusion-gemma.", "gemma4.")
        elif not key.startswith("tokenizer."):
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    writer.add_uint32("gemma4.attention.shared_kv_layers", 0)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
    plain = {None: None, "F32": np.float32, "F16": np.float16}[as_type]
    for tensor in reader.tensors:
        name = tensor.name
        if name.startswith("self_cond_") or name.endswith(".layer_output_scale.weight"):
            continue
        name = name.replace("enc_layer_output_scale", "layer_output_scale")
        if plain is None or tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            writer.add_tensor(name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(plain))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def log_probabilities(path: Path, prompts: list[list[int]]) -> list[list[float]]:
    """For each prompt llama.cpp's log-probabilities of the token after it, by token id."""
    ran = subprocess.run([sys.executable, __file__, str(path), json.dumps(prompts)], capture_output=True, text=True,
                         timeout=120)
    if ran.returncode:
        raise RuntimeError(f"llama.cpp ended with {ran.returncode}: {ran.stderr[-3000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _serve(path: str, prompts: list[list[int]]) -> list[list[float]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel, params.warmup = 512, 512, 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        answer: dict[str, Any] = server.handle_completions(
            {"prompt": prompt, "n_predict": 1, "logprobs": 100_000, "cache_prompt": False, "temperature": 0.0,
             # Of an answer that is half a character or an end there are no probabilities. These are before the bias.
             "logit_bias": [["a", 1000.0]]})
        first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append([entry["logprob"] for entry in sorted(first, key=lambda entry: entry["id"])])
    return found


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # a server takes its time to shut down
