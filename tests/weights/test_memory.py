"""Loading takes no more memory than 110 % of the weights in the dtype that was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgemma.config import model_config_from_dict
from dgemma.nn import DiffusionTransformer
from dgemma.weights.load import empty_network
from dgemma.weights.save import save_checkpoint

CONFIG = {
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "text_config": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 128,
        "num_global_key_value_heads": 1, "sliding_window": 32, "num_experts": 64, "top_k_experts": 2,
        "moe_intermediate_size": 256,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

# Runs alone in a process: prints [weights' bytes, peak growth of resident memory] for every dtype.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from dgemma.config import load_model_config
from dgemma.weights.load import load_network

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder = Path(sys.argv[1])
config = load_model_config(folder)
load_network(folder, config)  # whatever is imported or allocated once
assert "torch._dynamo" not in sys.modules, "loading imported torch's compiler, which takes a second"
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    network = load_network(folder, config, dtype=getattr(torch, name))
    touched = sum(float(tensor.sum()) for tensor in network.state_dict().values())  # mapped pages are read, too
    print(json.dumps([sum(t.nbytes for t in network.state_dict().values()), resident("VmHWM") - before]))
    del network
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
def test_peak_memory_is_that_of_the_weights(tmp_path):
    network = empty_network(model_config_from_dict(CONFIG))
    assert isinstance(network, DiffusionTransformer)
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(1.0)
    save_checkpoint(network, tmp_path, CONFIG, {}, torch.bfloat16)
    del network
    source = Path(__file__).parents[2] / "src"
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "bfloat16", "float16", "float32"], capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    measured = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(measured) == 3
    for weights, peak in measured:
        assert weights > 110e6
        assert peak <= 1.1 * weights, measured
