"""Files of conversations: kept once, shown as previews, carried by exports, gone with the last conversation."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dgemma.errors import DgemmaError
from dgemma.studio.exchange import export_json, export_markdown, import_file
from dgemma.studio.media import MediaFolder
from dgemma.studio.store import Store
from support.films import film
from support.pictures import as_file, random_picture


def png(seed=0):
    return as_file(random_picture(60, 50, seed=seed), "PNG")


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture
def shown(store):
    """A conversation in which a picture was shown, and its part."""
    part = store.media.put_seen(png(), "holiday.png")
    chat = store.new_conversation("Holiday")
    store.add_message(chat.id, "user", [part, {"type": "text", "text": "Where is this?"}])
    return chat, part


def test_a_picture_is_kept_once_and_its_preview_is_made_of_its_pixels(store):
    data = png() + b"<script>alert(1)</script>"  # behind the picture's end
    part, again = store.media.put_seen(data, "../a/b.png"), store.media.put_seen(data, "c.png")
    assert part["media"] == again["media"] and store.media.names() == {part["media"]}
    assert (part["type"], part["name"]) == ("image", "b.png")
    assert store.media.read(part) == data
    preview = store.media.preview(part["media"]).read_bytes()
    assert b"script" not in preview
    assert Image.open(io.BytesIO(preview)).size == (60, 50)


def test_large_pictures_have_smaller_previews(store):
    part = store.media.put_seen(as_file(Image.new("RGB", (4000, 1000)), "PNG"), "wide.png")
    assert Image.open(store.media.preview(part["media"])).size == (1600, 400)


def test_a_film_is_seen_as_its_first_frame(store):
    part = store.media.put_seen(film(3), "film.mp4")
    assert part["type"] == "video"
    assert Image.open(store.media.preview(part["media"])).format == "WEBP"


@pytest.mark.parametrize(("data", "name"), [(b"<svg onload='alert(1)'/>", "a.svg"), (b"text", "a.png"), (b"", "a")])
def test_what_is_no_picture_is_refused_by_name(store, data, name):
    with pytest.raises(DgemmaError, match=name):
        store.media.put_seen(data, name)
    assert store.media.names() == set()


def test_files_have_a_largest_size(tmp_path):
    with pytest.raises(DgemmaError, match="at most"):
        MediaFolder(tmp_path, {"image": 100, "video": 100}).put_seen(png(), "a.png")


@pytest.mark.parametrize("name", ["../studio.db", "a" * 63, "A" * 64, ""])
def test_names_lead_nowhere_else(store, name):
    with pytest.raises(DgemmaError):
        store.media.path(name)


def test_files_go_with_the_last_conversation_that_has_them(store, shown):
    chat, part = shown
    other = store.new_conversation("Other")
    store.add_message(other.id, "user", [part])
    store.delete_conversation(chat.id)
    assert store.media.names() == {part["media"]}
    store.delete_conversation(other.id)
    assert list(store.media.folder.iterdir()) == []


def test_files_that_were_never_sent_are_forgotten(store, shown):
    _, part = shown
    store.media.put_seen(png(1), "chosen.png")
    other = store.new_conversation("Words")
    store.add_message(other.id, "user", f'he wrote "media":"{"0" * 64}"')
    store.forget_media()
    assert store.media.names() == {part["media"]}


def test_json_carries_pictures_to_another_studio(store, shown, tmp_path):
    chat, part = shown
    elsewhere = Store(tmp_path / "other")
    (again,) = import_file(elsewhere, export_json(store, [chat.id]))
    (message,) = elsewhere.messages(again.id)
    assert message.content == [part, {"type": "text", "text": "Where is this?"}]
    assert elsewhere.media.read(part) == store.media.read(part)
    elsewhere.close()


def test_markdown_says_where_a_picture_was(store, shown):
    assert "*[image: holiday.png]*\n\nWhere is this?" in export_markdown(store, shown[0].id)


@pytest.mark.parametrize("url", ["https://example.org/a.png", "data:image/png;base64,AA=A",
                                 "data:image/png;base64,AAAA"])
def test_a_picture_that_is_none_is_not_brought_in(store, shown, url):
    data = json.loads(export_json(store, [shown[0].id]))
    data["conversations"][0]["messages"][0]["content"][0]["url"] = url
    with pytest.raises(DgemmaError):
        import_file(store, json.dumps(data).encode())
    assert len(store.conversations()) == 1


def test_a_file_allows_no_tools(store):
    chat = store.new_conversation("Chat", options={"seed": 1, "tools": {"python": "auto", "mcp:files": "auto"}})
    (again,) = import_file(store, export_json(store, [chat.id]))
    assert again.options == {"seed": 1}


def test_pixels_reach_the_model_as_they_were_given(store):
    part = store.media.put_seen(png(), "a.png")
    with Image.open(io.BytesIO(store.media.read(part))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(random_picture(60, 50, seed=0)))
