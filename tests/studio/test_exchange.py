"""Conversations as files, there and back."""

import json

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.exchange import export_json, export_markdown, import_file
from dgemma.studio.store import Store


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def chat(store):
    conversation = store.new_conversation("Two branches", system="Be brief.")
    asked = store.add_message(conversation.id, "user", "Hello\n\n## Not a heading of ours")
    store.add_message(conversation.id, "assistant", "Hi.", parent=asked.id)
    store.add_message(conversation.id, "assistant", "Good day.", parent=asked.id, reasoning="Formal?")
    return conversation


def spoken(store, conversation):
    return [(message.role, message.text, message.reasoning) for message in store.branch(conversation.id)]


def test_json_brings_back_every_branch_under_new_ids(store, chat):
    (again,) = import_file(store, export_json(store, [chat.id]))
    assert again.id != chat.id and (again.title, again.system) == (chat.title, chat.system)
    assert spoken(store, again) == spoken(store, chat)
    assert len(store.messages(again.id)) == 3


def test_markdown_brings_back_the_branch_that_was_shown(store, chat):
    (again,) = import_file(store, export_markdown(store, chat.id).encode())
    assert (again.title, again.system) == ("Two branches", "Be brief.")
    assert spoken(store, again) == spoken(store, chat)


@pytest.mark.parametrize(("data", "why"), [
    (b"\xff\xfe\x00", "no text"),
    (b"{", "damaged JSON"),
    (b"{}", "no conversations"),
    (b"# Notes\n\nnothing here", "no conversation"),
    (b'{"format": "dgemma-conversations", "version": 99}', "version 99"),
    (b'{"format": "dgemma-conversations", "version": 1}', "damaged"),
])
def test_another_file_is_refused(store, data, why):
    with pytest.raises(DgemmaError, match=why):
        import_file(store, data)
    assert store.conversations() == []


@pytest.mark.parametrize(("field", "value"), [
    ("role", "system"), ("status", "odd"), ("parent", "nobody"), ("content", 7), ("created", "yesterday"),
    ("info", [])])
def test_a_message_that_cannot_be_is_refused(store, chat, field, value):
    data = json.loads(export_json(store, [chat.id]))
    data["conversations"][0]["messages"][1][field] = value
    with pytest.raises(DgemmaError, match="damaged"):
        import_file(store, json.dumps(data).encode())
    assert len(store.conversations()) == 1
