"""Choosing, fetching and finding models of the hub, against a stand-in for it on loopback."""

import errno
import threading
from pathlib import Path

import pytest

from dgemma.errors import CheckpointError
from dgemma.weights.hub import transfer
from dgemma.weights.hub.cache import cached_path, find_local, local_models, note_wanted, remove_model, repo_folder
from dgemma.weights.hub.locate import locate
from dgemma.weights.hub.repository import NotThereError, fetch, locate_on_hub, plan_pull
from dgemma.weights.hub.transfer import ProgressLines
from support.hub_server import COMMIT, HubServer, blob_of, gguf

GGUF, PLAIN = "org/diffuse-GGUF", "org/diffuse"


class Notes(transfer.Listener):
    """What was told."""

    def __init__(self, stop_at: int | None = None):
        self.begun, self.notes, self.done, self.stop_at = [], [], [], stop_at

    def begin(self, what, done, total):
        self.begun.append((what, done, total))

    def advance(self, done):
        self.done.append(done)
        if self.stop_at is not None and done >= self.stop_at:
            raise KeyboardInterrupt

    def note(self, text):
        self.notes.append(text)


def pull(repo, tag=None, listener=None, include=()):
    return fetch(plan_pull(repo, tag, include), listener or Notes())


def refusal(call, *arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(repo):
    return repo_folder(repo) / "snapshots" / COMMIT


# ---- choosing ----


@pytest.mark.parametrize(("tag", "model", "files"), [
    (None, "Q4_K_M", ["diffuse-Q4_K_M.gguf"]),  # several: the usual one
    ("q8_0", "Q8_0", ["diffuse-Q8_0.gguf"]),
    ("Q2_K_XL", "UD-Q2_K_XL", ["diffuse-UD-Q2_K_XL.gguf"]),
    ("bf16", "BF16", [f"BF16/diffuse-BF16-0000{part}-of-00002.gguf" for part in (1, 2)]),
    ("diffuse-BF16-00002-of-00002.gguf", "BF16", [f"BF16/diffuse-BF16-0000{part}-of-00002.gguf" for part in (1, 2)]),
])
def test_choosing_gguf(hub, tag, model, files):
    plan = plan_pull(GGUF, tag)
    assert plan.model == f"{GGUF}:{model}"
    assert [file.name for file in plan.files] == files
    assert plan.commit == COMMIT
    assert plan.size == plan.to_fetch == sum(len(hub.repos[GGUF][name]) for name in files)


@pytest.mark.parametrize(("tag", "there", "taken"), [
    ("Q4_K_M", ["mmproj-F16.gguf"], "mmproj-F16.gguf"),
    ("Q4_K_M", ["mmproj-Q8_0.gguf", "mmproj-F32.gguf", "mmproj-model-f16.gguf", "gemma-mmproj-BF16.gguf"],
     "gemma-mmproj-BF16.gguf"),
    ("Q4_K_M", ["mmproj-BF16.gguf", "mmproj-diffuse-Q4_K_M.gguf"], "mmproj-diffuse-Q4_K_M.gguf"),
    ("BF16", ["mmproj-F16.gguf", "sub/mmproj-BF16.gguf", "mmproj.txt"], "mmproj-F16.gguf"),
    ("BF16", ["mmproj-F16.gguf", "BF16/mmproj-F16.gguf"], "BF16/mmproj-F16.gguf"),
])
def test_with_a_gguf_model_comes_one_vision_tower(hub, tag, there, taken):
    hub.repos[GGUF] |= {name: gguf(500, "clip", seed) for seed, name in enumerate(there)}
    plan = plan_pull(GGUF, tag)
    assert [file.name for file in plan.files if "mmproj" in file.name] == [taken]
    assert plan.model == f"{GGUF}:{tag}"
    path = pull(GGUF, tag)
    assert path.name.startswith("diffuse") and (snapshot(GGUF) / taken).is_file()
    assert find_local(f"{GGUF}:{tag}").complete


def test_choosing_safetensors(hub):
    plan = plan_pull(PLAIN)
    assert plan.model == PLAIN
    assert [file.name for file in plan.files] == [
        "chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    hub.repos[PLAIN]["model.safetensors"] = b"one"  # a stray one: the index names what counts
    assert [file.name for file in plan_pull(PLAIN).files] == [file.name for file in plan.files]
    for part in (1, 2):
        del hub.repos[PLAIN][f"model-0000{part}-of-00002.safetensors"]
    assert [file.name for file in plan_pull(PLAIN).files][-2:] == ["tokenizer.json", "model.safetensors"]


def test_a_repository_with_one_gguf_file(hub):
    hub.repos["org/one"] = {"config.json": b"{}", "any-name.gguf": gguf(500), "mmproj.gguf": gguf(500)}
    assert plan_pull("org/one").model == "org/one:any-name"
    assert locate("org/one") == locate("org/one:any-name") == locate("org/one:any-name.gguf")


@pytest.mark.parametrize(("repo", "tag", "words"), [
    (GGUF, "Q3_K", ["no GGUF file 'Q3_K'", "BF16, Q4_K_M, Q8_0, UD-Q2_K_XL"]),
    (GGUF, "Q", ["can mean several", "Q4_K_M, Q8_0, UD-Q2_K_XL", "as in org/diffuse-GGUF:Q4_K_M"]),
    ("org/two", None, ["several GGUF models in this hub repository: Q5_K_M, Q8_0", "as in org/two:Q5_K_M"]),
    (PLAIN, "Q4_K_M", ["no GGUF files", "leave away the 'Q4_K_M'"]),
    ("org/none", None, ["neither a checkpoint in safetensors form", "there are README.md"]),
    ("org/part", None, ["split into 2 parts", "lacks a-00002-of-00002.gguf"]),
])
def test_choices_that_cannot_be_made(hub, repo, tag, words):
    hub.repos["org/two"] = {"a-Q5_K_M.gguf": b"", "a-Q8_0.gguf": b""}
    hub.repos["org/none"] = {"README.md": b""}
    hub.repos["org/part"] = {"a-00001-of-00002.gguf": b""}
    message = refusal(plan_pull, repo, tag)
    assert message.startswith(f"{repo}: ")
    for word in words:
        assert word in message


def test_include(hub):
    plan = plan_pull(GGUF, include=["*Q4_K_M*", "README*"])
    assert [file.name for file in plan.files] == ["README.md", "diffuse-Q4_K_M.gguf"]
    assert plan.model == f"{GGUF}:Q4_K_M"
    assert plan_pull(GGUF, include=["*00001*"]).model is None
    assert plan_pull(PLAIN, include=["*.json"]).model is None
    assert plan_pull(PLAIN, include=["*"]).model == PLAIN
    assert "no file matches *Q9*; there are README.md" in refusal(plan_pull, GGUF, include=["*Q9*"])


def test_names_that_lead_out_of_the_cache_are_left_out(hub):
    hub.repos["org/evil"] = {"../../x.gguf": b"", "/etc/x.gguf": b"", "a\\..\\x.gguf": b"", "x-Q8_0.gguf": b"1"}
    assert [file.name for file in plan_pull("org/evil", include=["*"]).files] == ["x-Q8_0.gguf"]


# ---- fetching ----


def test_what_is_fetched_is_what_other_programs_find(hub):
    from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

    path = pull(GGUF, "BF16")
    assert path == snapshot(GGUF) / "BF16/diffuse-BF16-00001-of-00002.gguf"
    assert path.read_bytes() == hub.repos[GGUF]["BF16/diffuse-BF16-00001-of-00002.gguf"]
    assert pull(PLAIN) == snapshot(PLAIN)
    asked = len(hub.requests)
    assert Path(hf_hub_download(GGUF, "BF16/diffuse-BF16-00002-of-00002.gguf", local_files_only=True)).is_file()
    assert Path(snapshot_download(PLAIN, local_files_only=True, allow_patterns=["*.json", "*.safetensors"])) \
        == snapshot(PLAIN)
    cache = scan_cache_dir(repo_folder(GGUF).parent)
    assert not cache.warnings
    assert {repo.repo_id: sorted(repo.refs) for repo in cache.repos} == {GGUF: ["main"], PLAIN: ["main"]}
    assert len(hub.requests) == asked
    assert Path(hf_hub_download(PLAIN, "config.json")).is_file()  # asked online, it is fetched no second time
    assert [method for method, path, _ in hub.requests[asked:] if "/resolve/" in path] == ["HEAD"]


def test_locate_fetches_once(hub, monkeypatch, capsys):
    path = locate(f"{GGUF}:Q4_K_M")
    assert path.read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    assert hub.downloads() == [("diffuse-Q4_K_M.gguf", None)]
    assert capsys.readouterr().err.startswith("downloading diffuse-Q4_K_M.gguf (300.0 kB)\n")
    folder = locate(PLAIN)
    asked = len(hub.requests)
    # Complete in the cache: nobody is asked, not even for a newer commit, and the tag may be left away.
    assert locate(GGUF) == locate(f"{GGUF}:q4_k_m") == locate(f"{GGUF}:diffuse-Q4_K_M.gguf") == path
    assert locate(PLAIN) == folder
    assert len(hub.requests) == asked


def test_a_loose_tag_asks_the_hub_which_file_it_means(hub):
    path = pull(GGUF, "UD-Q2_K_XL")
    asked = len(hub.requests)
    assert locate(f"{GGUF}:Q2_K") == path
    assert len(hub.requests) == asked + 1
    hub.__exit__()
    assert locate(f"{GGUF}:Q2_K") == path  # and is content with what is here if it cannot


def test_several_in_the_cache_and_no_tag(hub):
    first, second = pull(GGUF, "Q8_0"), pull(GGUF, "BF16")
    assert first != second
    assert "several GGUF models in the local cache: BF16, Q8_0" in refusal(locate, GGUF)
    assert pull(GGUF, "Q4_K_M") == locate(GGUF)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_an_incomplete_cache_is_completed(hub, absent):
    folder = pull(PLAIN)
    (folder / absent).resolve().unlink()
    (folder / absent).unlink()
    assert cached_path(PLAIN, None) is None
    hub.requests.clear()
    assert locate(PLAIN) == folder
    assert hub.downloads() == [(absent, None)]


def test_a_split_model_that_lacks_a_part_is_completed(hub):
    path = pull(GGUF, "BF16")
    second = path.with_name("diffuse-BF16-00002-of-00002.gguf")
    second.unlink()  # only its name: the contents are still among the blobs
    hub.requests.clear()
    assert locate(f"{GGUF}:BF16") == path
    assert second.is_file()
    assert hub.downloads() == []


def test_a_newer_commit_shares_what_has_not_changed(hub):
    old = pull(PLAIN)
    hub.commit = "d" * 40
    hub.repos[PLAIN]["config.json"] = b'{"model_type": "diffusion_gemma", "new": 1}'
    hub.requests.clear()
    new = pull(PLAIN)
    assert new != old
    assert hub.downloads() == [("config.json", None)]
    assert cached_path(PLAIN, None) == new
    (new / "config.json").unlink()
    assert cached_path(PLAIN, None) == old  # better than nothing


def test_a_pull_of_another_quantisation_at_a_newer_commit_keeps_the_older_one_usable(hub):
    old = pull(GGUF, "Q4_K_M")
    hub.commit = "d" * 40
    pull(GGUF, "Q8_0")
    assert cached_path(GGUF, "Q4_K_M") == old
    assert [model.name for model in local_models() if not model.bundled] == [f"{GGUF}:Q4_K_M", f"{GGUF}:Q8_0"]


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_files(hub, size):
    hub.repos["org/tiny"] = {"x-Q8_0.gguf": b"x" * size}
    assert pull("org/tiny").stat().st_size == size


def test_where_links_cannot_be_made_the_file_itself_takes_its_place(hub, without_links):
    path = pull(GGUF, "Q4_K_M")
    assert not path.is_symlink()
    assert path.stat().st_size == 300_000
    assert not list((repo_folder(GGUF) / "blobs").iterdir())
    assert plan_pull(GGUF, "Q4_K_M").to_fetch == 0
    model = find_local(f"{GGUF}:Q4_K_M")
    pull(GGUF, "Q8_0")
    assert remove_model(model) == 300_000
    assert not path.exists()


# ---- what goes wrong on the way ----


def test_slow(hub):
    hub.switches.chunk, hub.switches.delay = 60_000, 0.03
    notes = Notes()
    pull(GGUF, "Q4_K_M", notes)
    assert notes.begun == [(f"{what} diffuse-Q4_K_M.gguf", 0, 300_000) for what in ("downloading", "checking")]
    assert len(notes.done) > 4
    assert notes.done == [*sorted(notes.done[:-1]), 300_000]


def test_no_answer_in_time_is_tried_again(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.15)
    hub.switches.chunk, hub.switches.delay = 200_000, 0.4
    notes = Notes()
    pull(GGUF, "Q4_K_M", notes)
    assert [wanted for _, wanted in hub.downloads()] == [None, "bytes=200000-299999"]
    assert "timed out" in notes.notes[0]


def test_cut_off_and_resumed_at_once(hub):
    hub.switches.cut_after, hub.switches.cuts = 100_000, 2
    notes = Notes()
    path = pull(GGUF, "Q4_K_M", notes)
    assert path.read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    assert [wanted for _, wanted in hub.downloads()] == [None, "bytes=100000-299999", "bytes=200000-299999"]
    assert len(notes.notes) == 2
    assert all(note.startswith("interrupted: ") and note.endswith("; trying again") for note in notes.notes)


def test_cut_off_and_resumed_by_the_next_pull(hub):
    with pytest.raises(KeyboardInterrupt):
        pull(GGUF, "Q4_K_M", Notes(stop_at=65_536))
    partial = next((repo_folder(GGUF) / "blobs").iterdir())
    assert partial.name.endswith(".incomplete")
    have = partial.stat().st_size
    assert 65_536 <= have < 300_000
    plan = plan_pull(GGUF, "Q4_K_M")
    assert plan.to_fetch == 300_000 - have
    notes = Notes()
    path = fetch(plan, notes)
    assert path.read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    assert hub.downloads()[-1] == ("diffuse-Q4_K_M.gguf", f"bytes={have}-299999")
    assert notes.begun[0] == ("downloading diffuse-Q4_K_M.gguf", have, 300_000)


def test_a_connection_that_is_always_cut_is_given_up(hub):
    hub.switches.cut_after, hub.switches.cuts, hub.switches.ranges = 1000, 100, False
    message = refusal(pull, GGUF, "Q4_K_M")
    assert "the download broke off after 1.0 kB of 300.0 kB of diffuse-Q4_K_M.gguf" in message
    assert "goes on from there" in message
    assert len(hub.downloads()) == 1 + transfer.TRIES - 1


def test_a_server_without_ranges_starts_again(hub):
    hub.switches.cut_after, hub.switches.ranges = 100_000, False
    assert pull(GGUF, "Q4_K_M").read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]


def test_very_large_files_are_asked_for_in_pieces(hub, tmp_path):
    url = f"{hub.url}/{GGUF}/resolve/{COMMIT}/diffuse-Q4_K_M.gguf"
    transfer.download(url, tmp_path / "x.gguf", 300_000, Notes(), at_once=120_000)
    assert (tmp_path / "x.gguf").read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    assert [wanted for _, wanted in hub.downloads()] == ["bytes=0-119999", "bytes=120000-239999", "bytes=240000-299999"]


@pytest.mark.parametrize("size", [300_000, 300_001, 299_999])
def test_a_partial_file_that_is_not_the_beginning(hub, size):
    blob = blob_of("x.gguf", hub.repos[GGUF]["diffuse-Q4_K_M.gguf"])
    partial = repo_folder(GGUF) / "blobs" / f"{blob}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * size)
    if size <= 300_000:
        message = refusal(pull, GGUF, "Q4_K_M")
        assert "diffuse-Q4_K_M.gguf arrived damaged (its SHA-256 is" in message
        assert not partial.exists()
    assert pull(GGUF, "Q4_K_M").read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]


