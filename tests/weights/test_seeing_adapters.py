"""Adapters on the vision tower: in PEFT's format both ways, and merged into a checkpoint."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dgemma
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.model import read_parts, seeing
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, adapters, attach
from dgemma.weights.adapters import adapts_tower, load_adapter, save_adapter
from dgemma.weights.load import load_network
from dgemma.weights.merge import merge_to_folder, merge_to_gguf
from dgemma.weights.quantize import convert
from support.seeing import save_pupil

PICTURE = torch.rand(6, 9, 768, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pupil(tmp_path_factory.mktemp("pupil"))


@pytest.fixture
def network(folder):
    """The network with its tower in it."""
    parts = read_parts(folder)
    network = load_network(folder, parts.config)
    network.vision = seeing(parts)[1].load(torch.device("cpu"), None)
    return network


@torch.no_grad()
def stir(parameters):
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def adapter(network, tmp_path):
    """A folder with an adapter of the network's, which does something."""
    config = AdapterConfig(r=2, targets=("attention", "vision"))
    attach(network, config)
    stir(adapter_parameters(network).values())
    save_adapter(network, config, tmp_path / "adapter")
    return tmp_path / "adapter"


def seen(vision):
    with torch.no_grad():
        return vision([PICTURE])[0]


def reference(folder):
    from transformers import DiffusionGemmaForBlockDiffusion

    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()


def seen_by(theirs):
    """What transformers' tower and embedder make of the picture."""
    y, x = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    positions = torch.stack([x, y], dim=-1).flatten(0, 1)[None]
    encoder = next(module for name, module in theirs.named_modules() if name.endswith("model.encoder"))
    with torch.no_grad():
        return encoder.embed_vision(encoder.vision_tower(PICTURE.flatten(0, 1)[None], positions).last_hidden_state)


def test_peft_sees_by_what_we_write(folder, network, adapter):
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(reference(folder), adapter).eval()
    torch.testing.assert_close(seen(network.vision), seen_by(theirs).view(6, -1), atol=1e-4, rtol=0)
    assert (seen_by(reference(folder)).view(6, -1) - seen(network.vision)).abs().max() > 1e-2


def test_we_see_by_what_peft_writes(folder, network, tmp_path):
    peft = pytest.importorskip("peft")
    tower = r"model\.encoder\.(vision_tower\..*self_attn\.[qv]_proj\.linear|embed_vision\.embedding_projection)"
    theirs = peft.get_peft_model(reference(folder), peft.LoraConfig(r=3, lora_alpha=6, target_modules=tower)).eval()
    stir(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path)
    load_adapter(network, tmp_path)
    assert {name.rpartition(".")[2] for name in adapters(network)} == {"linear", "embedding_projection"}
    torch.testing.assert_close(seen(network.vision), seen_by(theirs).view(6, -1), atol=1e-4, rtol=0)


def test_it_is_merged_into_a_checkpoint(folder, network, adapter, tmp_path):
    assert adapts_tower(adapter)
    merge_to_folder(folder, adapter, tmp_path / "merged")
    merged = dgemma.load(tmp_path / "merged").pictures.load()
    torch.testing.assert_close(seen(merged), seen(network.vision), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_it_is_merged_into_the_tower_beside_a_gguf_file(folder, network, tmp_path, kind, dora):
    targets = ("attention", "vision", "vision_tower.patch_embedder.input_proj")  # whose rows lie in another order there
    attach(network, config := AdapterConfig(r=2, targets=targets, dora=dora))
    stir(adapter_parameters(network).values())
    save_adapter(network, config, tmp_path / "adapter")
    source = folder
    if kind == "gguf":
        source = tmp_path / "source.gguf"
        convert(folder, source, "BF16", tower="F32")
    summary = merge_to_gguf(source, tmp_path / "adapter", tmp_path / "merged.gguf", "BF16", tower="F32")
    assert summary.tower == tmp_path / "mmproj-merged.gguf"
    merged = dgemma.load(tmp_path / "merged.gguf").pictures.load()
    torch.testing.assert_close(seen(merged), seen(network.vision), atol=1e-4, rtol=0)
    assert (seen(dgemma.load(folder).pictures.load()) - seen(merged)).abs().max() > 1e-2


def test_a_tower_to_change_must_be_there_and_stays_where_it_is(folder, adapter, tmp_path):
    convert(folder, tmp_path / "source.gguf", "BF16")
    tower = tmp_path / "mmproj-source.gguf"
    tower.rename(tmp_path / "mmproj-merged.gguf")
    with pytest.raises(DgemmaError, match="mmproj-merged.gguf: this is the source's own vision tower"):
        merge_to_gguf(tmp_path / "source.gguf", adapter, tmp_path / "merged.gguf", force=True)
    (tmp_path / "mmproj-merged.gguf").unlink()
    with pytest.raises(CheckpointError, match="the adapter changes the vision tower, too, and no mmproj file beside"):
        merge_to_gguf(tmp_path / "source.gguf", adapter, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


def test_a_checkpoint_without_its_tower_takes_no_merge_into_it(folder, adapter, tmp_path):
    shutil.copytree(folder, tmp_path / "blind")
    path = tmp_path / "blind" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "vision" not in name}
    save_file(tensors, path, {"format": "pt"})
    for merge, out in ((merge_to_folder, "merged"), (merge_to_gguf, "merged.gguf")):
        with pytest.raises(CheckpointError, match="the vision tower is not in this checkpoint"):
            merge(tmp_path / "blind", adapter, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_network_without_its_tower_cannot_take_it(folder, adapter):
    with pytest.raises(CheckpointError, match="changes the vision tower, too, which is not there"):
        load_adapter(dgemma.load(folder).network, adapter)


def test_one_without_the_tower_s_matrices_does_not_bring_the_tower(folder, network, tmp_path):
    plain = copy.deepcopy(network)
    attach(plain, config := AdapterConfig(r=2, targets=("attention",)))
    save_adapter(plain, config, tmp_path)
    assert not adapts_tower(tmp_path)
    model = dgemma.load(folder, adapter=tmp_path)
    assert model.network.vision is None and model.pictures.vision is None
