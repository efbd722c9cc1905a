"""Pictures stand where the model will see them in use; their pixels are made when they are needed, or it is said why
not."""

import dataclasses
import re

import pytest

import dgemma
from dgemma.cli.terminal.preview import preview
from dgemma.errors import DgemmaError
from dgemma.model import read_parts, seeing
from dgemma.train.data.conversations import read_conversations
from dgemma.train.data.examples import prepare
from dgemma.train.data.sources import fingerprint
from dgemma.train.sights import PreparedPictures, pictures_of
from support.films import film
from support.pictures import as_file, random_picture
from support.seeing import captioned, save_captions, save_pupil
from train.data.test_conversations import write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pupil(tmp_path_factory.mktemp("pupil"))


@pytest.fixture(scope="module")
def parts(folder):
    return read_parts(folder)


def prepared(parts, data, **options):
    return prepare(read_conversations(data, skip_bad=options.get("skip_bad", False)).rows, parts.tokenizer,
                   parts.config.canvas_length, stop_ids=parts.generation_config.eos_token_id,
                   pictures=PreparedPictures.of(seeing(parts)[0]), **options)


def test_the_context_is_the_prompt_that_the_model_gets(folder, parts, tmp_path):
    random_picture(60, 50).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_bytes(film(90, 30))
    message = {"role": "user", "content": [{"type": "image", "path": "a.png", "tokens": 140},
                                           {"type": "video", "path": "b.mp4"}, {"type": "text", "text": "What?"}]}
    data = write_lines(tmp_path / "d.jsonl", {"messages": [message, {"role": "assistant", "content": "This."}]})
    [example] = prepared(parts, data).examples
    asked = [{**message, "content": [{**part, "path": str(tmp_path / part["path"])} if "path" in part else part
                                     for part in message["content"]]}]
    request = dgemma.load(folder).request(asked)
    assert example.context_ids == request.prompt_ids
    assert [(sight.start, sight.stop) for sight in example.sights] == [(s.start, s.stop) for s in request.spans]
    assert [p.digest for p in pictures_of(example.sights)] == [span.digest for span in request.spans]


def test_sideways_pictures_are_measured_upright(parts, tmp_path):
    from PIL import Image

    image, exif = random_picture(90, 40), Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        (tmp_path / "turned").write_bytes(as_file(image, kind, exif=exif))
        data = write_lines(tmp_path / "d.jsonl", captioned("turned", "A bar"))
        [sight] = prepared(parts, data).examples[0].sights
        assert sight.size[0] < sight.size[1] and pictures_of([sight])[0].tokens == sight.tokens


def test_a_picture_that_cannot_be_read_is_named_or_left_out(parts, tmp_path):
    random_picture(60, 50).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    data = write_lines(tmp_path / "d.jsonl", captioned("good.png", "Good"), captioned("bad.png", "Bad"),
                       captioned("https://x.org/a.png", "Far"))
    with pytest.raises(DgemmaError, match=r"d.jsonl:2, message 1: .*bad.png: this is not a picture"):
        prepared(parts, data)
    found = prepared(parts, data, skip_bad=True)
    assert len(found.examples) == 1 and len(found.skipped) == 2
    assert "d.jsonl:3, message 1: image 1: only data URLs" in found.skipped[1]


def test_damage_behind_the_header_is_named_when_the_picture_is_due(parts, tmp_path):
    data = save_captions(tmp_path / "data")
    whole = as_file(random_picture(600, 500), "JPEG")
    (tmp_path / "data" / "0.png").write_bytes(whole[: len(whole) // 2])
    [sight] = prepared(parts, data).examples[0].sights
    with pytest.raises(DgemmaError, match=r"captions.jsonl:1, message 1: .*0.png: this picture is damaged"):
        pictures_of([sight])


def test_a_picture_that_changed_since_is_not_put_in_its_place(parts, tmp_path):
    data = save_captions(tmp_path / "data")
    [sight] = prepared(parts, data).examples[0].sights
    random_picture(500, 20).save(tmp_path / "data" / "0.png")
    with pytest.raises(DgemmaError, match=r"captions.jsonl:1, message 1: 0.png has another size than"):
        pictures_of([sight])


def test_a_film_is_decoded_once_for_all_turns_and_epochs(parts, tmp_path):
    (tmp_path / "a.mp4").write_bytes(film(90, 30))
    asked = [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}]
    said = {"role": "assistant", "content": "This."}
    data = write_lines(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": asked}, said,
                                                           {"role": "user", "content": "Sure?"}, said]})
    first, second = prepared(parts, data).examples
    (tmp_path / "a.mp4").unlink()
    frames = pictures_of(first.sights)
    assert len(frames) == 3 and all(a is b for a, b in zip(frames, pictures_of(second.sights), strict=True))
    assert first.sights[0].medium.prepared.made == 1


def test_pixels_are_kept_as_far_as_they_may_be_and_then_stay(parts, tmp_path):
    data = save_captions(tmp_path / "data")
    one, other = (example.sights for example in prepared(parts, data).examples)
    pictures = one[0].medium.prepared
    assert pictures.nbytes == 0  # of pictures only sizes were needed so far
    size = pictures_of(one)[0].pixels.nbytes
    pictures.kept = 2 * size - 1
    for _ in range(2):
        pictures_of(one)
        pictures_of(other)
    assert (pictures.made, pictures.nbytes) == (3, size)


def test_one_picture_is_prepared_once_for_each_size_that_it_is_seen_at(parts, tmp_path):
    random_picture(1600, 1500).save(tmp_path / "a.png")
    data = write_lines(tmp_path / "d.jsonl", *(captioned("a.png", "A", words) for words in
                                               ("What?", "Read the small print", "Who?")))
    one, other, again = (example.sights for example in prepared(parts, data).examples)
    assert pictures_of(one)[0] is pictures_of(again)[0] and pictures_of(one)[0].tokens < pictures_of(other)[0].tokens
    assert one[0].medium.prepared.made == 2


def test_a_shortened_context_cuts_no_picture(parts, tmp_path):
    turn = prepared(parts, save_captions(tmp_path / "data")).examples[0].turn
    [sight] = turn.sights
    for most in (1, 20, len(turn.context_ids) - 1, 10**6):
        end = turn.ending(most)
        [kept] = end.sights
        assert end.context_ids[kept.start : kept.stop] == turn.context_ids[sight.start : sight.stop]
        assert len(end.context_ids) >= min(most, len(turn.context_ids))
        assert turn.context_ids[-len(end.context_ids):] == end.context_ids
    twice = dataclasses.replace(turn, context_ids=turn.context_ids * 2, sights=(
        sight, dataclasses.replace(sight, start=sight.start + len(turn.context_ids))))
    end = twice.ending(2 * len(turn.context_ids) - sight.start - 5)  # in the middle of the first one
    assert len(end.sights) == 2 and end.context_ids == twice.context_ids[sight.start - 1 :]


def test_other_pictures_are_other_data(parts, tmp_path):
    one, other = (prepared(parts, save_captions(tmp_path / name)).examples for name in ("one", "other"))
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert one[0].context_ids == other[0].context_ids


def test_the_preview_names_pictures(parts, tmp_path):
    text = next(preview(prepared(parts, save_captions(tmp_path / "data")).examples, parts.tokenizer)).plain
    assert re.search(r"picture at \d+: 0.png, seen as 432 × 336 pixels in 63 soft tokens", text)
    assert "<|image>" in text and "[63 soft tokens]" in text and "<|image|>" not in text
