"""A turn with tool calls: what is called is asked for, run, answered, and the model goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dgemma.chat.messages import normalise_messages
from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.tools.loop import (
    NOT_ALLOWED,
    STOPPED,
    ApprovalNeeded,
    CallOutput,
    CallProposed,
    CallReturned,
    CallRunning,
    MessageAdded,
    TurnEnded,
    take_turn,
    with_answers,
)
from dgemma.tools.tool import Say, Tool, Toolbox, ToolError, ToolResult, schema
from dgemma.train.data import tokenizer as bundled
from support.scripted_speaker import ScriptedSpeaker, allow, ask_nobody, echo, generation, refuse

ASKED = [{"role": "user", "content": "go"}]
NOTHING = schema()


def turn(speaker, toolbox, approve=allow, **options) -> list[Any]:
    async def collect():
        return [event async for event in take_turn(speaker, ASKED, toolbox, approve, **options)]

    return asyncio.run(collect())


def of(events, *kinds):
    return [event for event in events if isinstance(event, kinds)]


def added(events) -> list[dict[str, Any]]:
    return [event.message for event in of(events, MessageAdded)]


def tool(run, name="tool", **options) -> Tool:
    return Tool(name, "", NOTHING, run, **options)


def test_an_answer_without_calls_ends_the_turn():
    speaker = ScriptedSpeaker(generation("hello"))
    events = turn(speaker, Toolbox([echo()]))
    assert added(events) == [{"role": "assistant", "content": "hello"}]
    assert events[-1] == TurnEnded(generation("hello"), "stop")
    assert speaker.heard == [(ASKED, ["echo"])]


def test_a_call_is_proposed_approved_run_and_answered():
    speaker = ScriptedSpeaker(generation("let me see", ("echo", {"text": "x"}), reasoning="hm"), generation("done"))
    events = turn(speaker, Toolbox([echo()]))
    kinds = [type(event) for event in of(events, CallProposed, ApprovalNeeded, CallRunning, CallOutput, CallReturned)]
    assert kinds == [CallProposed, ApprovalNeeded, CallRunning, CallOutput, CallReturned]
    (returned,) = of(events, CallReturned)
    assert returned.result == ToolResult("said x", {"text.txt": b"x"})
    spoken, answered, last = added(events)
    assert spoken["tool_calls"][0]["function"] == {"name": "echo", "arguments": {"text": "x"}}
    assert spoken["reasoning"] == "hm"
    assert answered == {"role": "tool", "tool_call_id": spoken["tool_calls"][0]["id"], "name": "echo",
                        "content": "said x"}
    assert last["content"] == "done"
    assert speaker.heard[1][0] == [*ASKED, spoken, answered]
    assert normalise_messages(speaker.heard[1][0])


def test_the_chat_template_shows_the_call_and_its_result():
    tokenizer = Tokenizer(bundled.build_byte_tokenizer(), bundled.TEMPLATE_FILE.read_text(), {"bos_token": "<bos>"})
    speaker = ScriptedSpeaker(generation("", ("echo", {"text": "x"})), generation("done"))
    toolbox = Toolbox([echo()])
    turn(speaker, toolbox)
    shown = tokenizer.decode(tokenizer.apply_chat_template(
        normalise_messages(speaker.heard[1][0]), tools=toolbox.declarations()), skip_special_tokens=False)
    assert 'call:echo{text:<|"|>x<|"|>}' in shown and "said x" in shown and "Says it." in shown


def test_several_calls_are_answered_in_order():
    speaker = ScriptedSpeaker(generation("", ("echo", {"text": "a"}), ("echo", {"text": "b"})), generation("done"))
    events = turn(speaker, Toolbox([echo()]))
    assert [message["content"] for message in added(events)[1:3]] == ["said a", "said b"]


def test_what_is_not_allowed_is_not_run_and_the_model_is_told():
    speaker = ScriptedSpeaker(generation("", ("echo", {"text": "x"})), generation("ok"))
    events = turn(speaker, Toolbox([echo()]), refuse)
    assert not of(events, CallRunning)
    assert added(events)[1]["content"] == NOT_ALLOWED


def test_always_asks_once():
    asked = []

    async def always(call):
        asked.append(call.name)
        return "always"

    speaker = ScriptedSpeaker(generation("", ("echo", {"text": "a"})), generation("", ("echo", {"text": "b"})),
                              generation("done"))
    toolbox = Toolbox([echo()])
    assert len(of(turn(speaker, toolbox, always), CallRunning)) == 2
    assert asked == ["echo"] and toolbox.approval("echo") == "auto"


def test_an_automatic_tool_asks_nobody_and_one_that_is_off_is_not_told_of():
    speaker = ScriptedSpeaker(generation("", ("a", {"text": "x"}), ("b", {"text": "x"})), generation("done"))
    events = turn(speaker, Toolbox([echo("a"), echo("b")], {"a": "auto", "b": "off"}), ask_nobody)
    assert speaker.heard[0][1] == ["a"]
    assert [event.fault for event in of(events, CallProposed)] == [None, "there is no tool b; there are: a"]


@pytest.mark.parametrize(("call", "fault"), [
    (("nothing", {}), "there is no tool nothing; there are: echo"), (("echo", {}), "text is missing"),
    (("echo", {"text": 3}), "text must be of type string"), (("echo", "text"), "the arguments must be an object"),
    (("echo", {"text": "x", "more": 1}), "there is no parameter more; there are: text, times"),
    (("echo", {"text": "x", "times": True}), "times must be of type integer")])
def test_a_wrong_call_is_told_to_the_model_and_nobody_is_asked(call, fault):
    speaker = ScriptedSpeaker(generation("", call), generation("sorry"))
    events = turn(speaker, Toolbox([echo()]), ask_nobody)
    assert of(events, CallProposed)[0].fault == fault
    assert added(events)[1]["content"] == f"Error: {fault}"
    assert events[-1].why == "stop"


def test_a_tool_that_fails_is_told_to_the_model():
    async def refuses(arguments, say):
        raise ToolError("not today")

    async def breaks(arguments, say):
        raise KeyError("x")

    speaker = ScriptedSpeaker(generation("", ("a", {}), ("b", {})), generation("done"))
    events = turn(speaker, Toolbox([tool(refuses, "a"), tool(breaks, "b")]))
    assert [message["content"] for message in added(events)[1:3]] == [
        "Error: not today", "Error: the tool failed (KeyError: 'x')"]
    assert all(event.result.failed for event in of(events, CallReturned))


def test_rounds_are_bounded_and_the_last_answer_is_without_tools():
    again = generation("", ("echo", {"text": "x"}))
    speaker = ScriptedSpeaker(again, again, generation("that is all I know"))
    events = turn(speaker, Toolbox([echo()]), rounds=2)
    assert [tools for _, tools in speaker.heard] == [["echo"], ["echo"], []]
    assert events[-1] == TurnEnded(generation("that is all I know"), "rounds")
    assert added(events)[-1]["content"] == "that is all I know"


def test_a_stopped_model_calls_nothing():
    speaker = ScriptedSpeaker(generation("I wi", ("echo", {"text": "x"}), reason="cancelled"))
    events = turn(speaker, Toolbox([echo()]), ask_nobody)
    assert added(events) == [{"role": "assistant", "content": "I wi"}]
    assert events[-1].why == "cancelled"


def test_a_long_result_is_read_in_part():
    async def long(arguments, say):
        return ToolResult("x" * 100_000)

    speaker = ScriptedSpeaker(generation("", ("tool", {})), generation("done"))
    (returned,) = of(turn(speaker, Toolbox([tool(long)])), CallReturned)
    assert len(returned.result.text) < 21_000 and "characters left out" in returned.result.text


def test_cancelling_ends_the_running_tool_and_the_conversation_can_go_on():
    ended = []

    async def slow(arguments: dict[str, Any], say: Say) -> ToolResult:
        try:
            say("begun")
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        return ToolResult("")

    speaker = ScriptedSpeaker(generation("", ("tool", {}), ("tool", {})), generation("never"))
    messages: list[dict[str, Any]] = []

    async def stopped() -> None:
        begun = asyncio.Event()

        async def follow() -> None:
            async for event in take_turn(speaker, ASKED, Toolbox([tool(slow)]), allow):
                if isinstance(event, MessageAdded):
                    messages.append(event.message)
                if isinstance(event, CallOutput):
                    begun.set()

        task = asyncio.create_task(follow())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stopped())
    assert ended == [True]
    whole = with_answers([*ASKED, *messages])
    assert [message.get("content") for message in whole] == ["go", "", STOPPED, STOPPED]
    assert normalise_messages(whole)
    assert with_answers(whole) == whole


def test_a_model_that_does_not_finish_is_an_error():
    class Silent:
        async def stream(self, messages, tools):
            return
            yield

    with pytest.raises(DgemmaError, match="without finishing"):
        turn(Silent(), Toolbox([]))


def test_two_tools_of_one_name_and_decisions_that_are_none_are_refused():
    with pytest.raises(DgemmaError, match="two tools of the name echo"):
        Toolbox([echo(), echo()])
    with pytest.raises(DgemmaError, match="there is no tool x; there are echo"):
        Toolbox([echo()], {"x": "ask"})
    with pytest.raises(DgemmaError, match="one of ask, auto, off"):
        Toolbox([echo()]).decide("echo", "perhaps")
