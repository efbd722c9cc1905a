"""Removing a model takes its own files from the hub's cache and nothing else, however the cache came to be."""

import json
import os

import pytest

from dgemma.weights.hub.cache import cache_folder, files_beside, find_local, local_models, remove_model, repo_folder
from dgemma.weights.hub.repository import fetch, plan_pull
from dgemma.weights.hub.transfer import Listener
from support.hub_server import COMMIT, demo_repos, gguf

GGUF, PLAIN = "org/diffuse-GGUF", "org/diffuse"
NEWER = "d" * 40


@pytest.fixture
def hub(hub):
    """The same with smaller files."""
    hub.repos.update(demo_repos(30_000))
    return hub


def download(hub, repo):
    """A whole repository, as the hub's own library lays it out."""
    from huggingface_hub import hf_hub_download

    for name in hub.repos[repo]:
        hf_hub_download(repo, name)


def here(repo):
    """The names of a repository's files that are in the cache with their contents, by commit."""
    snapshots = repo_folder(repo) / "snapshots"
    return {commit.name: sorted(path.relative_to(commit).as_posix() for path in commit.rglob("*") if path.is_file())
            for commit in snapshots.iterdir()} if snapshots.is_dir() else {}


def intact(hub, repo, commit=COMMIT):
    """Whether every file of a commit that is left has the contents that the hub has."""
    folder = repo_folder(repo) / "snapshots" / commit
    return all((folder / name).read_bytes() == hub.repos[repo][name] for name in here(repo).get(commit, ()))


def blobs(repo):
    return list((repo_folder(repo) / "blobs").iterdir())


def remove(name):
    return remove_model(find_local(name))


def names():
    return [model.name for model in local_models() if not model.bundled]


def sound():
    """Whether the hub's own library finds nothing wrong with the cache."""
    from huggingface_hub import scan_cache_dir

    return not scan_cache_dir(cache_folder()).warnings


def test_the_last_quantisation_leaves_the_vision_tower_the_card_and_other_kinds_of_model(hub):
    hub.repos[GGUF] = {"README.md": b"# card", "mmproj-F16.gguf": gguf(500, "clip"),
                       "diffuse-Q4_K_M.gguf": gguf(30_000), "gemma-Q4_K_M.gguf": gguf(20_000, "gemma3"),
                       "imatrix.gguf": gguf(500, "imatrix"), "config.json": b'{"model_type": "llama"}'}
    download(hub, GGUF)
    assert names() == [f"{GGUF}:Q4_K_M"]
    model = find_local(GGUF)
    assert remove_model(model) == 30_000
    assert here(GGUF) == {COMMIT: ["README.md", "config.json", "gemma-Q4_K_M.gguf", "imatrix.gguf", "mmproj-F16.gguf"]}
    assert intact(hub, GGUF) and sound()
    assert len(blobs(GGUF)) == 5
    assert names() == []
    assert files_beside(model) == {"README.md": 6, "config.json": 23, "gemma-Q4_K_M.gguf": 20_000,
                                   "imatrix.gguf": 500, "mmproj-F16.gguf": 500}


@pytest.mark.parametrize("copies", [False, True], ids=["links", "copies"])
def test_each_quantisation_goes_alone_split_or_not(hub, copies, request):
    if copies:
        request.getfixturevalue("without_links")
    hub.repos[GGUF] |= {"sub/diffuse-Q5_K_M.gguf": gguf(10_000, seed=5), "mmproj-F16.gguf": gguf(500, "clip")}
    download(hub, GGUF)
    left = set(hub.repos[GGUF])
    assert set(here(GGUF)[COMMIT]) == left
    for tag, files, size in (
            ("BF16", {f"BF16/diffuse-BF16-0000{part}-of-00002.gguf" for part in (1, 2)}, 60_000),
            ("Q5_K_M", {"sub/diffuse-Q5_K_M.gguf"}, 10_000), ("Q8_0", {"diffuse-Q8_0.gguf"}, 60_000),
            ("UD-Q2_K_XL", {"diffuse-UD-Q2_K_XL.gguf"}, 15_000), ("Q4_K_M", {"diffuse-Q4_K_M.gguf"}, 30_000)):
        assert remove(f"{GGUF}:{tag}") == size
        left -= files
        assert set(here(GGUF)[COMMIT]) == left
        assert intact(hub, GGUF) and sound()
        assert not any(path.is_dir() and not any(path.iterdir()) for path in
                       (repo_folder(GGUF) / "snapshots" / COMMIT).rglob("*"))
    assert left == {"README.md", "mmproj-F16.gguf", "imatrix_unsloth.gguf"}


