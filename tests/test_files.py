"""Files are written whole or not at all, and what keeps them from being written is said in one line."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dgemma.errors import CheckpointError, DgemmaError
from dgemma.files import atomic_write, free_space, json_bytes, make_folder, read_pieces


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text):
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(str(path)) as beside:
        assert beside.parent == tmp_path
        assert str(os.getpid()) in beside.name
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_write(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(DgemmaError if isinstance(error, OSError) else error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_writers_of_one_path_do_not_see_each_other(tmp_path):
    """Blocks that are open at the same time, in the order in which they end."""
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        with atomic_write(path) as second:
            assert first != second
            second.write_text("second")
            first.write_text("first")
        assert path.read_text() == "second"
        assert first.exists()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_failed_writer_takes_nothing_from_another_one(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as good:
        with pytest.raises(KeyError), atomic_write(path) as bad:
            bad.write_text("bad")
            raise KeyError
        good.write_text("good")
    assert path.read_text() == "good"
    assert names(tmp_path) == ["a.txt"]


def test_many_threads_write_one_path(tmp_path):
    path, threads, rounds = tmp_path / "a.txt", 8, 25
    texts = {str(number) * 5000 for number in range(threads)}
    problems: list[Exception] = []
    barrier = threading.Barrier(threads)

    def work(number):
        barrier.wait()
        try:
            for _ in range(rounds):
                write(path, str(number) * 5000)
                assert path.read_text() in texts
        except Exception as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert problems == []
    assert path.read_text() in texts
    assert names(tmp_path) == ["a.txt"]


def test_many_processes_write_one_path(tmp_path):
    path = tmp_path / "a.txt"
    code = ("import sys; from dgemma.files import atomic_write\n"
            "for _ in range(100):\n"
            "    with atomic_write(sys.argv[1]) as beside: beside.write_text(sys.argv[2] * 5000)")
    running = [subprocess.Popen([sys.executable, "-c", code, path, str(number)]) for number in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert path.read_text() in {str(number) * 5000 for number in range(3)}
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "🦆" * 63], ids=["ascii", "two bytes", "four bytes"])
def test_a_name_as_long_as_names_can_be(tmp_path, name):
    write(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_known_before_the_work(tmp_path):
    with pytest.raises(DgemmaError, match="File name too long"), atomic_write(tmp_path / ("x" * 256)):
        pytest.fail("nobody works for a file that cannot be")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_the_umask_s_whatever_the_writer_does(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a") as beside:
            beside.unlink()
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("path", ["", ".", "..", "/", "folder", "folder/"])
def test_a_folder_is_refused(tmp_path, working_folder, path):
    working_folder(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DgemmaError, match="this is a folder") as caught:
        write(path, "")
    assert str(caught.value).startswith(f"{Path(path)}: cannot be written")
    assert names(tmp_path) == ["folder"]


def test_a_device_is_refused_and_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(DgemmaError, match="not a regular file"):
            write(path, "")
    assert not Path("/dev/null").is_file()
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize(("name", "words"), [
    ("none/a", "No such file or directory"),
    ("x" * 300, "File name too long"),
    ("a\0b", "NUL"),
])
def test_what_cannot_be_opened(tmp_path, name, words):
    with pytest.raises(DgemmaError, match=f"cannot be written.*{words}"):
        write(tmp_path / name, "")
    assert names(tmp_path) == []


def test_a_lone_surrogate_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"a: cannot be written: '\\udc80' at character 2 has no utf-8 form"):
        write(tmp_path / "a", "ab\udc80")
    assert names(tmp_path) == []


def test_folders(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    make_folder(str(tmp_path / "a"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(DgemmaError, match="this folder cannot be made"):
            make_folder(path)


def test_json_reads_back_the_same():
    assert json_bytes({"a": ["ä", 1]}) == '{"a":["ä",1]}'.encode()
    assert json_bytes({"a": 1}, indent=2) == b'{\n  "a": 1\n}'
    assert json.loads(json_bytes(["ä\ud800"])) == ["ä\ud800"]


def test_a_file_is_read_in_pieces(tmp_path):
    (tmp_path / "x").write_bytes(b"abcdefg")
    assert [bytes(piece) for piece in read_pieces(tmp_path / "x", 1, 5, 2, "w")] == [b"bc", b"de", b"f"]
    assert list(read_pieces(tmp_path / "x", 1, 0, 2, "w")) == []
    with pytest.raises(CheckpointError, match="x: the data of w ends early"):
        list(read_pieces(tmp_path / "x", 4, 5, 2, "w"))
    with pytest.raises(CheckpointError, match="y: cannot be read"):
        list(read_pieces(tmp_path / "y", 0, 5, 2, "w"))


def test_free_space_of_a_folder_that_is_still_to_be_made(tmp_path):
    assert abs(free_space(tmp_path / "a" / "b") - free_space(tmp_path)) < 1 << 30
