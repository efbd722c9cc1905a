"""Pictures and films on the command line: `run --image`, `/image` and dropped paths in `chat`, `inspect --image`."""

import json

import pytest

from dgemma.cli.media import dropped, sent
from dgemma.errors import DgemmaError
from support.films import film
from support.openai_server import OpenAIStandIn
from support.pictures import as_file, random_picture
from support.vision import save_seeing_model

QUICK = ("--max-tokens", "4", "--max-denoising-steps", "1")
PICTURE = as_file(random_picture(60, 50), "PNG")
TOKENS = 9 * 7  # of this picture, of 70 that it may have


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PICTURE)
    return path


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(film(60))
    return path


@pytest.fixture
def run(dgemma_command, seeing):
    return lambda *arguments, **more: dgemma_command("run", "-m", seeing, *QUICK, *arguments, **more)


@pytest.fixture
def chat(dgemma_command, seeing):
    """A function that pipes lines into `dgemma chat` on a model, one that sees unless another is named."""
    def talk(*lines, model=seeing):
        return dgemma_command("chat", "-m", model, *QUICK, stdin="".join(f"{line}\n" for line in lines))

    return talk


def prompt_tokens(outcome):
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["prompt_tokens"]


def messages_of(path):
    return json.loads(path.read_text())["messages"]


def test_run_shows_pictures_and_a_film(run, picture, video):
    plain = prompt_tokens(run("--json", "Hi"))
    shown = ("--json", "--image-tokens", "70", "--image", picture)
    assert prompt_tokens(run(*shown, "Hi")) - plain > TOKENS
    one, two = (prompt_tokens(run(*shown * count, "Hi")) for count in (1, 2))
    assert two - one > TOKENS
    slow, fast = (prompt_tokens(run("--json", "--video", video, "--fps", fps, "Hi")) for fps in (1, 2))
    assert fast > slow > plain + 2 * 40


def test_a_picture_may_come_on_stdin(run, picture):
    on_stdin = run("--json", "--image", "-", "Hi", stdin=PICTURE)
    assert prompt_tokens(on_stdin) == prompt_tokens(run("--json", "--image", picture, "Hi"))


@pytest.mark.parametrize(("stdin", "words"), [(b"", "there is nothing in it"), (PICTURE[:50], "damaged or cut off")])
def test_what_stdin_holds_and_is_no_picture_is_said(run, stdin, words):
    outcome = run("--image", "-", "Hi", stdin=stdin)
    assert outcome.code == 1 and outcome.err.startswith("Error: the picture on stdin: ") and words in outcome.err


@pytest.mark.parametrize(("arguments", "words"), [
    (("--image", "-"), "stdin holds one picture"),
    (("--image", "-", "--image", "-", "Hi"), "stdin holds one picture"),
    (("--video", "-", "Hi"), "stdin holds one picture"),
    (("--image", "missing.png", "Hi"), "missing.png: cannot be read (No such file"),
    (("--fps", "1", "Hi"), "--fps is for a film"),
    (("--image-tokens", "70", "Hi"), "--image-tokens is for pictures"),
    (("--image", __file__, "--image-tokens", "71", "Hi"), "70, 140, 280, 560 or 1120"),
    (("--image", __file__, "Hi"), "not a picture"),
])
def test_what_cannot_be_shown_is_said(run, arguments, words):
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ") and words in outcome.err


def test_what_is_no_picture_is_said_before_a_model_is_loaded(dgemma_command):
    outcome = dgemma_command("run", "-m", "no-such-model", "--image", __file__, "Hi")
    assert outcome.code == 1 and "test_media.py" in outcome.err


def test_a_model_without_a_tower_says_so(dgemma_command, checkpoint, chat, picture):
    outcome = dgemma_command("run", "-m", checkpoint, "--image", picture, "Hi")
    assert outcome.code == 1 and "sees no pictures" in outcome.err
    outcome = chat(f"/image {picture}", model=checkpoint)
    assert outcome.code == 1 and "sees no pictures" in outcome.err
    outcome = dgemma_command("inspect", checkpoint, "--image", picture)
    assert outcome.code == 1 and "sees no pictures" in outcome.err


