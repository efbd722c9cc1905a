from collections import Counter

import numpy as np
import pytest
import random_gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize
from random_gguf import Shape, tensor_specs, write


def test_the_full_shape_has_the_real_files_tensors_and_types():
    specs = tensor_specs(Shape())
    counts = Counter(spec.type for spec in specs)
    assert counts == {Type.F32: 423, Type.Q4_K: 194, Type.Q6_K: 14, Type.Q5_0: 33, Type.Q8_0: 28}
    assert len(specs) == len({spec.name for spec in specs}) == 692
    assert 16.7e9 < sum(spec.nbytes for spec in specs) < 16.9e9
    by_name = {spec.name: spec for spec in specs}
    assert by_name["token_embd.weight"].type == Type.Q6_K
    assert by_name["self_cond_down.weight"].type == Type.Q5_0
    assert "blk.5.attn_v.weight" not in by_name
    assert by_name["blk.0.ffn_gate_up_exps.weight"].shape == (128, 1408, 2816)
    assert by_name["blk.0.ffn_down_exps.weight"].shape == (128, 2816, 704)
    assert 26.7e9 < sum(spec.nbytes for spec in tensor_specs(Shape(), "q8_0")) < 27e9


def test_a_reader_finds_every_tensor_with_a_healthy_spread(small_file, small_shape):
    tensors = {tensor.name: tensor for tensor in GGUFReader(small_file).tensors}
    specs = tensor_specs(small_shape)
    assert list(tensors) == [spec.name for spec in specs]
    assert {spec.type for spec in specs} == {Type.F32, Type.Q4_K, Type.Q6_K, Type.Q5_0, Type.Q8_0}
    for spec in specs:
        tensor = tensors[spec.name]
        assert tensor.tensor_type == spec.type
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        values = dequantize(tensor.data, spec.type).reshape(spec.shape)
        assert np.isfinite(values).all()
        if spec.values is None:
            assert values.std() == pytest.approx(spec.shape[-1] ** -0.5, rel=0.15), spec.name
            assert abs(values.mean()) < 0.1 * values.std(), spec.name
    assert (dequantize(tensors["blk.0.layer_output_scale.weight"].data, Type.F32) == np.float32(0.7)).all()
    experts = dequantize(tensors["blk.0.ffn_gate_up_exps.weight"].data, Type.Q4_K)
    rows = experts.reshape(-1, small_shape.hidden)
    assert len(np.unique(rows, axis=0)) == len(rows)  # the pool's repeats do not line up with rows


def test_the_file_describes_itself(small_file, small_shape):
    fields = GGUFReader(small_file).fields
    value = lambda name: fields[name].contents()  # noqa: E731
    assert value("general.architecture") == "diffusion-gemma"
    assert value("general.file_type") == 15
    assert value("diffusion-gemma.attention.head_count_kv") == [2, 2, 1]
    assert value("diffusion-gemma.attention.sliding_window_pattern") == [True, True, False]
    assert value("diffusion-gemma.attention.causal") is False
    assert value("diffusion.canvas_length") == 32
    assert value("tokenizer.ggml.model") == "gemma4"
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == len(set(tokens)) == small_shape.vocab == len(value("tokenizer.ggml.token_type"))
    assert [tokens[i] for i in (0, 1, 2, 3, 50, 105, 106)] == [
        "<pad>", "<eos>", "<bos>", "<unk>", "<|tool_response>", "<|turn>", "<turn|>"]
    for merge in value("tokenizer.ggml.merges"):
        left, right = merge.split(" ")
        assert left in tokens and right in tokens and left + right in tokens


def test_the_full_vocabulary_has_the_real_ones_size():
    tokens, types, merges = random_gguf.vocabulary(262_144)
    assert len(tokens) == len(set(tokens)) == len(types) == 262_144
    assert len(merges) > 250_000
    with pytest.raises(ValueError, match="tokens at least"):
        random_gguf.vocabulary(300)


def test_dgemma_reads_configuration_and_tokenizer(small_file, small_shape):
    gguf_model = pytest.importorskip("dgemma.weights.gguf_model")
    from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
    from dgemma.gguf.reader import read_gguf

    model = gguf_model.open_gguf(small_file)
    assert model.config.num_hidden_layers == 3
    assert model.config.canvas_length == 32
    assert [layer.head_dim for layer in model.config.layers] == [64, 64, 128]
    assert model.config.layers[2].rotary_fraction == 0.25
    tokenizer = tokenizer_from_gguf(read_gguf(small_file).metadata, "the file")
    assert len(tokenizer.encode("31415926")) == 8
    prompt = tokenizer.apply_chat_template("31415926")
    assert prompt[:2] == [2, 105] and 106 in prompt
    assert tokenizer.decode(tokenizer.encode("ab cd\n<X>")) == "ab cd\n<X>"


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(small_file, small_shape, tmp_path):
    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    write(again, shape=small_shape)
    write(other, shape=small_shape, seed=1)
    assert again.read_bytes() == small_file.read_bytes()
    assert other.read_bytes() != small_file.read_bytes()


def test_an_interrupted_write_leaves_what_was_there(small_shape, tmp_path):
    path = tmp_path / "kept.gguf"
    path.write_text("before")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, shape=small_shape, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.gguf"]
    assert path.read_text() == "before"
    with pytest.raises(ValueError, match="mix must be"):
        write(path, shape=small_shape, mix="q3")
