"""Whatever stands in a checkpoint's files, it loads or says in one clear line which file is wrong: never anything else.

A seeded sample of all mutations; `DGEMMA_MUTATIONS=N` tries N of each file (0: all of them).
"""

import contextlib
import copy
import json
import os
import random
import struct
import warnings

import pytest
import torch
from typer.testing import CliRunner

from dgemma.cli.main import app
from dgemma.diffusion.trace import read_trace
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.reader import read_gguf
from dgemma.gguf.tokenizer import tokenizer_metadata
from dgemma.gguf.writer import TensorEntry, header
from dgemma.inspect import inspect_checkpoint
from dgemma.model import read_parts
from dgemma.nn.adapters import AdapterConfig, attach
from dgemma.weights.adapters import read_adapter, save_adapter
from dgemma.weights.gguf_model import load_gguf_network
from dgemma.weights.load import load_network
from dgemma.weights.quantize import convert
from support.gemma_files import config_dict, tokenizer_json, write_checkpoint
from support.mutations import apply, as_json, byte_mutations, field_mutations, in_place_of_a_file, remove

SAMPLE = int(os.environ.get("DGEMMA_MUTATIONS", "30"))
TEXT = dict(vocab_size=320, hidden_size=8, intermediate_size=8, num_hidden_layers=2, head_dim=8, global_head_dim=8,
            layer_types=["sliding_attention", "full_attention"], moe_intermediate_size=8, num_experts=2,
            top_k_experts=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound checkpoint that says as much of itself as one can; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "sound"
    write_checkpoint(folder, **TEXT)
    data = config_dict(**TEXT)
    text = data["text_config"]
    text |= {"per_layer_config": {"01": {"head_dim": 8, "num_key_value_heads": 1}}, "rms_norm_eps": 1e-6,
             "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "final_logit_softcapping": 30.0,
             "use_bidirectional_attention": "vision", "eos_token_id": 1, "rope_parameters": {
                 "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                 "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}
    data |= {"architectures": ["DiffusionGemmaForBlockDiffusion"], "dtype": "bfloat16", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(data))
    roles = {"bos_token": "<bos>", "eos_token": {"content": "<turn|>"},
             "added_tokens_decoder": {"1": {"special": True}},
             "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of the sound checkpoint, small files copied and the weights linked."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            (folder / path.name).hardlink_to(path)
    return folder


def sample(mutations, seed=0):
    mutations = list(mutations)
    return mutations if SAMPLE == 0 or len(mutations) <= SAMPLE else random.Random(seed).sample(mutations, SAMPLE)


def outcome(call, *named):
    """What comes of a call: "" or the message of a CheckpointError, which names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except CheckpointError as error:
        said = str(error)
    else:
        return ""
    assert any(str(name) in said for name in named), said
    assert max(map(len, said.splitlines())) < 700, said
    return said


def use(folder):
    """Everything that reading a checkpoint can mean."""
    report = inspect_checkpoint(folder)
    parts = read_parts(folder)
    load_network(folder, parts.config)
    assert not report.problems
    if parts.tokenizer.has_chat_template:
        with contextlib.suppress(DgemmaError):  # the template refuses
            parts.tokenizer.apply_chat_template("hello <eos>")


def try_all(folder, name, variants, *also):
    """Write every variant in a file's place and use the checkpoint; returns how many were refused.

    An error names the file, or ``also``, or the weights that do not fit what the file says.
    """
    refused = 0
    for what, data in variants:
        remove(folder / name)
        (folder / name).write_bytes(data)
        try:
            refused += bool(outcome(lambda: use(folder), name, "model.safetensors", *also))
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {type(error).__name__}: {error}") from error
    return refused


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_any_field_of_a_json_file(name, broken):
    data = tokenizer_json() if name == "tokenizer.json" else json.loads((broken / name).read_text())
    assert outcome(lambda: use(broken), name) == ""
    refused = try_all(broken, name, ((what, as_json(apply(data, change))) for what, change in
                                     sample(field_mutations(data))))
    assert refused > 3


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_any_bytes_of_a_text_file(name, broken):
    data = (broken / name).read_bytes()
    assert try_all(broken, name, byte_mutations(data, random.Random(1), SAMPLE or 500)) > 3


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja", "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file(name, broken):
    for what, make in in_place_of_a_file(broken / name):
        remove(broken / name)
        make()
        assert outcome(lambda: use(broken), name), what


def test_any_field_of_a_safetensors_header(broken):
    path = broken / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    small = dict(list(head.items())[:4])

    def file_of(text):
        return struct.pack("<Q", len(text)) + text + rest

    changed = ((what, file_of(as_json({**head, **found} if isinstance(found := apply(small, change), dict) else found)))
               for what, change in sample(field_mutations(small)))
    assert try_all(broken, path.name, changed) > 3
    assert try_all(broken, path.name, ((what, file_of(text)) for what, text in byte_mutations(
        data[8 : 8 + length], random.Random(2), SAMPLE or 500))) > 3


def test_any_field_of_an_index(broken):
    path = broken / "model.safetensors.index.json"
    (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    names = json.loads((lambda data: data[8 : 8 + struct.unpack("<Q", data[:8])[0]])(
        (broken / "model-00001-of-00001.safetensors").read_bytes()))
    data = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(
        (name for name in names if name != "__metadata__"), "model-00001-of-00001.safetensors")}
    path.write_bytes(as_json(data))
    assert outcome(lambda: use(broken), path.name) == ""
    assert try_all(broken, path.name, ((what, as_json(apply(data, change))) for what, change in
                                       sample(field_mutations(data))), "missing tensors", "-00001-of-00001") > 3
    assert try_all(broken, path.name, byte_mutations(as_json(data), random.Random(3), SAMPLE or 500),
                   "missing tensors", "-00001-of-00001") > 3


def test_any_field_of_an_adapter(whole, tmp_path):
    parts = read_parts(whole)
    network = load_network(whole, parts.config)
    adapted = copy.deepcopy(network)
    config = AdapterConfig(r=2, alpha=4, targets=("attention", "experts"))
    attach(adapted, config)
    save_adapter(adapted, config, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    data = json.loads(path.read_text())
    data |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4.0}, "layers_to_transform": None,
             "exclude_modules": None, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    path.write_bytes(as_json(data))
    assert outcome(lambda: read_adapter(path.parent, network), path.parent) == ""
    refused = 0
    for what, content in [*((what, as_json(apply(data, change))) for what, change in sample(field_mutations(data))),
                          *byte_mutations(as_json(data), random.Random(4), SAMPLE or 500)]:
        path.write_bytes(content)
        try:
            refused += bool(outcome(lambda: read_adapter(path.parent, network), path.parent))
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > 10
    path.write_bytes(as_json(data))
    weights = path.with_name("adapter_model.safetensors")
    good = weights.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    for what, text in byte_mutations(good[8 : 8 + length], random.Random(5), SAMPLE or 500):
        weights.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
        try:
            outcome(lambda: read_adapter(path.parent, network), path.parent)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def test_any_value_of_a_gguf_key(whole, tmp_path):
    convert(whole, tmp_path / "sound.gguf", "Q8_0")
    sound = read_gguf(tmp_path / "sound.gguf")
    own = tokenizer_metadata(whole, 320)
    metadata = {**sound.metadata, "tokenizer.ggml.token_type": own["tokenizer.ggml.token_type"],
                "diffusion.shift_logits": False, "split.count": 1, "general.alignment": 32,
                "dgemma.eos_token_ids": [1, 6]}
    path = tmp_path / "broken.gguf"
    entries = [TensorEntry(tensor.name, tensor.shape, BLOCK_TYPES[tensor.type_name])
               for tensor in sound.tensors.values()]
    data = (tmp_path / "sound.gguf").read_bytes()[min(tensor.offset for tensor in sound.tensors.values()) :]

    def read():
        report = inspect_checkpoint(path)
        parts = read_parts(path)
        if not report.problems:
            load_gguf_network(parts.gguf, dtype=torch.float32)

    def write(keys):
        path.write_bytes(header(keys, entries) + data)

    write(metadata)
    assert outcome(read, path.name) == ""
    mutations = [(key, value) for key in metadata
                 for value in (*VALUES_OF_GGUF, *elements(metadata[key], VALUES_OF_GGUF))]
    refused = 0
    for key, value in sample(mutations, 6) if SAMPLE else mutations:
        write({**metadata, key: value})
        try:
            refused += bool(outcome(read, path.name))
        except Exception as error:
            raise AssertionError(f"{key} = {value!r:.60}: {type(error).__name__}: {error}") from error
    for key in sample(metadata, 7):
        write({name: value for name, value in metadata.items() if name != key})
        outcome(read, path.name)
    assert refused > 10


VALUES_OF_GGUF = (True, False, 0, 1, 3, -1, 1 << 31, 1 << 63, (1 << 64) - 1, 1.5, 0.0, -1.0, 1e-40, 1e300,
                  float("nan"), float("inf"), "", "x", "5", "{", "\0", "\x1b[31m", "a" * 3000, "{{", [0], [1, 2], ["x"],
                  ["<eos>"], [True, False], [1.5], [-1], list(range(320)), ["a"] * 320, [1 << 40])


def elements(value, values):
    """Lists of the same length with one element changed."""
    if not isinstance(value, list) or not value:
        return
    for other in values:
        if type(other) is type(value[0]) or (isinstance(other, (int, float)) and isinstance(value[0], (int, float))):
            yield [*value[:-1], other]


# Examples that were tracebacks


@pytest.mark.parametrize(("name", "content", "words"), [
    ("config.json", '{"model_type": "diffusion_gemma", "architectures": 5}', "architectures must be a list of names"),
    ("config.json", '{"architectures": 5}', "architectures must be a list of names, got 5"),
    ("config.json", "[" * 100_000, "nested more than"),
    ("config.json", '{"a":' * 100_000, "nested more than"),
    ("config.json", '{"model_type": "diffusion_gemma", "model_type": "llama"}', "'model_type' is there twice"),
    ("config.json", "", "it is empty"),
    ("generation_config.json", "[" * 100_000, "nested more than"),
    ("generation_config.json", '{"max_new_tokens": true}', "max_new_tokens"),
    ("generation_config.json", '{"sampler_config": {"entropy_bound": NaN}}', "sampler_config.entropy_bound"),
    ("tokenizer_config.json", "[" * 100_000, "nested more than"),
    ("tokenizer_config.json", '{"eos_token": 1}', "eos_token must be text"),
    ("tokenizer_config.json", "\ufeff[]", "expected a JSON object, found list"),
    ("tokenizer.json", "[" * 100_000, "cannot be read as a tokenizer"),
    ("tokenizer.json", "", "cannot be read as a tokenizer"),
])
def test_file_and_field_are_named_on_one_line_of_every_command(name, content, words, broken):
    (broken / name).write_text(content)
    for command in (["run", "-m", str(broken), "hi"], ["inspect", str(broken)],
                    ["quantize", str(broken), str(broken / "out.gguf")]):
        if command[0] == "quantize" and words == "eos_token must be text":
            continue
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1, command
        said = str(result.exception) if isinstance(result.exception, CheckpointError) else result.output
        assert f"{broken / name}" in said.replace("\n", "") and words in said.replace("\n", ""), (command, said)
        assert result.exception is None or isinstance(result.exception, (CheckpointError, SystemExit)), command


@pytest.mark.parametrize("value", [5, "x", {"a": 1}])
def test_tokens_of_another_type_in_a_gguf_file(value, whole, tmp_path):
    convert(whole, tmp_path / "sound.gguf", "BF16")
    sound = read_gguf(tmp_path / "sound.gguf")
    value = [1, 2] if isinstance(value, dict) else value
    (tmp_path / "broken.gguf").write_bytes(header({**sound.metadata, "tokenizer.ggml.tokens": value}, []))
    with pytest.raises(CheckpointError, match=r"broken\.gguf: tokenizer\.ggml\.tokens is missing or no list of texts"):
        read_parts(tmp_path / "broken.gguf")


def test_a_byte_order_mark_is_no_mistake(broken):
    for name in (*FILES, "chat_template.jinja"):
        (broken / name).write_bytes(b"\xef\xbb\xbf" + (broken / name).read_bytes())
    assert outcome(lambda: use(broken), broken) == ""


def test_any_bytes_of_a_trace(tmp_path):
    good = (b'{"format":"dgemma-trace","version":1,"model":"m","created":"c","prompt":"p"}\n'
            b'{"event":"finished","request":0}\n')
    path = tmp_path / "a.trace"
    for _, content in byte_mutations(good, random.Random(8), SAMPLE or 500):
        path.write_bytes(content)
        with contextlib.suppress(DgemmaError):
            read_trace(path)
