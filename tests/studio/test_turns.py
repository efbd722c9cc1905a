"""Turns with tools: they go on on the server, and are written down call by call."""

import asyncio
import io
from contextlib import asynccontextmanager

import pytest
from PIL import Image

from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.answers import Answers
from dgemma.studio.asking import prompt_of
from dgemma.studio.store import INTERRUPTED, Store
from dgemma.studio.toolboxes import Toolboxes, approval
from dgemma.tools.loop import NOT_ALLOWED, STOPPED
from dgemma.tools.tool import Source, Tool, Toolbox, ToolResult, schema
from support.scripted_service import ScriptedService
from support.scripted_speaker import echo

CALL = '<|tool_call>call:echo{text:<|"|>hi<|"|>}<tool_call|>'
CHOSEN = {"python": "ask"}


class Stand(Toolboxes):
    """Offers given tools, as those of the room "python"."""

    def __init__(self, store, *tools):
        super().__init__(store)
        self.given = tools

    @asynccontextmanager
    async def use(self, conversation, chosen):
        yield Toolbox(self.given, {tool.name: approval(tool.name, "python", chosen) for tool in self.given})


def tool(run, name="echo"):
    return Tool(name, "Does it.", schema(text={"type": "string"}), run)


def forever():
    """A tool that never ends, and the event that tells it runs; what became of it in ``ends``."""
    started, ends = asyncio.Event(), []

    async def run(arguments, say):
        say("working\n")
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("ended")

    return tool(run), started, ends


@pytest.fixture
def question(store):
    chat = store.new_conversation("Chat", options={"tools": CHOSEN})
    return store.add_message(chat.id, "user", "Say hi")


@pytest.fixture
def answers(model, store):
    """A function: tools, and what the model says -> `Answers`."""
    def make(tools, *said, **options):
        serving = create_app(model, ScriptedService(model, *said, **options), Settings(("scripted",))).state.served()
        return Answers(lambda: serving, store, tools=Stand(store, *tools))
    return make


async def in_hand(answers, store, conversation, state="waiting"):
    """The conversation's call, once it is in a state."""
    while True:
        for message in store.messages(conversation):
            if (call := answers.call(message.id)) is not None and call.state == state:
                return call
        await asyncio.sleep(0.005)


async def over(answers, conversation):
    while answers.busy(conversation):
        await asyncio.sleep(0.005)
    await answers.close()


def branch(store, question):
    return store.branch(question.conversation)


def test_a_call_waits_for_an_approval_runs_and_the_model_goes_on(answers, store, question):
    async def run():
        made = answers([echo()], ["Let me see. ", CALL], "It said hi.")
        made.start(question)
        call = await in_hand(made, store, question.conversation)
        assert made.busy(question.conversation) and not made.running(question.conversation)
        call.decide("yes")
        await over(made, question.conversation)

    asyncio.run(run())
    asked, first, called, last = branch(store, question)
    assert [message.role for message in (asked, first, called, last)] == ["user", "assistant", "tool", "assistant"]
    assert first.text == "Let me see. " and first.info["tool_calls"] == [{"name": "echo", "arguments": {"text": "hi"}}]
    assert first.info["finish_reason"] == "tool_calls"
    assert (called.text, called.status) == ("said hi", "done")
    assert called.info["arguments"] == {"text": "hi"} and called.info["files"][0]["name"] == "text.txt"
    assert last.text == "It said hi." and last.status == "done"


def test_what_is_asked_next_has_the_calls_and_their_results(answers, store, question):
    async def run():
        made = answers([echo()], CALL, "Done.")
        made.start(question)
        (await in_hand(made, store, question.conversation)).decide("yes")
        await over(made, question.conversation)

    asyncio.run(run())
    _, first, called, last = prompt_of(store, "", branch(store, question)[-1])
    assert called == {"role": "tool", "name": "echo", "tool_call_id": first["tool_calls"][0]["id"],
                      "content": "said hi"}
    assert last["content"] == "Done."


def test_a_refused_call_is_told_to_the_model(answers, store, question):
    async def run():
        made = answers([echo()], CALL, "As you like.")
        made.start(question)
        (await in_hand(made, store, question.conversation)).decide("no")
        await over(made, question.conversation)

    asyncio.run(run())
    called, last = branch(store, question)[2:]
    assert (called.text, called.status, last.text) == (NOT_ALLOWED, "stopped", "As you like.")


def test_what_was_allowed_always_is_asked_for_no_more_in_this_conversation(answers, store, question):
    async def run():
        made = answers([echo()], CALL, CALL, "Twice.")
        made.start(question)
        (await in_hand(made, store, question.conversation)).decide("always")
        await over(made, question.conversation)

    asyncio.run(run())
    assert [message.role for message in branch(store, question)] == ["user", "assistant", "tool", "assistant", "tool",
                                                                     "assistant"]
    assert store.conversation(question.conversation).options["tools"] == {"python": "ask", "echo": "auto"}