def answering(hub, times=1 << 30, **changes):
    """Let the hub's answers to requests for a range be others: ``status``, ``data``, headers (None: without)."""
    def alter(answer):
        nonlocal times
        if answer.wanted is None or times <= 0:
            return
        times -= 1
        for name, value in changes.items():
            if name in ("status", "data"):
                setattr(answer, name, value)
            else:
                answer.headers.pop(name.replace("_", "-"), None)
                if value is not None:
                    answer.headers[name.replace("_", "-")] = value

    hub.switches.alter = alter


def begun(hub, size=100_000):
    """A download of 300 000 bytes of which ``size`` have arrived."""
    data = hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    partial = repo_folder(GGUF) / "blobs" / f"{blob_of('x.gguf', data)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data[:size])
    return partial, data


@pytest.mark.parametrize("changes", [
    dict(Content_Range=None), dict(Content_Range="bytes 0-199999/300000"),
    dict(Content_Range="bytes 100001-299999/300000"),
    dict(Content_Range="bytes 100000-299999/300001"), dict(Content_Range="bytes 100000-300000/300000"),
    dict(Content_Range="bytes 100000-99999/300000"), dict(Content_Range="bytes */300000"),
    dict(Content_Range="items 100000-299999/300000"), dict(Content_Range="bytes 100000-/300000"),
    dict(Content_Range="bytes -100000/300000"), dict(Content_Range=""), dict(Content_Encoding="gzip"),
    dict(status=416), dict(status=416, Content_Range="bytes */300000"), dict(status=204, data=b""),
    dict(status=200, data=b"<html>Log in to this network</html>"),
], ids=str)
def test_a_part_that_is_not_the_one_asked_for_is_not_taken(hub, changes):
    """Whoever answers wrongly is asked for the whole file, of which what is here already is left out."""
    _, data = begun(hub)
    answering(hub, **changes)
    assert pull(GGUF, "Q4_K_M").read_bytes() == data
    assert [wanted for _, wanted in hub.downloads()] == ["bytes=100000-299999", None]


