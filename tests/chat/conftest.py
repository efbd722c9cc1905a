"""The bundled tokenizer, saved once, and read back."""

import pytest

from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data import tokenizer as bundled


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundled")
    bundled.save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_folder(tokenizer_folder)
