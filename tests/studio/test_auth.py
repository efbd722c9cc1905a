"""Passwords, launch links and sessions."""

import asyncio

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.auth import (
    ALL_TRIES,
    IDLE_DAYS,
    LINK_MINUTES,
    TRIES,
    Passwords,
    Sessions,
    TooManyTriesError,
    has_password,
    set_password,
)
from dgemma.studio.store import Store


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    opened = Store(tmp_path, clock)
    yield opened
    opened.close()


@pytest.fixture
def sessions(store, clock):
    return Sessions(store, clock)


def test_a_launch_link_works_once(sessions):
    token = sessions.new_token()
    cookie = sessions.use_token(token, "here")
    assert sessions.find(cookie)
    assert sessions.use_token(token, "again") is None


def test_a_launch_link_grows_old(sessions, clock):
    token = sessions.new_token()
    clock.now += 60 * LINK_MINUTES + 1
    assert sessions.use_token(token, "") is None


def test_whoever_asks_for_links_spoils_no_others_and_is_slowed_down(sessions, clock):
    first, *_ = [sessions.new_token() for _ in range(round(TRIES))]
    with pytest.raises(TooManyTriesError):
        sessions.new_token()
    assert sessions.use_token(first, "")


@pytest.mark.parametrize("token", ["", "x", "é\ud800"])
def test_before_there_is_a_link_nothing_is_one(sessions, token):
    assert sessions.use_token(token, "") is None


def test_the_file_does_not_hold_what_the_browser_holds(sessions, store):
    cookie = sessions.begin("here")
    assert cookie.encode() not in store.path.read_bytes() + store.path.with_name("studio.db-wal").read_bytes()


def test_sessions_are_listed_survive_a_restart_and_can_be_ended(sessions, store, clock):
    cookie = sessions.begin("127.0.0.1 · Firefox")
    again = Sessions(store, clock)
    assert again.find(cookie)
    (session,) = again.all()
    assert session.label == "127.0.0.1 · Firefox"
    again.end(session.digest)
    assert again.find(cookie) is None and again.all() == []


def test_a_session_that_nobody_uses_is_over(sessions, clock):
    cookie = sessions.begin("")
    clock.now += 86_400 * (IDLE_DAYS - 1)
    assert sessions.find(cookie)
    clock.now += 86_400 * (IDLE_DAYS + 1)
    assert sessions.find(cookie) is None


def test_a_password_is_kept_as_its_argon2_hash_and_ends_all_sessions(store, sessions):
    cookie = sessions.begin("")
    assert not has_password(store)
    set_password(store, "correct horse")
    assert has_password(store) and store.setting("password").startswith("$argon2id$")
    assert sessions.find(cookie) is None
    passwords = Passwords(store)
    assert asyncio.run(passwords.check("correct horse", "a"))
    assert not asyncio.run(passwords.check("correct hors", "a"))


def test_without_a_password_none_is_right(store):
    assert not asyncio.run(Passwords(store).check("", "a"))


@pytest.mark.parametrize("password", ["", "short", "x" * 1001])
def test_a_password_has_some_length(store, password):
    with pytest.raises(DgemmaError, match="characters"):
        set_password(store, password)


def test_an_address_may_try_a_few_times_a_minute(store, clock):
    passwords = Passwords(store, clock)
    for _ in range(round(TRIES)):
        assert not asyncio.run(passwords.check("guess", "a"))
    with pytest.raises(TooManyTriesError):
        asyncio.run(passwords.check("guess", "a"))
    assert not asyncio.run(passwords.check("guess", "b"))
    clock.now += 60 / TRIES
    assert not asyncio.run(passwords.check("guess", "a"))


def test_all_addresses_together_may_not_try_much_more(store, clock):
    passwords = Passwords(store, clock)
    for number in range(round(ALL_TRIES)):
        asyncio.run(passwords.check("guess", str(number)))
    with pytest.raises(TooManyTriesError):
        asyncio.run(passwords.check("guess", "another"))