@pytest.mark.parametrize(("changes", "words"), [
    (dict(Content_Range=None), "did not say which (no Content-Range)"),
    (dict(Content_Range="bytes 0-199999/300000"), "sent bytes 0 to 199999 of the file, not those from 100000"),
    (dict(Content_Range="bytes 100000-299999/300001"), "the server's file has 300001 bytes, not 300000"),
])
def test_a_server_that_is_always_wrong_spoils_nothing(hub, changes, words):
    partial, data = begun(hub)
    answering(hub, **changes)
    right = hub.switches.alter

    def alter(answer):
        if answer.wanted is None:  # nor has it the whole file
            answer.data = b"no such luck"
        return right(answer)

    hub.switches.alter = alter
    message = refusal(pull, GGUF, "Q4_K_M")
    assert "the download broke off after 100.0 kB of 300.0 kB" in message
    assert words in message
    assert partial.read_bytes() == data[:100_000]
    hub.switches.alter = None
    assert pull(GGUF, "Q4_K_M").read_bytes() == data


def test_a_wrong_part_once_costs_no_more_than_a_try(hub):
    _, data = begun(hub)
    answering(hub, times=1, Content_Range="bytes 0-199999/300000")
    notes = Notes()
    assert pull(GGUF, "Q4_K_M", notes).read_bytes() == data
    assert notes.notes == ["interrupted: the server sent bytes 0 to 199999 of the file, not those from 100000; "
                           "trying again"]


