"""Pictures from the browser to the model: taken in, shown, asked about."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

import dgemma
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.answers import Answers
from dgemma.studio.app import serve_media
from support.asgi import request
from support.pictures import as_file, random_picture
from support.scripted_service import ScriptedService
from support.seeing import save_seeing_sudoku

PNG = as_file(random_picture(60, 50), "PNG")


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    return dgemma.load(save_seeing_sudoku(tmp_path_factory.mktemp("eyes")))


@pytest.fixture
def serving(eyes):
    return create_app(eyes, ScriptedService(eyes, "A cat."), Settings(("eyes",))).state.served()


@pytest.fixture
def blind(model):
    return create_app(model, ScriptedService(model, "No."), Settings(("blind",))).state.served()


def routes(store, serving):
    app = FastAPI()
    serve_media(app, SimpleNamespace(store=store, serving=lambda: serving))
    return app


def asked(store, serving, content, **options):
    async def run():
        chat = store.new_conversation("Chat", options=options)
        answers = Answers(lambda: serving, store)
        answer = answers.start(store.add_message(chat.id, "user", content))
        await answer.finished()
        await answers.close()
        return store.message(answer.id)

    return asyncio.run(run())


def test_what_is_sent_is_kept_and_shown_as_a_preview(store, serving):
    app = routes(store, serving)
    part = json.loads(request(app, "/media?name=cat.png", "POST", body=PNG).body)
    assert (part["type"], part["name"]) == ("image", "cat.png")
    preview = request(app, f"/media/{part['media']}")
    assert preview.headers["content-type"] == "image/webp" and preview.body[8:12] == b"WEBP"
    file = request(app, f"/media/{part['media']}/file")
    assert file.body == PNG and file.headers["content-disposition"] == "attachment"
    assert file.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("name", ["0" * 64, "studio.db", "..%2fstudio.db"])
def test_nothing_else_is_shown(store, serving, name):
    assert request(routes(store, serving), f"/media/{name}").status == 404


def test_what_is_no_picture_is_refused_in_words(store, serving):
    answer = request(routes(store, serving), "/media?name=a.png", "POST", body=b"<html><script>alert(1)</script>")
    assert answer.status == 400 and "a.png: this is a web page" in json.loads(answer.body)["error"]


def test_a_model_without_eyes_takes_no_pictures(store, blind):
    answer = request(routes(store, blind), "/media?name=a.png", "POST", body=PNG)
    assert answer.status == 400 and "reads text only" in json.loads(answer.body)["error"]
    assert store.media.names() == set()


def test_a_picture_reaches_the_engine_with_the_budget_that_was_set(store, serving):
    part = store.media.put_seen(PNG, "cat.png")
    message = asked(store, serving, [part, {"type": "text", "text": "What is this?"}], image_tokens=70)
    assert (message.text, message.status) == ("A cat.", "done")
    (sent,) = serving.backend.requests
    assert len(sent.spans) == 1


def test_a_picture_in_a_conversation_with_a_blind_model_is_an_error_with_advice(store, blind):
    message = asked(store, blind, [store.media.put_seen(PNG, "cat.png")])
    assert message.status == "failed" and message.info["error"].startswith("cat.png: this model reads text only")
    assert "leave the picture out" in message.info["advice"]


def test_a_picture_that_is_gone_is_an_error_of_the_answer(store, serving):
    part = store.media.put_seen(PNG, "cat.png")
    store.media.remove(part["media"])
    message = asked(store, serving, [part])
    assert message.status == "failed" and "cat.png: this file is not there any more" in message.info["error"]
