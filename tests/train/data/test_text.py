"""Examples from plain text: what stands before and what follows, from texts that are kept apart."""

import pytest

from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.model import load
from dgemma.train.data.text import TextSource, read_texts
from support.gemma_files import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load("sudoku").tokenizer


def source(tokenizer, **others):
    return TextSource([b"0123456789" * 40, b"abcdefghij" * 40], [b"ABCDEFGHIJ" * 40], tokenizer,
                      **{"canvas_length": 8, "batch_size": 5, "seed": 0, "context": (3, 6), **others})


def test_a_canvas_is_what_follows_on_its_context(tokenizer):
    everything = "0123456789" * 40 + "<eos>" + "abcdefghij" * 40 + "<eos>"
    lengths = set()
    for step in range(40):
        examples = source(tokenizer).batch(step)
        assert len(examples) == 5
        assert len({example.context_length for example in examples}) == 1
        lengths.add(examples[0].context_length)
        for example in examples:
            assert example.context_ids[0] == tokenizer.bos_id
            assert tokenizer.decode([*example.context_ids[1:], *example.canvas_ids]) in everything
            assert example.weights == [1.0] * 8
            assert example.real_length == 8
    assert lengths == {4, 5, 6, 7}


def test_texts_are_parted_by_the_end_of_text_whatever_the_turn_ends_with(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<turn|>"}')
    gemma = Tokenizer.from_folder(tmp_path)
    made = TextSource([b"abcd", b"abcd"] * 20, [b"abcd"] * 20, gemma, canvas_length=30, batch_size=5, seed=0,
                      context=(3, 6))
    seen = {gemma.id_to_token(token) for example in made.batch(0) for token in example.canvas_ids}
    assert "<eos>" in seen and "<turn|>" not in seen
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(DgemmaError, match="has no <bos> token"):
        source(Tokenizer.from_folder(tmp_path))


def test_a_step_is_always_the_same_and_another_one_is_not(tokenizer):
    assert source(tokenizer).batch(3) == source(tokenizer).batch(3)
    assert source(tokenizer).batch(3) != source(tokenizer).batch(4)
    assert source(tokenizer, seed=1).batch(3) != source(tokenizer).batch(3)


def test_validation_is_on_texts_of_its_own(tokenizer):
    kept = source(tokenizer).held_out(7)
    assert len(kept) == 7
    assert all(set(tokenizer.decode(example.canvas_ids)) <= set("ABCDEFGHIJ") for example in kept)
    assert kept == source(tokenizer).held_out(7)


def test_texts_that_spell_a_special_token_stay_text(tokenizer):
    made = TextSource([b"<bos>" * 20], [b"<bos>" * 20], tokenizer, 8, 1, 0, (3, 3))
    assert tokenizer.bos_id not in made.batch(0)[0].canvas_ids


def test_pythons_own_library_is_there_and_every_twentieth_file_kept_apart():
    train, kept = read_texts(["python"])
    assert len(train) > 200
    assert len(kept) == -(-(len(train) + len(kept)) // 20)
    assert not set(train) & set(kept)


def test_files_and_folders_are_read_in_order(tmp_path):
    for name in ("b.py", "a.py", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read_texts([str(tmp_path)]) == ([b"b.py"], [b"a.py"])
    assert read_texts([str(tmp_path), str(tmp_path / "c.txt")])[0] == [b"b.py", b"c.txt"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"nothing\.py: cannot be read"):
        read_texts([str(tmp_path / "nothing.py")])
    with pytest.raises(DgemmaError, match="at least two files"):
        read_texts([str(tmp_path)])


def test_too_little_text_and_a_wrong_context_are_errors(tokenizer):
    with pytest.raises(DgemmaError, match="has no room for a context of 6"):
        TextSource([b"short"], [b"short"], tokenizer, 8, 1, 0, (3, 6))
    with pytest.raises(DgemmaError, match="the smaller first"):
        source(tokenizer, context=(6, 3))


def found(texts):
    train, kept = texts
    return sorted([*train, *kept])


@pytest.mark.parametrize("folder", ["test", "tests/deep", "site-packages/own", "above/dist-packages"])
def test_no_file_of_the_users_is_left_out_whatever_its_folder_is_called(tmp_path, folder):
    """As a folder below the one that is named, and as one above it."""
    place = tmp_path / folder
    place.mkdir(parents=True)
    (tmp_path / "a.py").write_bytes(b"first")
    for name in ("b.py", "c.py"):
        (place / name).write_bytes(name.encode())
    assert found(read_texts([str(tmp_path)])) == [b"b.py", b"c.py", b"first"]
    assert found(read_texts([str(place)])) == [b"b.py", b"c.py"]


def test_pythons_library_is_complete_wherever_it_is_installed_but_without_its_tests(tmp_path, monkeypatch):
    library = tmp_path / "tests" / "lib"
    for name in ("os.py", "json/decoder.py", "test/test_os.py", "idlelib/idle_test/a.py", "site-packages/numpy.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    assert found(read_texts(["python"])) == [b"json/decoder.py", b"os.py"]


def test_a_folder_with_a_files_name_is_no_file(tmp_path):
    (tmp_path / "package.py").mkdir()
    for name in ("a.py", "package.py/b.py"):
        (tmp_path / name).write_text(name)
    assert found(read_texts([str(tmp_path)])) == [b"a.py", b"package.py/b.py"]