@pytest.mark.parametrize("total", ["300000", "*"])
def test_a_part_that_is_shorter_than_asked_for_is_taken_and_the_rest_asked_for(hub, total):
    _, data = begun(hub)

    def alter(answer):
        first = int(answer.wanted.removeprefix("bytes=").partition("-")[0])
        end = min(first + 60_000, 300_000)
        answer.headers["Content-Range"] = f"Bytes {first}-{end - 1}/{total}"
        answer.data = data[first:end]

    hub.switches.alter = alter
    assert pull(GGUF, "Q4_K_M").read_bytes() == data
    assert [wanted for _, wanted in hub.downloads()] == [
        f"bytes={start}-299999" for start in (100_000, 160_000, 220_000, 280_000)]


def test_more_bytes_than_the_part_has_are_left(hub):
    _, data = begun(hub)

    def alter(answer):
        first = int(answer.wanted.removeprefix("bytes=").partition("-")[0])
        if first == 100_000:
            answer.headers["Content-Range"] = "bytes 100000-149999/300000"
            answer.data = data[100_000:150_000] + b"rubbish"

    hub.switches.alter = alter
    assert pull(GGUF, "Q4_K_M").read_bytes() == data


@pytest.mark.parametrize("told", [True, False])
def test_a_page_instead_of_a_file_does_not_replace_what_has_arrived(hub, told):
    """As a hotel's network does, for every request, with the page's length or without."""
    partial, data = begun(hub)

    def alter(answer):
        answer.status, answer.data = 200, b"<html>Log in to this network</html>"
        if not told:
            answer.headers["Transfer-Encoding"] = "chunked"
            answer.data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(answer.data), answer.data)

    hub.switches.alter = alter
    refusal(pull, GGUF, "Q4_K_M")
    assert partial.read_bytes() == data[:100_000]
    hub.switches.alter = None
    assert pull(GGUF, "Q4_K_M").read_bytes() == data


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_small_file_is_checked_by_what_git_calls_it(hub, name):
    right = hub.repos[PLAIN][name]

    def alter(answer):
        if answer.name == name:
            answer.data = bytes([right[0] ^ 1]) + right[1:]

    hub.switches.alter = alter
    message = refusal(pull, PLAIN)
    assert f"{PLAIN}: {name} arrived damaged (its git SHA-1 is " in message
    assert not (snapshot(PLAIN) / name).exists()
    assert not any(path.name == blob_of(name, right) for path in (repo_folder(PLAIN) / "blobs").iterdir())
    hub.switches.alter = None
    pull(PLAIN)
    assert (snapshot(PLAIN) / name).read_bytes() == right