def test_what_is_shown_in_a_chat_goes_along_with_the_next_message(chat, picture, video, tmp_path):
    kept = tmp_path / "kept.json"
    outcome = chat(f"/image {picture} --image-tokens 70", f'/video "{video}" --fps 2', "Hi", "Again", f"/save {kept}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "a picture.png, 60 × 50 pixels: shown with the next message" in outcome.out
    first, _, second, _ = messages_of(kept)
    assert first["content"] == [{"type": "image", "path": str(picture), "tokens": 70},
                                {"type": "video", "path": str(video), "fps": 2.0}, {"type": "text", "text": "Hi"}]
    assert second["content"] == "Again"
    assert chat(f"/load {kept}", "More").code == 0


def test_a_dropped_path_is_shown(chat, picture, tmp_path):
    kept = tmp_path / "kept.json"
    assert chat(str(picture).replace(" ", "\\ "), f"/save {kept}").code == 0
    assert messages_of(kept) == [{"role": "user", "content": [{"type": "image", "path": str(picture)}]}]
    assert chat(f"/{picture}", f"/save {kept}").code == 0  # a slash more: it is sent as it is
    assert messages_of(kept)[0]["content"] == str(picture)


def test_dropped_paths_in_any_form(picture, video, tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    for written in (f"{picture}", f"'{picture}'", f'"{picture}" ', picture.as_uri(), str(picture).replace(" ", "\\ ")):
        assert dropped(written) == ("image", picture), written
    assert dropped(str(video)) == ("video", video)
    for other in ("", "What is a.png?", f"{picture} {picture}", str(tmp_path / "notes.txt"), "missing.png", "'.png",
                  "a\0.png", f"{tmp_path}/{'x' * 300}.png", "~nobody-of-this-name/a.png"):
        assert dropped(other) is None, other


def test_a_picture_that_cannot_be_seen_does_not_stay_in_a_chat(chat, video, tmp_path):
    broken, kept = tmp_path / "broken.mp4", tmp_path / "kept.json"
    broken.write_bytes(video.read_bytes()[:200])
    outcome = chat(f"/image {broken}", f"/video {broken}", "Hi", "Again", f"/save {kept}")
    assert outcome.code == 1 and outcome.err.count("Error: ") == 2
    assert [message["content"] for message in messages_of(kept) if message["role"] == "user"] == ["Again"]


@pytest.mark.parametrize(("line", "words"), [
    ("/image", "takes a file name"), ("/image missing.png", "cannot be read"),
    ("/image PICTURE --image-tokens 71", "70, 140"), ("/image PICTURE --image-tokens x", "takes a whole number"),
    ("/image -", "cannot be read"),
])
def test_mistakes_are_said(chat, picture, line, words):
    outcome = chat(line.replace("PICTURE", str(picture)))
    assert outcome.code == 1 and words in outcome.err


def test_a_server_gets_what_is_shown(dgemma_command, picture):
    with OpenAIStandIn() as server:
        assert dgemma_command("run", "--url", server.url, "--image", picture, "Hi").code == 0
        parts = server.bodies[-1]["messages"][0]["content"]
        assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        assert parts[1] == {"type": "text", "text": "Hi"}
        outcome = dgemma_command("run", "--url", server.url, "--image", picture, "--image-tokens", "70", "Hi")
        assert outcome.code == 1 and "--image-tokens is for a model on this machine" in outcome.err


def test_what_is_sent_of_a_part(video):
    url = sent([{"role": "user", "content": [{"type": "video", "path": str(video)}]}])[0]["content"][0]["video_url"]
    assert url["url"].startswith("data:video/mp4;base64,")
    with pytest.raises(DgemmaError, match="--fps is for a model on this machine"):
        sent([{"role": "user", "content": [{"type": "video", "path": str(video), "fps": 1}]}])
    with pytest.raises(DgemmaError, match="gone.png: cannot be read"):
        sent([{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}])


def test_inspect_tells_a_pictures_tokens(dgemma_command, seeing, picture):
    outcome = dgemma_command("inspect", seeing, "--image", picture)
    assert outcome.code == 0 and "a picture.png, 60 × 50 pixels" in outcome.out
    told = json.loads(dgemma_command("inspect", seeing, "--image", picture, "--json").out)["picture"]
    assert (told["width"], told["height"]) == (60, 50)
    assert told["fits"][0] == {"budget": 70, "width": 432, "height": 336, "tokens": TOKENS}
    assert [fit["budget"] for fit in told["fits"]] == [70, 140, 280, 560, 1120]