@pytest.mark.parametrize("copies", [False, True], ids=["links", "copies"])
def test_a_checkpoint_leaves_the_gguf_files_beside_it(hub, copies, request):
    if copies:
        request.getfixturevalue("without_links")
    hub.repos[PLAIN] |= {"diffuse-Q4_K_M.gguf": gguf(30_000, seed=4), "mmproj-F16.gguf": gguf(500, "clip"),
                         "llama-Q8_0.gguf": gguf(700, "llama")}
    download(hub, PLAIN)
    assert names() == [PLAIN, f"{PLAIN}:Q4_K_M"]
    assert 60_000 < remove(PLAIN) < 61_000
    assert here(PLAIN) == {COMMIT: ["README.md", "diffuse-Q4_K_M.gguf", "llama-Q8_0.gguf", "mmproj-F16.gguf",
                                    "original/consolidated.safetensors", "pytorch_model.bin"]}
    assert intact(hub, PLAIN) and sound()
    assert names() == [f"{PLAIN}:Q4_K_M"]


def test_a_checkpoint_that_was_pulled_goes_with_its_folder_and_no_other_repository(hub):
    for repo in (PLAIN, GGUF):
        fetch(plan_pull(repo), Listener())
    assert remove(PLAIN) > 60_000
    assert not repo_folder(PLAIN).exists()
    assert not (cache_folder() / ".locks" / repo_folder(PLAIN).name).exists()
    assert names() == [f"{GGUF}:Q4_K_M"]
    assert intact(hub, GGUF) and sound()


def test_contents_that_another_name_has_stay_until_the_last_of_them(hub):
    hub.repos[GGUF] = {"a-Q8_0.gguf": gguf(30_000), "b-Q6_K.gguf": gguf(30_000), "mmproj-F16.gguf": gguf(500, "clip")}
    download(hub, GGUF)
    assert remove(f"{GGUF}:Q8_0") == 0
    assert here(GGUF) == {COMMIT: ["b-Q6_K.gguf", "mmproj-F16.gguf"]}
    assert intact(hub, GGUF)
    assert remove(f"{GGUF}:Q6_K") == 30_000
    assert here(GGUF) == {COMMIT: ["mmproj-F16.gguf"]}


def test_a_model_goes_from_all_revisions_and_what_they_share_stays(hub):
    """The newer revision has the vision tower and one quantisation unchanged."""
    old = dict(hub.repos[GGUF])
    download(hub, GGUF)
    hub.commit = NEWER
    hub.repos[GGUF] = {**old, "diffuse-Q4_K_M.gguf": gguf(20_000, seed=99)}
    download(hub, GGUF)
    assert remove(f"{GGUF}:Q4_K_M") == 50_000
    assert set(here(GGUF)[NEWER]) == set(here(GGUF)[COMMIT]) == set(old) - {"diffuse-Q4_K_M.gguf"}
    assert intact(hub, GGUF, NEWER) and intact(hub, GGUF, COMMIT) and sound()


def test_a_revision_of_another_architecture_keeps_its_files_of_the_same_names(hub):
    files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": b"llama" * 99,
             "x-Q8_0.gguf": gguf(900, "llama")}
    hub.repos["org/both"] = files
    download(hub, "org/both")
    hub.commit = NEWER
    hub.repos["org/both"] = {**files, "config.json": b'{"model_type": "diffusion_gemma"}',
                             "model.safetensors": b"ours" * 99, "x-Q8_0.gguf": gguf(900)}
    download(hub, "org/both")
    assert names() == ["org/both", "org/both:Q8_0"]
    remove("org/both")
    remove("org/both:Q8_0")
    hub.repos["org/both"] = files
    assert here("org/both") == {COMMIT: sorted(files)}
    assert intact(hub, "org/both")


def test_an_empty_revision_goes_with_the_references_to_it(hub):
    fetch(plan_pull(GGUF, "Q8_0"), Listener())
    hub.commit = NEWER
    hub.repos[GGUF]["diffuse-Q4_K_M.gguf"] = gguf(20_000, seed=99)
    fetch(plan_pull(GGUF, "Q4_K_M"), Listener())
    assert remove(f"{GGUF}:Q4_K_M") == 20_000
    assert here(GGUF) == {COMMIT: ["diffuse-Q8_0.gguf"]}
    assert sound()
    assert names() == [f"{GGUF}:Q8_0"]
    remove(GGUF)
    assert not repo_folder(GGUF).exists()