def test_a_small_file_that_is_empty_is_checked_too(hub):
    hub.repos[PLAIN]["tokenizer_config.json"] = b""
    pull(PLAIN)
    assert (snapshot(PLAIN) / "tokenizer_config.json").read_bytes() == b""


def test_a_hub_that_names_small_files_in_its_own_way_is_believed(hub, monkeypatch):
    """A mirror's ids need not be git's."""
    monkeypatch.setattr("support.hub_server.blob_of", lambda name, data: f"id-{len(data)}")
    assert (pull(PLAIN) / "config.json").read_bytes() == hub.repos[PLAIN]["config.json"]


def test_a_wrong_checksum(hub):
    hub.switches.corrupt = True
    message = refusal(pull, GGUF, "Q4_K_M")
    assert message.startswith(f"{GGUF}: diffuse-Q4_K_M.gguf arrived damaged")
    assert "it was deleted" in message
    assert not list((repo_folder(GGUF) / "blobs").iterdir())
    assert cached_path(GGUF, "Q4_K_M") is None
    hub.switches.corrupt = False
    assert pull(GGUF, "Q4_K_M").is_file()


def test_a_hub_that_fails_for_a_moment(hub):
    hub.switches.status, hub.switches.statuses = 503, 2
    notes = Notes()
    pull(GGUF, "Q4_K_M", notes)
    assert notes.notes == ["interrupted: Server error '503 Service Unavailable'; trying again"] * 2


