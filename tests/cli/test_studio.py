"""`dgemma studio` before its pages: what it asks for, what it refuses."""

import subprocess
import sys

import pytest

from dgemma.studio.auth import has_password
from dgemma.studio.store import Store
from support.studio import launch_link, studio


def test_other_machines_need_a_password_first(dgemma_command, tmp_path):
    done = dgemma_command("studio", "--host", "0.0.0.0", "--data", tmp_path)
    assert done.code == 1 and "--set-password" in done.err


def test_a_password_is_set_and_no_server_started(dgemma_command, tmp_path):
    done = dgemma_command("studio", "--set-password", "--data", tmp_path, stdin="correct horse\n")
    assert done.code == 0 and "password is set" in done.out
    store = Store(tmp_path)
    assert has_password(store)
    store.close()


def test_a_password_that_is_too_short_is_refused(dgemma_command, tmp_path):
    done = dgemma_command("studio", "--set-password", "--data", tmp_path, stdin="short\n")
    assert done.code == 1 and "characters" in done.err


def test_what_is_not_installed_is_named_with_its_extra(dgemma_command, tmp_path, not_installed):
    not_installed("nh3")
    done = dgemma_command("studio", "--data", tmp_path)
    assert done.code == 1 and "nh3" in done.err and "dgemma[studio]" in done.err


@pytest.mark.slow
def test_two_studios_do_not_share_their_data(tmp_path):
    with studio(tmp_path) as first:
        launch_link(first)
        with studio(tmp_path) as second:
            assert second.code() == 1
            assert any("already" in line for line in second.lines)


def test_other_commands_start_without_any_of_it():
    script = ("import sys, dgemma.cli.main; "
              "print([name for name in ('nicegui', 'fastapi', 'argon2', 'nh3', 'torch') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