def test_two_files_of_one_quantisation_are_two_models(hub):
    hub.repos[GGUF] = {"a-Q4_K_M.gguf": gguf(3_000, seed=1), "b-Q4_K_M.gguf": gguf(2_000, seed=2)}
    download(hub, GGUF)
    assert names() == [f"{GGUF}:a-Q4_K_M.gguf", f"{GGUF}:b-Q4_K_M.gguf"]
    assert remove(f"{GGUF}:b-Q4_K_M.gguf") == 2_000
    assert here(GGUF) == {COMMIT: ["a-Q4_K_M.gguf"]}


def test_a_quantisation_that_has_a_namesake_in_a_newer_revision_goes_from_both_the_namesake_from_none(hub):
    hub.repos[GGUF] = {"a-Q4_K_M.gguf": gguf(3_000, seed=1)}
    download(hub, GGUF)
    hub.commit = NEWER
    hub.repos[GGUF] |= {"b-Q4_K_M.gguf": gguf(2_000, seed=2)}
    download(hub, GGUF)
    remove(f"{GGUF}:a-Q4_K_M.gguf")
    assert here(GGUF) == {NEWER: ["b-Q4_K_M.gguf"]}


@pytest.mark.parametrize("started_by", ["dgemma", "another program"])
def test_what_is_partly_fetched_of_others_stays(hub, started_by):
    """A pull of another quantisation was interrupted: what has come of it took hours."""
    fetch(plan_pull(GGUF, "Q4_K_M"), Listener())
    if started_by == "dgemma":
        class Stop(Listener):
            def advance(self, done):
                if done >= 10_000:
                    raise KeyboardInterrupt

        hub.switches.chunk = 10_000
        with pytest.raises(KeyboardInterrupt):
            fetch(plan_pull(GGUF, "Q8_0"), Stop())
    else:
        (repo_folder(GGUF) / "blobs" / f"{'a' * 64}.incomplete").write_bytes(b"x" * 10_000)
    assert remove(f"{GGUF}:Q4_K_M") == 30_000
    partial, = blobs(GGUF)
    assert partial.name.endswith(".incomplete") and partial.stat().st_size >= 10_000
    if started_by == "dgemma":
        assert names() == [f"{GGUF}:Q8_0"]
        remove(GGUF)
        assert not repo_folder(GGUF).exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_out_of_the_cache_is_removed_and_what_it_leads_to_is_not(hub, tmp_path, absolute):
    """Somebody keeps a file elsewhere and has put a link to it in the cache."""
    fetch(plan_pull(GGUF, "Q8_0"), Listener())
    own = tmp_path / "models" / "mine.gguf"
    own.parent.mkdir()
    own.write_bytes(gguf(5_000, seed=77))
    link = repo_folder(GGUF) / "snapshots" / COMMIT / "diffuse-Q6_K.gguf"
    link.symlink_to(own if absolute else os.path.relpath(own, link.parent))
    assert remove(f"{GGUF}:Q6_K") == 0
    assert not link.is_symlink()
    assert own.stat().st_size == 5_000
    assert names() == [f"{GGUF}:Q8_0"]


def test_a_cache_that_is_itself_a_link(hub, tmp_path):
    download(hub, GGUF)
    real = tmp_path / "elsewhere"
    (tmp_path / "hub").rename(real)
    (tmp_path / "hub").symlink_to(real)
    assert remove(f"{GGUF}:Q4_K_M") == 30_000
    assert remove(f"{GGUF}:Q8_0") == 60_000
    assert "diffuse-UD-Q2_K_XL.gguf" in here(GGUF)[COMMIT]
    assert intact(hub, GGUF)


def test_a_name_in_an_index_that_leads_out_of_the_folder_is_not_followed(hub, tmp_path):
    victim = tmp_path / "hub" / "victim.safetensors"
    index = {"weight_map": {"a": "../../../victim.safetensors", "b": "model-00001-of-00002.safetensors"}}
    hub.repos[PLAIN]["model.safetensors.index.json"] = json.dumps(index).encode()
    fetch(plan_pull(PLAIN), Listener())
    victim.write_bytes(b"mine")
    remove(PLAIN)
    assert victim.read_bytes() == b"mine"
