"""Rows of every form and file become conversations; a bad one is named, or counted."""

import gzip
import json
import subprocess
import sys

import pytest

from dgemma.errors import DgemmaError
from dgemma.train.data.conversations import conversation_of, read_conversations, without_nulls

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
SAID = [("user", "Hi"), ("assistant", "Hello")]


def said(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "expected"), [
    (CHAT, SAID),
    ({"conversations": CHAT["messages"]}, SAID),
    ({"messages": json.dumps(CHAT["messages"])}, SAID),
    ({"prompt": "Hi", "response": "Hello"}, SAID),
    ({"question": "Hi", "answer": "Hello", "system": "S"}, [("system", "S"), *SAID]),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, SAID),
    ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, SAID),
    ({"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
     [("system", "S"), *SAID]),
])
def test_every_form_is_told_by_its_columns(row, expected):
    assert said(conversation_of(row)) == expected


def test_messages_win_over_other_columns():
    assert said(conversation_of({**CHAT, "prompt": "What?", "response": "This."})) == SAID


def test_sharegpt_tools_become_calls_and_answers():
    found = conversation_of({
        "tools": '[{"name": "now", "parameters": {}}]',
        "conversations": [{"from": "human", "value": "Time?"},
                          {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
                          {"from": "observation", "value": "noon"},
                          {"from": "gpt", "value": "Noon."}]})
    assert found.tools[0]["function"]["name"] == "now"
    assert found.messages[1]["tool_calls"][0]["arguments"] == {"zone": "UTC"}
    assert found.messages[2] == {"role": "tool", "content": "noon", "name": "now"}
    assert found.trained == (1, 3)


def test_an_assistant_message_of_weight_0_is_not_learnt_from():
    row = {"messages": [*CHAT["messages"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    assert conversation_of(row).trained == (1, 3)
    row["messages"][1] = dict(row["messages"][1], weight=0)
    found = conversation_of(row)
    assert found.trained == (3,)
    assert all("weight" not in message for message in found.messages)


def test_what_a_prompt_of_messages_says_is_given_not_learnt():
    row = {"prompt": [*CHAT["messages"], {"role": "user", "content": "?"}],
           "completion": [{"role": "assistant", "content": "!"}]}
    assert conversation_of(row).trained == (3,)


@pytest.mark.parametrize(("row", "wrong"), [
    ([], "object with named columns"),
    ({"text": "x"}, "columns text are no known form"),
    ({"prompt": "a", "answer": "b", "output": "c"}, "both 'output' and 'answer' could be the response"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "speaks first"),
    ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": "  "}]}, "message 1: the assistant says noth"),
    ({"messages": [{"role": "alien", "content": "a"}]}, "unknown role 'alien'"),
    ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": [{"type": "image", "url": "x"}, "This"]}]},
     "1: the assistant cannot show images"),
    ({**CHAT, "images": "x.png"}, "column 'images' must be a list, not str"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, "What?"]}, CHAT["messages"][1]]},
     "1 parts of the messages are pictures or films without a source, and the columns .* hold 0"),
    ({**CHAT, "image": {"name": "x"}}, "a part's image is an object, but has no bytes, path or url"),
    ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": "a", "weight": 2}]}, "weight must be 0 or 1"),
    ({"conversations": [{"from": "bird", "value": "a"}]}, "unknown `from` 'bird'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}, "needs a `name`"),
    ({**CHAT, "tools": "[{"}, "tools is text, but no JSON"),
])
def test_a_bad_row_says_what_is_wrong(row, wrong):
    with pytest.raises(DgemmaError, match="^data:7: .*" + wrong.replace("`", ".")):
        conversation_of(row, where="data:7")


def test_a_bad_line_is_named_or_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", CHAT, "", '{"messages": [', {"text": "x"}, CHAT)
    with pytest.raises(DgemmaError, match=r"a\.jsonl:3: not valid JSON"):
        read_conversations(path)
    found = read_conversations(path, skip_bad=True)
    assert [row.where.rpartition(":")[2] for row in found.rows] == ["1", "5"]
    assert len(found.bad) == 2
    assert "a.jsonl:4: columns text" in found.bad[1]


def test_nothing_usable_is_an_error_even_when_bad_rows_are_skipped(tmp_path):
    with pytest.raises(DgemmaError, match="no conversation to train on .1 bad rows; the first: .*a.jsonl:1"):
        read_conversations(write_lines(tmp_path / "a.jsonl", {"text": "x"}), skip_bad=True)


def test_json_may_be_a_list_an_object_with_data_or_lines(tmp_path):
    for number, text in enumerate([json.dumps([CHAT, CHAT]), json.dumps({"data": [CHAT, CHAT]}),
                                   f"{json.dumps(CHAT)}\n{json.dumps(CHAT)}\n"]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        assert [said(row) for row in read_conversations(path).rows] == [SAID, SAID]


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "two.jsonl", {"prompt": "2", "response": "x"})
    write_lines(tmp_path / "a.ndjson", {"prompt": "1", "response": "x"})
    write_lines(tmp_path / ".hidden.jsonl", {"prompt": "0", "response": "x"})
    (tmp_path / "README.md").write_text("no data")
    assert [row.messages[0]["content"] for row in read_conversations(tmp_path).rows] == ["1", "2"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DgemmaError, match="nowhere.jsonl: no such file"):
        read_conversations(tmp_path / "nowhere.jsonl")
    packed = tmp_path / "a.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DgemmaError, match="a.gz: unknown kind of file"):
        read_conversations(packed)
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 no")
    pytest.importorskip("datasets")
    with pytest.raises(DgemmaError, match="a.parquet: cannot be read as Parquet"):
        read_conversations(broken)


def test_parquet_and_saved_datasets_give_the_rows_that_were_put_in(tmp_path):
    datasets = pytest.importorskip("datasets")
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    rows = [{"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": None, "tool_calls": [call]}]}, CHAT]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "splits")
    for source in (tmp_path / "rows.parquet", tmp_path / "saved", tmp_path / "splits"):
        found = read_conversations(source).rows
        assert found[0].messages[1]["tool_calls"] == [call]
        # Arrow gives the second answer a `tool_calls` of null, which templates would print.
        assert found[1].messages[1] == {"role": "assistant", "content": "Hello"}
    with pytest.raises(DgemmaError, match="no split 'test'; there are train"):
        read_conversations(tmp_path / "splits", split="test")


def test_a_name_on_the_hub_is_loaded_with_its_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([CHAT])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_conversations("org/name:small", split="test").rows
    assert asked == [(("org/name", "small"), {"split": "test"})]
    assert found[0].where == "org/name:small (test): row 1"


def test_jsonl_needs_no_library(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", CHAT)
    code = ("import sys\nsys.modules['datasets'] = sys.modules['pyarrow'] = sys.modules['torch'] = None\n"
            "from dgemma.train.data.conversations import read_conversations\n"
            f"assert len(read_conversations({str(path)!r}).rows) == 1\n"
            f"open({str(tmp_path / 'b.parquet')!r}, 'w').close()\n"
            f"try: read_conversations({str(tmp_path / 'b.parquet')!r})\n"
            "except Exception as error: assert 'datasets' in str(error), error\n"
            "else: raise AssertionError")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nulls_are_taken_out_of_objects_but_not_of_lists():
    assert without_nulls({"a": None, "b": [{"c": None, "d": 1}, None]}) == {"b": [{"d": 1}, None]}