@pytest.mark.parametrize(("status", "words"), [
    (404, "answered with an error: Client error '404 Not Found'"),
    (403, "answered with an error"),
    (500, "broke off after 0 B of 300.0 kB of diffuse-Q4_K_M.gguf (Server error '500 Internal Server Error')"),
])
def test_a_hub_that_refuses_a_file(hub, status, words):
    hub.switches.status = status
    assert words in refusal(pull, GGUF, "Q4_K_M")


@pytest.mark.parametrize("switch", ["gated", "gated_listing"])
def test_a_gated_repository(hub, switch):
    setattr(hub.switches, switch, True)
    message = refusal(locate, f"{GGUF}:Q4_K_M")
    assert message == (f"{GGUF}: this repository is gated: accept its terms on {hub.url}/{GGUF}, then log in with "
                       "`hf auth login` (or set HF_TOKEN)")


def test_a_repository_that_is_not_there(hub):
    assert refusal(plan_pull, "org/nothing").startswith("org/nothing: the Hugging Face hub has no such repository")
    message = refusal(locate, "org/nothing:Q4_K_M")
    assert message.startswith("org/nothing: no such folder, no bundled model of that name (bundled: ")
    assert "and the Hugging Face hub has no such repository" in message


def test_a_token_is_sent_to_the_hub_alone(hub, environment):
    hub.switches.token = "hf_secret"
    assert "no such repository (a private one needs `hf auth login`)" in refusal(plan_pull, GGUF)
    environment(HF_TOKEN="hf_secret", NO_PROXY="127.0.0.1,localhost")
    with HubServer(hub.repos) as elsewhere:
        hub.switches.redirect = elsewhere.url.replace("127.0.0.1", "localhost")
        assert pull(GGUF, "Q4_K_M").read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
        assert hub.tokens[-1] == "Bearer hf_secret"
        assert elsewhere.tokens == [None]


def test_offline(hub):
    pull(GGUF, "Q4_K_M")
    hub.__exit__()
    assert locate(GGUF).is_file()
    with pytest.raises(NotThereError, match="not complete in the local cache, and the Hugging Face hub cannot be"):
        plan_pull(PLAIN)
    message = refusal(locate, f"{GGUF}:Q8_0")
    assert "no such folder, no bundled model" in message
    assert ", not complete in the local cache, and the Hugging Face hub cannot be reached from here" in message


def test_switched_off(hub, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    pull(GGUF, "Q4_K_M")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert locate(GGUF).is_file()
    assert "must not be asked (HF_HUB_OFFLINE is set)" in refusal(locate, PLAIN)
    assert len(hub.requests) == asked


def test_a_hub_that_tells_no_sizes(hub, monkeypatch):
    import huggingface_hub

    class Sibling:
        rfilename, size, blob_id, lfs = "x.gguf", None, None, None

    class Info:
        sha, siblings = "c" * 40, [Sibling()]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Info())
    assert "does not tell sizes and checksums" in refusal(plan_pull, GGUF)


def test_a_name_that_the_hub_s_library_refuses(hub):
    assert refusal(plan_pull, "org/na--me").startswith("org/na--me: downloading from the Hugging Face hub failed: ")


# ---- the disk ----


def test_too_little_space_is_said_before_anything_is_fetched(hub, free_space, tmp_path):
    seen = free_space(100_000)
    message = refusal(pull, GGUF, "Q4_K_M")
    assert message.startswith(f"{GGUF}: not enough space on the disk of {tmp_path / 'hub'}: 300.0 kB are needed, "
                              "100.0 kB are free")
    assert "dgemma models remove" in message and "HF_HOME" in message
    assert hub.downloads() == []
    assert seen[0] in (tmp_path, tmp_path / "hub")  # the cache did not exist
    assert not repo_folder(GGUF).exists()


