"""Battles of the arena: run, stopped, voted on, kept."""

import asyncio

import pytest
from nicegui import Event

from dgemma.errors import DgemmaError
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.arena import Arena, recording_name
from dgemma.studio.battles import Battles, Contestant, described, read_prompts
from support.scripted_service import ScriptedService
from support.studio import PUZZLE

ONE, OTHER = Contestant("One", system="Be brief.", options={"seed": 1}), Contestant(options={"max_tokens": 9})


def arena_of(serving, store):
    return Arena(lambda contestant: serving, store, Event())


@pytest.fixture
def slow(model):
    """A backend whose answers take a while."""
    return create_app(model, ScriptedService(model, ["5", "3"], seconds=0.2), Settings(("slow",))).state.served()


async def over(arena):
    while arena.active():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("in_turn", [False, True])
def test_both_answer_and_both_are_kept_with_how_they_came_to_be(serving, store, in_turn):
    async def run():
        arena = arena_of(serving, store)
        (battle,) = arena.start([PUZZLE], ONE, OTHER, in_turn=in_turn)
        await over(arena)
        await arena.close()
        return battle.id

    id = asyncio.run(run())
    arena = arena_of(serving, store)  # of a server that was started again
    battle = arena.battles.get(id)
    assert battle.status == "done" and battle.first.text.startswith("53")
    assert battle.first.info["seed"] == 1 and battle.second.info["tokens"] == 9
    for side in (0, 1):
        assert arena.recording(recording_name(id, side)).canvases[0].steps
    assert arena.recording("nothing") is None


def test_a_series_is_run_in_a_row_and_stop_ends_it(slow, store):
    async def run():
        arena = arena_of(slow, store)
        battles = arena.start(["a", "b", "c"], ONE, OTHER)
        while arena.answer(battles[0].id, 1) is None:
            await asyncio.sleep(0.01)
        assert arena.active() == [battle.id for battle in battles]
        arena.stop(battles[0].id)
        await over(arena)
        await arena.close()

    asyncio.run(run())
    assert [battle.status for battle in Battles(store).all()] == ["stopped"] * 3


def test_a_server_that_ends_leaves_no_battle_open(slow, store):
    async def run():
        arena = arena_of(slow, store)
        arena.start(["a", "b"], ONE, OTHER, in_turn=True)
        await asyncio.sleep(0.05)
        await arena.close()

    asyncio.run(run())
    assert {battle.status for battle in Battles(store).all()} == {"stopped"}


def test_an_answer_that_fails_leaves_the_other_one_whole(serving, store):
    async def run():
        arena = arena_of(serving, store)
        (battle,) = arena.start([PUZZLE], Contestant(options={"entropy_bound": -1}), ONE)
        await over(arena)
        return arena.battles.get(battle.id)

    battle = asyncio.run(run())
    assert battle.status == "done" and "entropy_bound" in battle.first.info["error"] and battle.second.text


def test_only_what_is_over_is_voted_on_and_a_vote_may_change(store, serving):
    battles = Battles(store)
    (battle,) = battles.add(["Hi"], ONE, OTHER, blind=True, in_turn=False)
    arena = arena_of(serving, store)  # which marks what was interrupted
    assert arena.battles.get(battle.id).hidden
    arena.vote(battle.id, "first")
    arena.vote(battle.id, "tie")
    assert battles.get(battle.id).verdict == "tie" and not battles.get(battle.id).hidden
    with pytest.raises(DgemmaError, match="verdict"):
        arena.vote(battle.id, "both")
    arena.delete([battle.id])
    with pytest.raises(DgemmaError, match="deleted"):
        arena.vote(battle.id, "first")
    (waiting,) = battles.add(["Hi"], ONE, OTHER, blind=True, in_turn=False)
    with pytest.raises(DgemmaError, match="not over"):
        arena.vote(waiting.id, "first")


def test_recordings_go_with_their_battle(store):
    battles = Battles(store)
    (battle,) = battles.add(["Hi"], ONE, OTHER, blind=False, in_turn=False)
    battles.put_recording(battle.id, 0, b"steps")
    assert battles.recording(battle.id, 0) == b"steps" and battles.recording(battle.id, 1) is None
    battles.delete([battle.id])
    battles.put_recording(battle.id, 1, b"late")
    assert battles.recording(battle.id, 0) is None and battles.recording(battle.id, 1) is None


def test_sides_are_drawn_by_lot_only_where_it_is_blind(store):
    battles = Battles(store)
    blind = battles.add(["Hi"] * 64, ONE, OTHER, blind=True, in_turn=False)
    assert {battle.shown for battle in blind} == {(0, 1), (1, 0)}
    assert {battle.shown for battle in battles.add(["Hi"] * 64, ONE, OTHER, blind=False, in_turn=False)} == {(0, 1)}
    assert [battle.id for battle in battles.series(blind[0].series)] == [battle.id for battle in blind]
    with pytest.raises(DgemmaError, match="these are 0"):
        battles.add([" ", ""], ONE, OTHER, blind=True, in_turn=False)


def test_an_adapter_that_is_not_there_is_refused_before_it_begins(serving, store):
    with pytest.raises(DgemmaError, match="no adapter 'gone'"):
        arena_of(serving, store).start(["Hi"], Contestant(adapter="gone"), ONE)


def test_an_adapter_answers_for_its_contestant_alone(model, store):
    class Adapters:
        known = {"poet": object()}
        get = known.__getitem__

        def paths(self):
            return dict.fromkeys(self.known, "a folder")

    service = ScriptedService(model, "5")
    service.adapters = Adapters()

    async def run():
        arena = arena_of(create_app(model, service, Settings(("scripted",))).state.served(), store)
        arena.start(["Hi"], Contestant(adapter="poet"), Contestant(), blind=False, in_turn=True)
        await over(arena)

    asyncio.run(run())
    assert [request.adapter for request in service.requests] == [Adapters.known["poet"], None]


def test_a_contestant_without_a_name_is_called_what_it_is_made_of():
    assert described(Contestant()) == "the model's own settings"
    made = Contestant(adapter="poet", system="Be brief.", options={"thinking": True, "entropy_bound": 0.25})
    assert made.title == "poet, entropy bound 0.25, thinking, “Be brief.”"


def test_prompts_are_read_from_lines_of_json():
    assert read_prompts(b'"Hi"\n\n{"prompt": "Ho", "more": 1}\n') == ["Hi", "Ho"]
    for wrong, told in ((b"Hi", "line 1 is no JSON"), (b'"a"\n{"question": "b"}', "line 2"), (b"\xff", "UTF-8")):
        with pytest.raises(DgemmaError, match=told):
            read_prompts(wrong)
