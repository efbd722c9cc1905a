"""An answer as a stream of pieces."""

import asyncio
import dataclasses

import pytest

from dgemma.chat.reply import Thought
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Failed, Finished, TokenLogprob
from dgemma.serve.deltas import (
    BrokenAnswerError,
    CutAnswerError,
    Done,
    Draft,
    Text,
    ToolCall,
    deltas,
    put_together,
)
from support.scripted_service import ScriptedService

CALL = "<|tool_call>call:f{a:1}<tool_call|>"


async def replay(events):
    for event in events:
        await asyncio.sleep(0)
        yield event


def pieces(events, request, tokenizer, **options):
    """Of events, or of what a scripted backend answers."""
    async def run():
        source = await events.admit(request) if isinstance(events, ScriptedService) else replay(events)
        return [piece async for piece in deltas(source, request, tokenizer, **options)]

    return asyncio.run(run())


@pytest.fixture
def request_(model):
    return model.request("x", seed=7)


@pytest.fixture
def calling(model):
    """A request that declares a tool."""
    return model.request("x", seed=7, tools=[{"name": "f"}])


def denoised(ids, step):
    n = len(ids)
    return Denoised(0, 0, step, ids, ids, [0.123456] * n, [True] * n, [True] * n, 0.5, 0.1)


def test_pieces_come_in_the_order_in_which_they_were_said(model, calling):
    service = ScriptedService(model, ["<|channel>thought\nhm<channel|>Hel", f"lo{CALL}"], cached_tokens=2)
    found = pieces(service, calling, model.tokenizer)
    assert "".join(piece.text for piece in found if isinstance(piece, Thought)) == "hm"
    assert "".join(piece.text for piece in found if isinstance(piece, Text)) == "Hello"
    kinds = [type(piece) for piece in found]
    assert kinds.index(Thought) < kinds.index(Text) < kinds.index(ToolCall) < kinds.index(Done)
    call, done = found[-2:]
    assert (call.index, call.name, call.arguments) == (0, "f", '{"a": 1}')
    assert (done.finish_reason, done.seed, done.stop_sequence) == ("tool_calls", 7, None)


def test_counts_are_of_all_tokens_but_the_stop_token(model, request_):
    thought, text = "<|channel>thought\nhm<channel|>", "Hello"
    done = pieces(ScriptedService(model, thought + text, cached_tokens=2), request_, model.tokenizer)[-1]
    length = [len(model.tokenizer.encode(part)) for part in (thought, text)]
    assert done.usage.completion_tokens == sum(length)
    assert done.usage.reasoning_tokens == length[0]
    assert (done.usage.prompt_tokens, done.usage.cached_tokens) == (len(request_.prompt_ids), 2)


def test_drafts_are_made_only_when_they_are_wanted(model, request_):
    ids = model.tokenizer.encode("Hi")
    read = model.reader(request_).feed(ids)
    events = [denoised([*ids, 1, 1], 1), CanvasCommitted(0, 0, ids, 1, 0.1, pieces=read)]
    assert not any(isinstance(piece, Draft) for piece in pieces(events, request_, model.tokenizer))
    found = pieces(events, request_, model.tokenizer, drafts_per_second=10)
    assert [type(piece) for piece in found] == [Draft, Text]
    draft = found[0]
    assert (draft.step, draft.canvas, draft.token_ids) == (1, 0, [*ids, 1, 1])
    assert draft.text == "Hi" and draft.tokens == ["H", "i", "<eos>", "<eos>"]
    assert draft.entropies == [0.1235] * 4


def test_drafts_keep_to_their_rate(model, request_):
    async def slow():
        for step in range(1, 31):
            await asyncio.sleep(0.01)
            yield denoised([72], step)

    async def run():
        return [piece async for piece in deltas(slow(), request_, model.tokenizer, drafts_per_second=20)]

    found = asyncio.run(run())
    assert 3 <= len(found) <= 8  # of 30 in 0.3 seconds or a little more


def test_logprobs_stand_beside_their_text(model):
    request = model.request("x", logprobs=1)
    ids = model.tokenizer.encode("é!")
    entries = [TokenLogprob(token, -0.5, [(token, -0.5)]) for token in ids]
    entries[-1] = dataclasses.replace(entries[-1], logprob=float("-inf"))
    service = ScriptedService(model, "é!")
    service.logprobs = entries
    text = [piece for piece in pieces(service, request, model.tokenizer) if isinstance(piece, Text)]
    found = [entry for piece in text for entry in piece.logprobs]
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == "é!"
    assert found[0]["top_logprobs"][0]["logprob"] == -0.5
    assert found[-1]["logprob"] == -9999.0  # JSON has no -inf


def test_a_failed_request_is_broken(model, request_):
    events = [CanvasStarted(0, 0, [], [], 1, 1), Failed(0, "bad luck")]
    with pytest.raises(BrokenAnswerError, match="log says why"):
        pieces(events, request_, model.tokenizer)


def test_an_answer_that_the_engine_gave_up_is_cut(model, request_):
    with pytest.raises(CutAnswerError, match="cut off"):
        pieces(ScriptedService(model, "Hello", finish="cancelled"), request_, model.tokenizer)


def test_whoever_listens_hears_every_event(model, request_):
    heard = []
    pieces(ScriptedService(model, ["a", "b"]), request_, model.tokenizer, heard=heard.append)
    assert [type(event) for event in heard] == [CanvasStarted, CanvasCommitted, CanvasCommitted, Finished]


def test_an_answer_is_its_pieces_together(model, calling):
    service = ScriptedService(model, ["<|channel>thought\nhm<channel|>Hel", f"lo{CALL}{CALL}"])
    answer = put_together(pieces(service, calling, model.tokenizer))
    assert (answer.reasoning, answer.text, len(answer.tool_calls)) == ("hm", "Hello", 2)
    assert [call.index for call in answer.tool_calls] == [0, 1] and answer.logprobs is None
    assert answer.done.finish_reason == "tool_calls"


def test_pieces_say_what_the_finished_answer_says(model):
    """The real engine's own reading of the whole answer is the oracle."""
    request = model.request("Hello", seed=3)
    events = list(model.stream("Hello", seed=3))
    generation = next(event.generation for event in events if isinstance(event, Finished))
    answer = put_together(pieces(events, request, model.tokenizer))
    assert (answer.text, answer.reasoning or None) == (generation.text, generation.reasoning)
