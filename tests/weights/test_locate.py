"""Names, folders and files to checkpoints; what the hub has to do with it is in test_hub.py."""

from pathlib import Path

import pytest

from dgemma.errors import CheckpointError
from dgemma.weights.files import bundled_models, find_tagged, gguf_models, hub_name, tag_of, weight_files
from dgemma.weights.hub.locate import locate

pytestmark = pytest.mark.usefixtures("bundled")


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder with files of these names."""
    def make(*names):
        path = tmp_path / "folder"
        path.mkdir(exist_ok=True)
        for name in names:
            (path / name).write_bytes(b"GGUF\3\0\0\0" if name.endswith(".gguf") else b"{}")
        return path

    return make


def refusal(name):
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return str(caught.value)


def test_bundled_names(bundled):
    assert bundled_models() == ["chess", "sudoku"]
    assert locate("sudoku") == bundled / "sudoku"


def test_a_bundled_name_wins_over_a_folder_but_not_over_a_path(bundled, tmp_path, working_folder):
    (tmp_path / "sudoku").mkdir()
    working_folder(tmp_path)
    assert locate("sudoku") == bundled / "sudoku"
    assert locate("./sudoku").resolve() == tmp_path / "sudoku"
    assert locate(Path("sudoku")).resolve() == tmp_path / "sudoku"


def test_folders(tmp_path, working_folder, environment):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate(tmp_path / "org") == tmp_path / "org"
    working_folder(tmp_path)
    assert locate("org/name") == Path("org/name")  # before the hub
    environment(HOME=str(tmp_path))
    assert locate("~/org") == tmp_path / "org"


def test_unknown_names_list_what_is_bundled(tmp_path):
    message = refusal("sudoko")
    assert message.startswith("sudoko: no such file or folder, and no bundled model")
    assert "chess, sudoku" in message
    assert "org/name:Q4_K_M" in message


@pytest.mark.parametrize("name", ["./org/name", "a/b/c", "/nowhere/at/all", "~/nothing", "../nothing",
                                  Path("org/name"), Path("org/name:Q4_K_M")])
def test_what_looks_like_a_path_is_never_a_hub_id(name):
    assert refusal(name) == f"{name}: no such file or folder"


@pytest.mark.parametrize("name", ["x.gguf", "org/x.gguf", "./a/x.GGUF", Path("x.gguf")])
def test_a_gguf_file_that_is_not_there(name):
    assert refusal(name) == f"{Path(name)}: no such file"


def test_no_name_is_not_the_present_folder(folder, working_folder):
    working_folder(folder("config.json", "model.safetensors"))
    for name in ("", "  "):
        assert refusal(name) == "the model's name is empty"
    assert locate(".") == Path()


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "x" * 300, "~nobody-of-that-name/model", "a\0b"])
def test_names_that_can_be_no_folder(name):
    message = refusal(name)
    assert "\n" not in message
    assert message.startswith(name[:80])


@pytest.mark.parametrize(("name", "parts"), [
    ("org/name", ("org/name", None)),
    ("org/na.me-1:Q4_K_M", ("org/na.me-1", "Q4_K_M")),
    ("org/name:BF16/a-00001-of-00002.gguf", ("org/name", "BF16/a-00001-of-00002.gguf")),
    ("name", None), ("org/name:", None), ("org/name:a b", None), ("C:/models/x.gguf", None), ("a/b/c:Q4_0", None),
])
def test_names_on_the_hub(name, parts):
    assert hub_name(name) == parts


def test_a_gguf_file(folder):
    path = folder("x.gguf", "Y.GGUF", "config.json")
    (path / "renamed.bin").write_bytes(b"GGUF\3\0\0\0")
    for name in ("x.gguf", "Y.GGUF", "renamed.bin"):
        assert locate(path / name) == path / name
        assert locate(str(path / name)) == path / name
    assert "not a GGUF file; for safetensors give the folder" in refusal(path / "config.json")


def test_a_folder_with_one_gguf_file(folder):
    path = folder("x-Q4_K_M.gguf", "mmproj-F16.gguf", "imatrix.gguf", "README.md")
    assert locate(path) == path / "x-Q4_K_M.gguf"
    folder("config.json")  # some GGUF repositories have one, too
    assert locate(path) == path / "x-Q4_K_M.gguf"
    folder("model.safetensors")
    assert locate(path) == path  # the GGUF file lies beside a checkpoint


def test_a_folder_with_several_gguf_files_lists_them(folder):
    path = folder("x-Q4_K_M.gguf", "x-Q8_0.gguf", "x-BF16-00001-of-00002.gguf", "x-BF16-00002-of-00002.gguf")
    message = refusal(path)
    assert message.startswith(f"{path}: 3 GGUF models here; name one of them:")
    assert [line.strip() for line in message.splitlines()[1:]] == [
        str(path / name) for name in ("x-BF16-00001-of-00002.gguf", "x-Q4_K_M.gguf", "x-Q8_0.gguf")]


def test_split_files(folder):
    names = [f"x-00{part}-of-00003.gguf".replace("00", "0000", 1) for part in (1, 2, 3)]
    assert names[0] == "x-00001-of-00003.gguf"
    path = folder(*names)
    assert locate(path) == path / names[0]
    for name in names:
        assert locate(path / name) == path / names[0]
    folder("x-00001-of-00002.gguf")  # half of another one does not matter
    assert locate(path / names[2]) == path / names[0]


@pytest.mark.parametrize("absent", [1, 2, 3])
def test_a_part_that_is_missing(folder, absent):
    parts = {1, 2, 3} - {absent}
    path = folder(*(f"x-0000{part}-of-00003.gguf" for part in parts))
    for name in (path, path / f"x-0000{max(parts)}-of-00003.gguf"):
        message = refusal(name)
        assert "split into 3 parts, and 1 of them is not beside it: " in message
        assert message.endswith(f"x-0000{absent}-of-00003.gguf")


@pytest.mark.parametrize(("name", "tag"), [
    ("diffusiongemma-26B-A4B-it-Q4_K_M.gguf", "Q4_K_M"),
    ("diffusiongemma-26B-A4B-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
    ("model.q8_0.gguf", "Q8_0"),
    ("a_IQ3_XXS.gguf", "IQ3_XXS"),
    ("BF16/a-BF16-00001-of-00002.gguf", "BF16"),
    ("BF16/a-00001-of-00002.gguf", "BF16"),
    ("a-MXFP4_MOE.gguf", "MXFP4_MOE"), ("m-NVFP4.gguf", "NVFP4"), ("a-NVFP4_MOE.gguf", "NVFP4_MOE"),
    ("diffusiongemma-26B-A4B-it.gguf", "diffusiongemma-26B-A4B-it"),
])
def test_the_quantisation_in_a_name(name, tag):
    [model] = gguf_models([name])
    assert model.tag == tag
    assert model.complete == ("-of-" not in name)


def test_tags():
    models = gguf_models(["a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-UD-Q2_K_XL.gguf", "BF16/a-BF16.gguf", "a-F16.gguf"])

    def found(tag, **options):
        return [model.files[0] for model in find_tagged(models, tag, **options)]

    assert found("q4_k_m") == ["a-Q4_K_M.gguf"]
    assert found("Q4_K") == ["a-Q4_K_M.gguf", "a-Q4_K_S.gguf"]
    assert found("Q4_K", loose=False) == []
    assert found("Q2_K_XL") == ["a-UD-Q2_K_XL.gguf"]
    assert found("F16") == ["a-F16.gguf"]  # not BF16, which has it in its name
    assert found("a-bf16.gguf") == found("BF16/a-BF16.gguf") == ["BF16/a-BF16.gguf"]
    assert [tag_of(model, models) for model in models] == ["BF16", "F16", "Q4_K_M", "Q4_K_S", "UD-Q2_K_XL"]
    twice = gguf_models(["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"])
    assert [tag_of(model, twice) for model in twice] == ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]


def test_weight_files(folder):
    path = folder("x-Q4_K_M.gguf")
    for name, words in ((path / "nowhere", "no such folder"), (path / "x-Q4_K_M.gguf", "this is a file"),
                        (path, "neither model.safetensors nor model.safetensors.index.json; found x-Q4_K_M.gguf")):
        with pytest.raises(CheckpointError, match=words):
            weight_files(name)
