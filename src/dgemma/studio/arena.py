"""Battles while they go on: they live here, on the server, whoever looks at them, one after another.

Works on: `dgemma.studio.answers.Answer`, battles. Knows nothing of: pages, the network.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from nicegui import Event

from dgemma.errors import DgemmaError
from dgemma.serve.backend import Serving
from dgemma.studio.answers import RECENT, STOPPING, Answer
from dgemma.studio.battles import Battle, Battles, Contestant, Outcome, Verdict
from dgemma.studio.recording import Recording
from dgemma.studio.store import Store

log = logging.getLogger("dgemma.studio")


class Arena:
    """``serving`` gives what answers for a contestant; ``changed`` is told of a battle in which something is new."""

    def __init__(self, serving: Callable[[Contestant], Serving], store: Store, changed: Event[str]):
        self.battles, self.changed = Battles(store), changed
        self._serving = serving
        self._answers: OrderedDict[str, list[Answer | None]] = OrderedDict()  # by battle: the first's, the second's
        self._waiting: deque[str] = deque()
        self._running: str | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.battles.mark_interrupted()

    def answer(self, id: str, side: int) -> Answer | None:
        """A contestant's answer, if it is made now or was lately."""
        return self._answers.get(id, [None, None])[side]

    def active(self) -> list[str]:
        """The battle that goes on, and those that wait for it."""
        return [*([] if self._running is None else [self._running]), *self._waiting]

    def start(self, prompts: Sequence[str], first: Contestant, second: Contestant, *, blind: bool = True,
              in_turn: bool = False) -> list[Battle]:
        """Let two contestants answer every prompt. Raises DgemmaError for what cannot be asked of them."""
        for contestant in (first, second):
            serving = self._serving(contestant)
            if contestant.adapter is not None and contestant.adapter not in serving.backend.adapters.paths():
                raise DgemmaError(f"there is no adapter {contestant.adapter!r} any more")
        made = self.battles.add(prompts, first, second, blind=blind, in_turn=in_turn)
        self._waiting.extend(battle.id for battle in made)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return made

    def vote(self, id: str, verdict: Verdict) -> None:
        """Note what somebody finds; a second vote takes the place of the first."""
        battle = self.battles.get(id)
        if battle is None or not battle.over:
            raise DgemmaError("this battle is not over yet" if battle else "this battle was deleted")
        self.battles.change(id, verdict=verdict)
        self.changed.emit(id)

    def stop(self, id: str) -> None:
        """Stop both answers of a battle, and all that wait in its series; what was committed stays."""
        battle = self.battles.get(id)
        if battle is not None:
            for other in self.battles.series(battle.series):
                if other.id in self._waiting:
                    self._waiting.remove(other.id)
                    self.battles.change(other.id, status="stopped")
        for answer in self._answers.get(id, []):
            if answer is not None:
                answer.stop()
        self.changed.emit(id)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete battles; what goes on in them is stopped."""
        for id in ids:
            if id in self.active():
                self.stop(id)
            self._answers.pop(id, None)
        self.battles.delete(ids)
        self.changed.emit("")

    def stop_those_of(self, serving: Serving, why: str) -> None:
        """Stop what a model makes that is about to go; ``why`` is told of these answers."""
        for answer in self._known():
            if answer.running and answer.serving is serving:
                answer.stop(why)

    def let_go(self, gone: Serving, now: Serving) -> None:
        """Keep nothing of a model that has gone."""
        for answer in self._known():
            if answer.serving is gone:
                answer.serving = now

    def _known(self) -> list[Answer]:
        return [answer for answers in self._answers.values() for answer in answers if answer is not None]

    def recording(self, name: str) -> Recording | None:
        """How an answer came to be, by its `recording_name`. Raises DgemmaError when that is damaged."""
        id, _, side = name.rpartition(".")
        if not id or side not in ("0", "1"):
            return None
        if (answer := self.answer(id, int(side))) is not None:
            return answer.recording
        data = self.battles.recording(id, int(side))
        return None if data is None else Recording.unpack(data)

    async def _run(self) -> None:
        while self._waiting and not self._closing:
            self._running = self._waiting.popleft()
            try:
                battle = self.battles.get(self._running)
                if battle is not None:
                    await self._fight(battle)
            except Exception:  # of one battle; the others shall go on
                log.exception("a battle of the arena could not be finished")
                self.battles.change(self._running, status="stopped")
            finally:
                over, self._running = self._running, None
                self.changed.emit(over)

    async def _fight(self, battle: Battle) -> None:
        self.battles.change(battle.id, status="running")
        answers: list[Answer | None] = [None, None]
        self._answers[battle.id] = answers
        while len(self._answers) > RECENT:
            self._answers.popitem(last=False)
        if battle.in_turn:
            for side in battle.shown:
                if not any(answer is not None and answer.status == "stopped" for answer in answers):
                    await self._answer(battle, side)
        else:
            await asyncio.gather(*(self._answer(battle, side) for side in battle.shown))
        stopped = any(answer is None or answer.status == "stopped" for answer in answers)
        self.battles.change(battle.id, status="stopped" if stopped else "done")

    async def _answer(self, battle: Battle, side: int) -> None:
        """One contestant's answer, from its beginning until it is kept."""
        contestant = battle.outcomes[side].contestant
        said = [{"role": "system", "content": contestant.system}] if contestant.system.strip() else []
        options = contestant.options if contestant.adapter is None else {
            **contestant.options, "adapter": contestant.adapter}
        answer = Answer(self._serving(contestant), [*said, {"role": "user", "content": battle.prompt}], options)
        self._answers[battle.id][side] = answer
        answer.start()
        self.changed.emit(battle.id)
        await answer.finished()
        outcome = Outcome(contestant, answer.text, answer.reasoning, answer.info)
        self.battles.change(battle.id, first=None if side else outcome, second=outcome if side else None)
        if answer.recording.canvases:
            self.battles.put_recording(battle.id, side, answer.recording.pack())

    async def close(self) -> None:
        """Stop everything, and wait until it is written down."""
        self._closing = True
        self._waiting.clear()
        for answer in self._known():
            answer.stop(STOPPING)
        if self._task is not None:
            await asyncio.wait([self._task])
        self.battles.mark_interrupted()


def recording_name(id: str, side: int) -> str:
    """What the recording of a contestant's answer is called where the studio's recordings are had."""
    return f"{id}.{side}"