def test_what_is_here_needs_no_space(hub, free_space):
    pull(GGUF, "Q4_K_M")
    with pytest.raises(KeyboardInterrupt):
        pull(GGUF, "Q8_0", Notes(stop_at=500_000))
    free_space(150_000)
    assert pull(GGUF, "Q4_K_M").is_file()
    assert pull(GGUF, "Q8_0").is_file()  # most of it had arrived


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, ["the disk is full: ", "still to come into", "goes on where it stopped"]),
    (errno.EIO, ["cannot be stored in the local cache (Input/output error)"]),
])
def test_a_disk_that_fails_in_the_middle(hub, monkeypatch, number, words):
    class Failing:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if self.file.tell() > 100_000:
                raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Input/output error")
            self.file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "open", lambda *arguments: Failing(open(*arguments)), raising=False)  # noqa: SIM115
        message = refusal(pull, GGUF, "Q4_K_M")
    for word in words:
        assert word in message
    assert len(hub.downloads()) == 1  # it is no use to try again
    assert pull(GGUF, "Q4_K_M").read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]
    assert hub.downloads()[1][1].startswith("bytes=1")  # went on where it had stopped


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "hub").write_text("a file, where there should be a folder")
    message = refusal(pull, GGUF, "Q4_K_M")
    assert f"{GGUF} cannot be stored in the local cache (" in message


def test_two_at_once_fetch_once(hub):
    hub.switches.chunk, hub.switches.delay = 30_000, 0.08
    notes, paths = [Notes(), Notes()], []
    threads = [threading.Thread(target=lambda note=note: paths.append(pull(GGUF, "Q4_K_M", note))) for note in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and paths[0] == paths[1]
    assert len(hub.downloads()) == 1
    assert sorted(len(note.notes) for note in notes) == [0, 1]
    assert paths[0].read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]


# ---- what is here ----


def listed():
    return {model.name: model for model in local_models() if not model.bundled}


def test_the_models_on_this_machine(hub):
    assert [model.name for model in local_models()] == ["sudoku"]
    assert local_models()[0].bundled
    for tag in ("Q4_K_M", "BF16"):
        pull(GGUF, tag)
    pull(PLAIN)
    hub.repos["org/other"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"1"}
    hub.repos["org/llama-GGUF"] = {"llama-Q8_0.gguf": gguf(500, "llama")}
    pull("org/other")
    pull("org/llama-GGUF")
    models = listed()
    assert list(models) == [PLAIN, f"{GGUF}:BF16", f"{GGUF}:Q4_K_M"]
    assert all(model.complete for model in models.values())
    assert models[f"{GGUF}:BF16"].size == models[f"{GGUF}:BF16"].full_size == 600_000
    assert models[f"{GGUF}:BF16"].quantisation == "BF16"
    assert models[PLAIN].kind == "safetensors"
    assert models[PLAIN].path == snapshot(PLAIN)
    for name, model in models.items():
        assert locate(name) == model.path


def test_partial_models(hub):
    with pytest.raises(KeyboardInterrupt):
        pull(GGUF, "Q8_0", Notes(stop_at=100_000))
    with pytest.raises(KeyboardInterrupt):
        pull(PLAIN, listener=Notes(stop_at=200_000))
    pull(GGUF, "Q4_K_M")
    models = listed()
    assert [(name, model.complete) for name, model in models.items()] == [
        (PLAIN, False), (f"{GGUF}:Q4_K_M", True), (f"{GGUF}:Q8_0", False)]
    assert models[f"{GGUF}:Q8_0"].full_size == 600_000
    assert 100_000 <= models[f"{GGUF}:Q8_0"].size < 600_000
    assert 600_000 < models[PLAIN].full_size < 601_000
    assert 200_000 < models[PLAIN].size < 600_000
    pull(GGUF, "Q8_0")
    pull(PLAIN)
    assert all(model.complete for model in listed().values())
    assert not list(repo_folder(GGUF).glob(".dgemma*"))


def test_what_other_programs_left_incomplete(hub):
    path = pull(PLAIN)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert (listed()[PLAIN].complete, listed()[PLAIN].full_size) == (False, None)
    path = pull(GGUF, "BF16")
    path.unlink()
    assert (listed()[f"{GGUF}:BF16"].complete, listed()[f"{GGUF}:BF16"].full_size) == (False, None)


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"x.gguf": 1}', '{"x.gguf": ["a"]}'])
def test_a_damaged_note_of_what_is_wanted_does_no_harm(hub, text):
    pull(GGUF, "Q4_K_M")
    (repo_folder(GGUF) / ".dgemma-pull.json").write_text(text)
    assert list(listed()) == [f"{GGUF}:Q4_K_M"]


