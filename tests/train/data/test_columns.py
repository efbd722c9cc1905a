"""Pictures in the parts of messages and in columns: paths as seen from here, Arrow's bytes, each in its place."""

import base64
from pathlib import Path

import pytest

from dgemma.errors import DgemmaError
from dgemma.train.data.conversations import conversation_of, read_conversations
from support.pictures import as_file, random_picture
from train.data.test_conversations import write_lines

SAID = {"prompt": "What?", "response": "This."}


def parts_of(conversation, index=0):
    return conversation.messages[index]["content"]


def test_paths_are_relative_to_the_file_of_the_row(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(b"x").decode()
    content = [{"type": "image", "path": "a.png"}, {"type": "image", "image": "b/c.png"},
               {"type": "image", "path": "/d.png"}, {"type": "image", "image": url}, "What?"]
    data = write_lines(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": content},
                                                           {"role": "assistant", "content": "This."}]})
    [conversation] = read_conversations(data).rows
    assert parts_of(conversation) == [
        {"type": "image", "path": str(tmp_path / "a.png")}, {"type": "image", "path": str(tmp_path / "b" / "c.png")},
        {"type": "image", "path": "/d.png"}, {"type": "image", "url": url}, "What?"]


@pytest.mark.parametrize("column", [{"image": "a.png"}, {"images": ["a.png"]}, {"images": [{"path": "a.png"}]}],
                         ids=repr)
def test_a_column_s_picture_stands_before_the_first_words(column):
    first = {"type": "image", "path": "a.png"}
    assert parts_of(conversation_of({**SAID, **column})) == [first, {"type": "text", "text": "What?"}]
    talk = conversation_of({**column, "conversations": [{"from": speaker, "value": "x"} for speaker in
                                                        ("system", "human", "gpt", "human", "gpt")]})
    assert parts_of(talk, 1) == [first, {"type": "text", "text": "x"}]
    assert parts_of(talk, 3) == "x"


def test_a_relative_folder_is_put_before_a_path_once():
    folder, first = Path("scans"), {"type": "image", "path": "scans/a.png"}
    assert parts_of(conversation_of({**SAID, "image": "a.png"}, folder=folder))[0] == first
    empty = {"messages": [{"role": "user", "content": [{"type": "image"}, "x"]}, {"role": "assistant", "content": "y"}]}
    assert parts_of(conversation_of({**empty, "image": "a.png"}, folder=folder))[0] == first


def test_columns_fill_parts_without_a_source_in_order():
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]}
    row = {"messages": [message, {"role": "assistant", "content": "This."}], "images": ["a.png", b"b"]}
    assert parts_of(conversation_of(row)) == [{"type": "image", "path": "a.png"}, {"type": "text", "text": "and"},
                                              {"type": "image", "image": b"b"}]
    with pytest.raises(DgemmaError, match="2 parts of the messages .* without a source, and the columns .* hold 1"):
        conversation_of({**row, "images": ["a.png"]})


def test_columns_fill_marks_in_texts():
    talk = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}
    first = {"type": "image", "path": "a.png"}
    assert parts_of(conversation_of({**talk, "image": "a.png"})) == [first, {"type": "text", "text": "What?"}]
    assert parts_of(conversation_of(talk)) == "<image>\nWhat?"
    with pytest.raises(DgemmaError, match="1 parts of the messages .* hold 2"):
        conversation_of({**talk, "images": ["a.png", "b.png"]})


def test_tokens_are_those_of_the_data_but_where_a_picture_says_its_own():
    row = {**SAID, "image": "a.png"}
    assert parts_of(conversation_of(row, image_tokens=70))[0]["tokens"] == 70
    own = {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png", "tokens": 280}, "x"]},
                        {"role": "assistant", "content": "This."}]}
    assert parts_of(conversation_of(own, image_tokens=70))[0]["tokens"] == 280


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_image_columns_of_datasets_come_as_their_files_bytes(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    pictures = [random_picture(20, 10, seed=seed) for seed in range(2)]
    features = datasets.Features({"prompt": datasets.Value("string"), "response": datasets.Value("string"),
                                  "images": [datasets.Image()]})
    data = datasets.Dataset.from_list([{**SAID, "images": [picture]} for picture in pictures], features=features)
    if kind == "folder":
        data.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        data.to_parquet(tmp_path / "data" / "x.parquet")
    rows = read_conversations(tmp_path / "data").rows
    assert [parts_of(row)[0]["image"] for row in rows] == [as_file(picture, "PNG") for picture in pictures]


def test_the_metadata_of_an_image_folder_names_its_pictures(tmp_path):
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a/0.png", **SAID},
                {"images_file_names": ["0.png", "1.png"], **SAID}, {"file_name": "film.mp4", **SAID})
    one, two, film = (parts_of(conversation) for conversation in read_conversations(tmp_path).rows)
    assert one == [{"type": "image", "path": str(tmp_path / "a" / "0.png")}, {"type": "text", "text": "What?"}]
    assert [part.get("path") for part in two] == [str(tmp_path / "0.png"), str(tmp_path / "1.png"), None]
    assert film[0] == {"type": "video", "path": str(tmp_path / "film.mp4")}
    write_lines(tmp_path / "other.jsonl", {"file_name": "0.png", **SAID})  # where it is a column like any other
    assert parts_of(read_conversations(tmp_path / "other.jsonl").rows[0]) == "What?"


@pytest.mark.parametrize("column", ["text", "caption"])
def test_a_picture_with_a_caption_is_answered_with_it(column):
    conversation = conversation_of({"image": "a.png", column: "A cat."})
    assert parts_of(conversation) == [{"type": "image", "path": "a.png"}]
    assert parts_of(conversation, 1) == "A cat."
    with pytest.raises(DgemmaError, match="no known form"):
        conversation_of({column: "A cat."})


def test_pairs_of_questions_and_answers_about_a_row_s_pictures():
    texts = [{"user": "What?", "assistant": "This.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    conversation = conversation_of({"images": ["a.png"], "texts": texts})
    assert parts_of(conversation) == [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    assert [message["content"] for message in conversation.messages[1:]] == ["This.", "Sure?", "Yes."]
    assert conversation.trained == (1, 3)


def test_a_column_of_paths_is_that_of_the_pictures_where_there_is_no_other():
    assert parts_of(conversation_of({**SAID, "image_path": "a.png"}))[0] == {"type": "image", "path": "a.png"}
    both = parts_of(conversation_of({**SAID, "image": b"x", "image_path": "a.png"}))
    assert both == [{"type": "image", "image": b"x"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize("value", [{"bytes": b"x", "path": None}, [{"bytes": b"x"}]], ids=repr)
def test_pictures_in_a_column_of_another_name_are_not_passed_over(value):
    with pytest.raises(DgemmaError, match="column 'img' holds a picture or film, which are taken from columns called"):
        conversation_of({**SAID, "img": value})
