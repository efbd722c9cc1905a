"""What the studio keeps: a tree of messages, searched, carried over to new versions, whole after a kill."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio import migrations
from dgemma.studio.store import FILE, INTERRUPTED, Store, data_folder, title_of


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def chat(store):
    """A conversation of two messages, and these."""
    conversation = store.new_conversation("Rivers", system="Be brief.", options={"seed": 3})
    asked = store.add_message(conversation.id, "user", "How long is the Danube?")
    answered = store.add_message(conversation.id, "assistant", "2,850 km.", parent=asked.id, reasoning="Recall.")
    return conversation, asked, answered


def test_what_was_written_is_there_when_the_file_is_opened_again(store, chat, tmp_path):
    store.close()
    again = Store(tmp_path)
    conversation = again.conversation(chat[0].id)
    assert (conversation.title, conversation.system, conversation.options) == ("Rivers", "Be brief.", {"seed": 3})
    assert [(message.role, message.text) for message in again.branch(conversation.id)] == [
        ("user", "How long is the Danube?"), ("assistant", "2,850 km.")]
    again.close()


def test_the_file_is_for_its_owner_only(store, tmp_path):
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_an_answer_made_again_is_a_branch_beside_the_first(store, chat):
    conversation, asked, first = chat
    second = store.add_message(conversation.id, "assistant", "About 2,850 km.", parent=asked.id)
    assert [message.id for message in store.branch(conversation.id)] == [asked.id, second.id]
    assert [message.id for message in store.siblings(second)] == [first.id, second.id]
    store.switch(first.id)
    assert [message.id for message in store.branch(conversation.id)] == [asked.id, first.id]


def test_an_edited_question_begins_a_branch_of_its_own_and_switching_shows_all_of_it(store, chat):
    conversation, asked, answered = chat
    edited = store.add_message(conversation.id, "user", "And the Rhine?")
    reply = store.add_message(conversation.id, "assistant", "1,230 km.", parent=edited.id)
    store.switch(asked.id)
    assert [message.id for message in store.branch(conversation.id)] == [asked.id, answered.id]
    store.switch(edited.id)
    assert [message.id for message in store.branch(conversation.id)] == [edited.id, reply.id]


def test_a_message_cannot_follow_one_of_another_conversation(store, chat):
    other = store.new_conversation("Other")
    with pytest.raises(DgemmaError, match="not there any more"):
        store.add_message(other.id, "user", "Hello", parent=chat[1].id)
    assert store.messages(other.id) == []


def test_nothing_is_added_to_a_conversation_that_was_deleted(store, chat):
    store.delete_conversation(chat[0].id)
    assert store.messages(chat[0].id) == [] and store.message(chat[1].id) is None
    with pytest.raises(DgemmaError, match="deleted"):
        store.add_message(chat[0].id, "user", "Still here?")


@pytest.mark.parametrize("words", ["danube", "DANUBE long", "dan", "recall", "rivers"])
def test_search_finds_words_of_messages_thoughts_and_titles(store, chat, words):
    assert {found.conversation.id for found in store.search(words)} == {chat[0].id}


@pytest.mark.parametrize("words", ["", "  ", "rhine", '"', "danube OR rhine", "text:danube NEAR(", "100%", "a_b"])
def test_search_takes_every_word_as_it_is(store, chat, words):
    assert store.search(words) == []


def test_search_knows_of_changes_and_deletions(store, chat):
    conversation, asked, _ = chat
    store.change_message(asked.id, content="How long is the Elbe?")
    assert not store.search("danube") and store.search("elbe")
    store.delete_conversation(conversation.id)
    assert not store.search("elbe")


def test_search_works_without_an_index(store, chat):
    store._indexed = False
    assert [found.message for found in store.search("danube how")] == [chat[1].id]
    assert not store.search("danube%how")


def test_pinned_conversations_stand_first_then_those_that_changed_last(tmp_path):
    now = iter(range(100))
    store = Store(tmp_path, clock=lambda: next(now))
    first, second, third = (store.new_conversation(name) for name in "abc")
    store.change_conversation(second.id, pinned=True)
    store.add_message(first.id, "user", "news")
    assert [conversation.title for conversation in store.conversations()] == ["b", "a", "c"]
    store.close()


def test_half_a_character_is_kept_and_ends_nothing(store, chat):
    message = store.add_message(chat[0].id, "user", "broken \ud83d here")
    assert store.message(message.id).text == "broken \ud83d here"


def test_settings_are_any_json_and_none_forgets(store):
    store.set_setting("theme", {"dark": True})
    assert store.setting("theme") == {"dark": True}
    store.set_setting("theme", None)
    assert store.setting("theme", "none") == "none"


def test_runs_are_kept_by_kind(store):
    run = store.add_run("training", {"recipe": "sudoku"})
    store.add_run("arena", {})
    store.change_run(run.id, status="done", info={"recipe": "sudoku", "loss": 0.1})
    assert [(found.status, found.info) for found in store.runs("training")] == [
        ("done", {"recipe": "sudoku", "loss": 0.1})]


def test_a_recording_goes_with_its_message(store, chat):
    store.put_recording(chat[2].id, b"steps")
    assert store.recording(chat[2].id) == b"steps"
    store.delete_conversation(chat[0].id)
    assert store.recording(chat[2].id) is None
    store.put_recording(chat[2].id, b"late")  # of an answer that ended after it was deleted
    assert store.recording(chat[2].id) is None


def test_a_killed_process_loses_no_message(tmp_path):
    script = textwrap.dedent("""
        import sys, time, pathlib
        from dgemma.studio.store import Store
        store = Store(pathlib.Path(sys.argv[1]))
        chat = store.new_conversation("Killed")
        asked = store.add_message(chat.id, "user", "Question")
        answer = store.add_message(chat.id, "assistant", "", parent=asked.id, status="running")
        store.change_message(answer.id, content="The first canvas")
        print("written", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    store = Store(tmp_path)
    assert store.mark_interrupted() == 1
    question, answer = store.branch(store.conversations()[0].id)
    assert (question.text, answer.text, answer.status) == ("Question", "The first canvas", "stopped")
    assert answer.info["error"] == INTERRUPTED
    store.close()


def test_an_older_file_is_backed_up_and_carried_over(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.new_conversation("Kept")
    store.close()
    newer = (*migrations.MIGRATIONS, "ALTER TABLE conversations ADD COLUMN colour TEXT")
    monkeypatch.setattr(migrations, "MIGRATIONS", newer)
    store = Store(tmp_path)
    assert store.backup == tmp_path / f"{FILE}.v{len(newer) - 1}.backup"
    assert [conversation.title for conversation in store.conversations()] == ["Kept"]
    assert sqlite3.connect(store.path).execute("SELECT colour FROM conversations").fetchall() == [(None,)]
    with sqlite3.connect(store.backup) as copy:
        assert copy.execute("SELECT title FROM conversations").fetchall() == [("Kept",)]
    store.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    Store(tmp_path).close()
    whole = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", (*whole, "CREATE TABLE half (a); SELECT * FROM nothing"))
    with pytest.raises(DgemmaError, match="cannot be used"):
        Store(tmp_path)
    monkeypatch.setattr(migrations, "MIGRATIONS", whole)
    store = Store(tmp_path)
    assert store._run("SELECT name FROM sqlite_master WHERE name = 'half'") == []
    store.close()


def test_a_file_of_a_newer_program_is_refused(tmp_path, monkeypatch):
    Store(tmp_path).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", ())
    with pytest.raises(DgemmaError, match="newer dgemma"):
        Store(tmp_path)


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(DgemmaError, match=FILE):
        Store(tmp_path)


def test_the_users_data_folder_is_where_others_keep_theirs(tmp_path):
    assert data_folder(tmp_path) == tmp_path
    assert data_folder(environment={"XDG_DATA_HOME": "/data"}).as_posix() == "/data/dgemma/studio"
    assert data_folder(environment={"XDG_DATA_HOME": "relative"}) == data_folder(environment={})
    assert os.path.isabs(data_folder(environment={}))


def test_a_title_is_the_first_line_of_what_was_said():
    assert title_of("  Solve\nthis ") == "Solve this"
    assert len(title_of("word " * 40)) <= 60 and title_of("word " * 40).endswith("…")
    assert title_of(" \n") == "New chat"