def test_removing_one_of_several(hub):
    hub.repos[GGUF]["same-Q6_K.gguf"] = hub.repos[GGUF]["diffuse-Q8_0.gguf"]  # the same contents twice
    keep, gone = pull(GGUF, "Q4_K_M"), pull(GGUF, "BF16")
    pull(GGUF, "Q8_0")
    same = pull(GGUF, "Q6_K")
    assert remove_model(find_local(f"{GGUF}:bf16")) == 600_000
    assert not gone.parent.exists()
    assert remove_model(find_local(f"{GGUF}:Q8_0")) == 0  # Q6_K still needs the contents
    assert keep.is_file() and same.is_file()
    assert list(listed()) == [f"{GGUF}:Q4_K_M", f"{GGUF}:Q6_K"]
    assert remove_model(find_local(f"{GGUF}:Q6_K")) == 600_000
    assert remove_model(find_local(GGUF)) >= 300_000  # the last one takes all with it
    assert not repo_folder(GGUF).exists()


def test_removing_takes_older_snapshots_along(hub):
    pull(GGUF, "Q4_K_M")
    pull(GGUF, "Q8_0")
    hub.commit = "d" * 40
    hub.repos[GGUF]["diffuse-Q4_K_M.gguf"] = gguf(200_000, seed=99)
    pull(GGUF, "Q4_K_M")
    assert remove_model(find_local(f"{GGUF}:Q4_K_M")) == 500_000
    assert list(listed()) == [f"{GGUF}:Q8_0"]


def test_removing_a_partial_one(hub):
    pull(GGUF, "Q4_K_M")
    with pytest.raises(KeyboardInterrupt):
        pull(GGUF, "Q8_0", Notes(stop_at=100_000))
    model = find_local(f"{GGUF}:Q8_0")
    assert remove_model(model) >= model.size
    assert list(listed()) == [f"{GGUF}:Q4_K_M"]
    assert [path.name for path in (repo_folder(GGUF) / "blobs").iterdir()] == [
        blob_of("x.gguf", hub.repos[GGUF]["diffuse-Q4_K_M.gguf"])]


def test_what_cannot_be_removed(hub):
    assert "ships with the package" in refusal(remove_model, find_local("sudoku"))
    assert "no model of that name on this machine" in refusal(find_local, GGUF)
    pull(GGUF, "Q4_K_M")
    pull(GGUF, "Q8_0")
    assert refusal(find_local, GGUF) == (f"{GGUF}: on this machine there are {GGUF}:Q4_K_M, {GGUF}:Q8_0; name one of "
                                         "them")
    assert refusal(find_local, f"{GGUF}:Q5_K_M").startswith(f"{GGUF}:Q5_K_M: on this machine there are ")


def test_what_is_wanted_is_kept_for_each_pull(hub):
    folder = repo_folder(GGUF)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    note_wanted(folder, {"a-Q4_K_M.gguf": ("b1", 100)})
    note_wanted(folder, {"a-Q8_0.gguf": ("b2", 200)})
    assert {name: (model.size, model.full_size) for name, model in listed().items()} == {
        f"{GGUF}:Q4_K_M": (0, 100), f"{GGUF}:Q8_0": (0, 200)}


# ---- how it looks ----


def test_lines_where_there_is_no_terminal(capsys):
    now = [0.0]
    with ProgressLines(lambda: now[0]) as display:
        display.begin("downloading config.json", 0, 500)
        display.advance(500)
        display.begin("downloading x.gguf", 10_000_000, 100_000_000)
        for percent in range(11, 101):
            now[0] += 0.5
            display.advance(percent * 1_000_000)
        display.begin("checking x.gguf", 0, 100_000_000)
        now[0] += 31
        display.advance(1_000_000)
        display.note("[bold]as it\x1b[2J is[/bold]")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading x.gguf (100.0 MB, 10.0 MB already here)"
    assert lines[1] == "downloading x.gguf: 20 % (20.0 MB of 100.0 MB, 2.0 MB/s)"
    assert len(lines) == 1 + 9 + 2 + 1
    assert lines[-2] == "checking x.gguf: 1 % (1.0 MB of 100.0 MB, 32.3 kB/s)"
    assert lines[-1] == "[bold]as it\ufffd[2J is[/bold]"  # nothing steers a terminal


def test_bars_that_are_switched_off(capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with ProgressLines() as display:
        display.begin("downloading x.gguf", 0, 100_000_000)
        display.advance(100_000_000)
    assert capsys.readouterr().err == ""


def test_bundled_names_need_no_hub(not_installed):
    not_installed("huggingface_hub")
    assert locate("sudoku").name == "sudoku"


def test_locate_tells_whoever_listens(hub, capsys):
    notes = Notes()
    assert locate_on_hub(GGUF, "Q4_K_M", lambda: notes).is_file()
    assert notes.begun and capsys.readouterr().err == ""