def test_a_running_call_can_be_stopped_alone(answers, store, question):
    async def run():
        endless, started, ends = forever()
        made = answers([endless], CALL, "Stopped, then.")
        made.start(question)
        call = await in_hand(made, store, question.conversation)
        call.decide("yes")
        await started.wait()
        await asyncio.sleep(0.01)
        assert (call.state, call.output) == ("running", "working\n")
        call.stop()
        await over(made, question.conversation)
        return ends

    assert asyncio.run(run()) == ["ended"]
    called, last = branch(store, question)[2:]
    assert (called.text, called.status, last.text) == (STOPPED, "stopped", "Stopped, then.")


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_stop_ends_the_turn_with_its_call(answers, store, question, state):
    async def run():
        endless, _, ends = forever()
        made = answers([endless], CALL, "Never said.")
        made.start(question)
        call = await in_hand(made, store, question.conversation)
        if state == "running":
            call.decide("yes")
            await in_hand(made, store, question.conversation, "running")
            await asyncio.sleep(0.01)
        made.stop_all(question.conversation)
        await over(made, question.conversation)
        return ends

    assert asyncio.run(run()) == (["ended"] if state == "running" else [])
    _, _, called = branch(store, question)
    assert (called.text, called.status) == (STOPPED, "stopped")


def test_stop_ends_an_answer_that_calls_nothing_yet(answers, store, question):
    async def run():
        made = answers([echo()], ["One. ", CALL], seconds=0.05)
        answer = made.start(question)
        while not answer.text:
            await answer.changed()
        made.stop_all(question.conversation)
        await over(made, question.conversation)

    asyncio.run(run())
    assert [(message.role, message.status) for message in branch(store, question)[1:]] == [("assistant", "stopped")]


def test_a_wrong_call_is_never_run(answers, store, question):
    async def run():
        made = answers([echo()], CALL.replace("text:", "txt:"), "Sorry.")
        made.start(question)
        await over(made, question.conversation)

    asyncio.run(run())
    called = branch(store, question)[2]
    assert called.status == "failed" and "text is missing" in called.text and called.info["fault"] == "text is missing"


def test_pictures_are_kept_with_a_preview_and_pages_as_sources(answers, store, question):
    async def draw(arguments, say):
        data = io.BytesIO()
        Image.new("RGB", (30, 20), "red").save(data, "PNG")
        return ToolResult("drawn", {"plot.png": data.getvalue(), "evil.svg": b"<svg onload=alert(1)>"},
                          (Source(1, "A page", "https://example.org/"),))

    async def run():
        made = answers([tool(draw)], CALL, "See [1].")
        made.start(question)
        (await in_hand(made, store, question.conversation)).decide("yes")
        await over(made, question.conversation)

    asyncio.run(run())
    called = branch(store, question)[2]
    plot, evil = called.info["files"]
    assert (plot["type"], evil["type"]) == ("image", "file")
    with Image.open(store.media.preview(plot["media"])) as preview:
        assert (preview.format, preview.size) == ("WEBP", (30, 20))
    assert not store.media.preview(evil["media"]).exists()
    assert called.info["sources"] == [{"number": 1, "title": "A page", "url": "https://example.org/"}]
    store.delete_conversation(question.conversation)
    assert store.media.names() == set()


def test_tools_that_cannot_be_had_are_an_error_of_the_answer(model, store, question):
    async def run():
        serving = create_app(model, ScriptedService(model, "never"), Settings(("scripted",))).state.served()
        made = Answers(lambda: serving, store)
        made.tools.configure('{"mcpServers": {"gone": {"command": "/no/such/program"}}}')
        answer = made.start(question, {"tools": {"mcp:gone": "ask"}})
        await over(made, question.conversation)
        return answer

    answer = asyncio.run(run())
    assert answer.status == "failed" and "gone" in answer.error
    assert store.message(answer.id).status == "failed"


def test_a_server_that_stops_leaves_a_turn_that_can_be_gone_on_with(answers, store, question):
    async def run():
        made = answers([echo()], CALL + CALL)
        made.start(question)
        await in_hand(made, store, question.conversation)
        await made.close()

    asyncio.run(run())
    called = branch(store, question)[-1]
    assert (called.role, called.text, called.status) == ("tool", STOPPED, "stopped")
    messages = prompt_of(store, "", called)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert {call["id"] for call in messages[1]["tool_calls"]} == {message["tool_call_id"] for message in messages[2:]}


def test_a_call_of_a_killed_server_has_an_answer_for_the_model(tmp_path):
    store = Store(tmp_path)
    chat = store.new_conversation("Chat")
    asked = store.add_message(chat.id, "user", "go")
    said = store.add_message(chat.id, "assistant", "", parent=asked.id,
                             info={"tool_calls": [{"name": "echo", "arguments": {}}]})
    called = store.add_message(chat.id, "tool", "", parent=said.id, status="running", info={"name": "echo"})
    store.mark_interrupted()
    assert store.message(called.id).info["error"] == INTERRUPTED
    assert prompt_of(store, "", called)[-1]["content"] == STOPPED
    store.close()
