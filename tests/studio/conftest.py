"""The bundled model behind a service, for the studio's tests."""

import asyncio

import pytest

import dgemma
from dgemma.engine.service import Service
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.store import Store
from support.studio_browser import browser, link_to, sudoku, tab  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def model():
    return dgemma.load("sudoku")


@pytest.fixture(scope="session")
def service(model):
    made = Service(model.network, model.reader, model.prefixes, max_num_seqs=4)
    made.start()
    yield made
    asyncio.run(made.stop(0))


@pytest.fixture(scope="session")
def serving(model, service):
    return create_app(model, service, Settings(("sudoku",))).state.served()


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "data")
    yield opened
    opened.close()
