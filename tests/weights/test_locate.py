"""Names, folders and hub ids to checkpoint folders."""

import sys
from pathlib import Path

import pytest

import dgemma.weights.locate as locate_module
from dgemma.errors import CheckpointError
from dgemma.weights.locate import bundled_models, locate


@pytest.fixture(autouse=True)
def bundled(tmp_path, monkeypatch):
    """Two bundled models, and a folder that is none."""
    for name in ("sudoku", "chess"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    (tmp_path / "models" / "__pycache__").mkdir()
    monkeypatch.setattr(locate_module, "_BUNDLED", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def hub(monkeypatch):
    """The hub, as a function that a test puts in place of snapshot_download; it lists the calls."""
    import huggingface_hub

    calls = []

    def install(answer):
        def snapshot_download(repo, **options):
            calls.append((repo, bool(options.get("local_files_only"))))
            assert "*.safetensors" in options["allow_patterns"]
            return answer(bool(options.get("local_files_only")))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return install


def refusal(name):
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return str(caught.value)


def test_bundled_names(bundled):
    assert bundled_models() == ["chess", "sudoku"]
    assert locate("sudoku") == bundled / "sudoku"


def test_a_bundled_name_wins_over_a_folder_but_not_over_a_path(bundled, tmp_path, monkeypatch):
    (tmp_path / "sudoku").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("sudoku") == bundled / "sudoku"
    assert locate("./sudoku").resolve() == tmp_path / "sudoku"
    assert locate(Path("sudoku")).resolve() == tmp_path / "sudoku"


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate(tmp_path / "org") == tmp_path / "org"
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")  # before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/org") == tmp_path / "org"


def test_unknown_names_list_what_is_bundled(tmp_path):
    message = refusal("sudoko")
    assert message.startswith("sudoko: ")
    assert "chess, sudoku" in message
    assert "no such folder" in refusal(tmp_path / "org")
    assert "no such folder" in refusal(Path("org/name"))  # a path is never a hub id
    assert "chess, sudoku" in refusal("./org/name")


def test_no_name_is_not_the_present_folder(single, monkeypatch):
    monkeypatch.chdir(single)
    for name in ("", "  "):
        assert refusal(name) == "the model's name is empty"
    assert locate(".") == Path()


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "x" * 300, "~nobody-of-that-name/model", "a\0b"])
def test_names_that_can_be_no_folder(name):
    message = refusal(name)
    assert "\n" not in message
    assert message.startswith(name[:80])


def test_gguf(tmp_path):
    assert refusal(tmp_path / "x.gguf") == f"{tmp_path / 'x.gguf'}: no such file"
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("x.gguf", "renamed.bin"):
        (folder / name).write_bytes(b"GGUF\3\0\0\0")
        assert refusal(folder / name).startswith(f"{folder / name}: GGUF is not supported yet")
    assert refusal(folder).startswith(f"{folder / 'x.gguf'}: GGUF is not supported yet")
    (folder / "config.json").write_text("{}")
    assert locate(folder) == folder  # the GGUF file lies beside a checkpoint
    assert "give the folder" in refusal(folder / "config.json")


def test_a_complete_cache_is_used_without_asking_the_hub(hub, single):
    calls = hub(lambda local: str(single))
    assert locate("google/tiny") == single
    assert calls == [("google/tiny", True)]


def test_only_what_is_not_cached_is_asked_for(hub, single):
    """Any other trouble with the cache is told, not passed over in silence."""
    def answer(local):
        if local:
            raise PermissionError(13, "Permission denied")
        return str(single)

    calls = hub(answer)
    assert "Permission denied" in refusal("google/tiny")
    assert calls == [("google/tiny", True)]


def test_offline_is_said_even_where_it_is_an_http_error(hub, monkeypatch):
    """In some versions of the hub's library LocalEntryNotFoundError is an HfHubHTTPError."""
    from huggingface_hub import errors

    class Offline(errors.LocalEntryNotFoundError, errors.HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "not cached")

    def answer(local):
        raise Offline

    hub(answer)
    assert "cannot be reached" in refusal("google/tiny")


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_an_incomplete_cache_is_completed(hub, single, copy_of, absent):
    part = copy_of(single)
    (part / absent).unlink()
    calls = hub(lambda local: str(part if local else single))
    assert locate("google/tiny") == single
    assert calls == [("google/tiny", True), ("google/tiny", False)]


def test_a_cache_that_lacks_a_shard_is_completed(hub, sharded, copy_of):
    part = copy_of(sharded)
    next(part.glob("*.safetensors")).unlink()
    hub(lambda local: str(part if local else sharded))
    assert locate("google/tiny") == sharded


def response(status):
    from huggingface_hub import errors

    httpx = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api"))


def hub_error(kind):
    from huggingface_hub import errors

    return {
        "gated": lambda: errors.GatedRepoError("403 Client Error\nlong text", response=response(403)),
        "absent": lambda: errors.RepositoryNotFoundError("404 Client Error\nlong text", response=response(404)),
        "server": lambda: errors.HfHubHTTPError("500 Server Error\nlong text", response=response(500)),
        "offline": lambda: errors.LocalEntryNotFoundError("not cached"),
        "switched off": lambda: errors.OfflineModeIsEnabled("offline mode"),
        "disk": lambda: OSError(28, "No space left on device"),
        "bad name": lambda: errors.HFValidationError("Repo id must not end in '.'"),
    }[kind]()


@pytest.mark.parametrize(("kind", "words"), [
    ("gated", ["accept its terms on https://huggingface.co/google/tiny", "hf auth login"]),
    ("absent", ["no such folder", "chess, sudoku", "no such repository"]),
    ("server", ["answered with an error: 500 Server Error"]),
    ("offline", ["no such folder", "chess, sudoku", "cannot be reached"]),
    ("switched off", ["cannot be reached"]),
    ("disk", ["OSError", "No space left on device"]),
    ("bad name", ["Repo id must not end"]),
])
def test_the_hub_s_refusals_in_one_line(hub, kind, words):
    def answer(local):
        if local:
            raise hub_error("offline")
        raise hub_error(kind)

    hub(answer)
    message = refusal("google/tiny")
    assert message.startswith("google/tiny: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_hub_repository_without_config(hub, tmp_path):
    hub(lambda local: str(tmp_path))
    assert "no config.json" in refusal("unsloth/tiny-GGUF")


def test_without_the_hub_s_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install dgemma[hub]" in refusal("google/tiny")
    assert locate("sudoku").name == "sudoku"
