"""Answers that live on the server: watched, stopped, written down."""

import asyncio

import pytest

from dgemma.engine.service import Overloaded
from dgemma.errors import DgemmaError
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.answers import RECENT, STOPPING, Answer, Answers
from dgemma.studio.asking import ask_of, prompt_of
from dgemma.studio.recording import Recording
from support.scripted_service import ScriptedService
from support.studio import PUZZLE


@pytest.fixture
def scripted(model):
    """A function: what a scripted service answers -> the `Serving` over it."""
    def make(*answers, **options):
        return create_app(model, ScriptedService(model, *answers, **options), Settings(("scripted",))).state.served()
    return make


@pytest.fixture
def question(store):
    chat = store.new_conversation("Chat", system="Be brief.", options={"seed": 1})
    return store.add_message(chat.id, "user", PUZZLE)


def test_an_answer_is_made_and_written_down_with_how_it_came_to_be(serving, store, question):
    async def run():
        answers = Answers(lambda: serving, store)
        answer = answers.start(question)
        assert store.message(answer.id).status == "running"
        await answer.finished()
        await answers.close()
        return answer

    answer = asyncio.run(run())
    message = store.message(answer.id)
    assert message.status == "done" and message.text == answer.text and message.text.startswith("53")
    assert message.info["finish_reason"] == "stop" and message.info["seed"] == 1
    assert message.info["tokens"] == 89 and message.info["tokens_per_second"] > 0
    recording = Recording.unpack(store.recording(answer.id))
    assert len(recording.canvases[0].steps) == message.info["steps"][0]
    assert recording.canvases[0].committed is not None
    assert store.conversation(question.conversation).head == answer.id


def test_whoever_watches_hears_of_every_canvas(scripted, store, question):
    async def run():
        answers = Answers(lambda: scripted(["One. ", "Two."], seconds=0.01), store)
        answer = answers.start(question)
        heard = [""]
        while answer.running:
            await answer.changed()
            if answer.text != heard[-1]:
                heard.append(answer.text)
        await answers.close()
        return heard

    assert asyncio.run(run()) == ["", "One. ", "One. Two."]


def test_a_stopped_answer_keeps_what_was_committed(scripted, store, question):
    async def run():
        serving = scripted(["One. ", "Two."], seconds=0.05)
        answers = Answers(lambda: serving, store)
        answer = answers.start(question)
        while not answer.text:
            await answer.changed()
        answers.stop(answer.id)
        await answer.finished()
        await answers.close()
        return answer, serving.backend.closed

    answer, closed = asyncio.run(run())
    message = store.message(answer.id)
    assert (message.text, message.status, message.info["finish_reason"]) == ("One. ", "stopped", "stopped")
    assert closed == 1 and "error" not in message.info


def test_an_answer_can_be_stopped_before_it_begins(scripted, store, question):
    async def run():
        answers = Answers(lambda: scripted("Late", admission=5), store)
        answer = answers.start(question)
        answer.stop()
        await asyncio.wait_for(answer.finished(), 2)
        await answers.close()
        return answer

    assert store.message(asyncio.run(run()).id).status == "stopped"


def test_what_was_committed_is_on_the_disk_before_the_end(scripted, store, question):
    async def run():
        answers = Answers(lambda: scripted(["One. ", "Two."], seconds=0.2), store)
        answer = answers.start(question)
        while not answer.text:
            await answer.changed()
        await asyncio.sleep(0.05)
        middle = store.message(answer.id)
        await answers.close()
        return middle

    middle = asyncio.run(run())
    assert (middle.text, middle.status) == ("One. ", "running")


@pytest.mark.parametrize(("answer", "told"), [
    (Overloaded("4 requests are running, and no more can wait", 2.0), "no more can wait"),
    (ValueError("secrets of ours"), "the terminal says why"),
])
def test_what_goes_wrong_is_told_in_the_answer(scripted, store, question, answer, told):
    async def run():
        answers = Answers(lambda: scripted(answer), store)
        made = answers.start(question)
        await made.finished()
        await answers.close()
        return made

    message = store.message(asyncio.run(run()).id)
    assert message.status == "failed" and told in message.info["error"] and "secrets" not in message.info["error"]


@pytest.mark.parametrize(("options", "told"), [
    ({"t_min": 3.0}, "t_max"), ({"nonsense": 1}, "nonsense"), ({"max_denoising_steps": 0}, "max_denoising_steps")])
def test_settings_that_cannot_be_are_told_in_the_answer(serving, options, told):
    async def run():
        answer = Answer(serving, [{"role": "user", "content": PUZZLE}], options)
        answer.start()
        await answer.finished()
        return answer

    answer = asyncio.run(run())
    assert answer.status == "failed" and told in answer.error


def test_a_server_that_stops_says_so_in_the_answer(scripted, store, question):
    async def run():
        answers = Answers(lambda: scripted("Cut", finish="cancelled"), store)
        answer = answers.start(question)
        await answer.finished()
        await answers.close()
        return answer

    message = store.message(asyncio.run(run()).id)
    assert (message.status, message.info["error"]) == ("stopped", STOPPING)


def test_an_answer_of_a_conversation_that_is_deleted_meanwhile_harms_nobody(scripted, store, question):
    async def run():
        answers = Answers(lambda: scripted(["One. ", "Two."], seconds=0.02), store)
        answer = answers.start(question)
        await answer.changed()
        answers.stop_all(question.conversation)
        store.delete_conversation(question.conversation)
        await answer.finished()
        await answers.close()
        with pytest.raises(DgemmaError, match="deleted"):
            answers.start(question)

    asyncio.run(run())
    assert store.conversations() == []


def test_only_recent_answers_stay_in_memory_and_recordings_of_others_come_from_the_disk(scripted, store, question):
    async def run():
        serving = scripted("Short")
        answers = Answers(lambda: serving, store)
        made = []
        for _ in range(RECENT + 2):
            answer = answers.start(question)
            await answer.finished()
            made.append(answer.id)
        await answers.close()
        return answers, made

    answers, made = asyncio.run(run())
    assert answers.get(made[0]) is None and answers.get(made[-1]) is not None
    assert answers.recording(made[0]).canvases and answers.recording("unknown") is None


def test_pages_are_told_when_an_answer_begins_and_ends(scripted, store, question):
    told = []

    async def run():
        answers = Answers(lambda: scripted("Short"), store, told.append)
        await answers.start(question).finished()
        await answers.close()

    asyncio.run(run())
    assert told == [question.conversation] * 2


def test_the_prompt_is_the_branch_up_to_the_question(store, question):
    first = store.add_message(question.conversation, "assistant", "", parent=question.id,
                              info={"tool_calls": [{"name": "add", "arguments": {"a": 1}}]})
    tool = store.add_message(question.conversation, "tool", "1", parent=first.id, info={"name": "add"})
    store.add_message(question.conversation, "assistant", "Another branch", parent=question.id)
    messages = prompt_of(store, "Be brief.", tool)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert messages[3]["name"] == "add"


def test_settings_go_where_the_model_expects_them():
    ask = ask_of([], {"seed": 3, "temperature": None, "t_max": 0.7, "thinking": True, "max_tokens": None})
    assert (ask.seed, ask.temperature, ask.max_tokens) == (3, None, None)
    assert ask.options == {"thinking": True, "t_max": 0.7}
