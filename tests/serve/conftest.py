"""The bundled model behind a real server, shared by the tests of this folder; and servers of scripted answers."""

import asyncio
from contextlib import contextmanager

import httpx2 as httpx
import pytest

import dgemma
from dgemma.engine.service import Service
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from support.scripted_service import ScriptedService, served


@pytest.fixture(scope="session")
def model():
    return dgemma.load("sudoku")


@contextmanager
def running(model, settings=None, **options):
    """A real service behind a real server: its URL and the service."""
    service = Service(model.network, model.reader, model.prefixes, **options)
    service.start()
    try:
        with served(create_app(model, service, settings or Settings(("sudoku", "alias")))) as url:
            yield url, service
    finally:
        asyncio.run(service.stop(0))


@pytest.fixture(scope="session")
def serve_model():
    """`running`, for tests of a model of their own."""
    return running


@pytest.fixture(scope="session")
def live(model):
    """The bundled model's server: its URL and the service."""
    with running(model) as pair:
        yield pair


@pytest.fixture
def url(live):
    return live[0]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def scripted(model, request):
    """A function: answers of a `ScriptedService` -> (HTTP client of a server of these, the service)."""
    def start(*answers, settings=None, **options):
        service = ScriptedService(model, *(answers or ("Hello",)), **options)
        context = served(create_app(model, service, settings or Settings(("sudoku", "alias"))))
        url = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        client = httpx.Client(base_url=url, timeout=30)
        request.addfinalizer(client.close)
        return client, service
    return start
