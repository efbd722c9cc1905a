"""Answers while they are made, and for a while after: they live here, on the server, whoever looks at them.

A page that is reloaded, or a second one, finds its answer by its message and goes on watching. With tools an answer is
a turn of several messages (`turns`). Works on: a backend (`dgemma.serve.backend`), a store. Knows nothing of: pages,
the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dgemma.chat.reply import Called, Piece, Thought, read_answer
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Event, Failed, Finished
from dgemma.diffusion.request import Request
from dgemma.errors import DgemmaError
from dgemma.serve.ask import engine_request
from dgemma.serve.backend import Serving
from dgemma.serve.errors import ApiError, as_api_error
from dgemma.serve.metrics import RequestListener
from dgemma.studio.asking import ask_of, prompt_of, settings_of, with_files
from dgemma.studio.edits import Start
from dgemma.studio.media import MediaFolder
from dgemma.studio.news import Watched
from dgemma.studio.recording import Recording
from dgemma.studio.store import Message, Status, Store
from dgemma.studio.toolboxes import Toolboxes, is_chosen
from dgemma.studio.turns import CallInHand, Turn

log = logging.getLogger("dgemma.studio")

RECENT = 20  # answers whose recordings stay in memory
SAVE_EVERY = 1.0  # seconds at least between two notes of an answer that goes on
STOPPING = "The server is stopping and has cut off this answer."


@dataclass(frozen=True)
class Figures:
    """What is worth telling of an answer, so far. ``tokens`` are delivered ones: noise, fill and stop tokens are none.

    ``seconds`` are from its first canvas on; ``finish_reason`` is None until it is over.
    """

    tokens: int = 0
    seconds: float = 0.0
    canvases: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Answer(Watched):
    """One answer: what it says by now, how it came to be, and whether it goes on.

    For the event loop's thread. ``changed`` waits for news; who watches reads the fields then, as fast as he likes.
    """

    def __init__(self, serving: Serving, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any],
                 clock: Callable[[], float] = time.monotonic, media: MediaFolder | None = None,
                 start: Start | None = None):
        """``messages`` and ``options`` (of `OPTIONS`) are what it answers, and how; their files are in ``media``;
        ``start``: the canvas that it goes on from, with what was said before that."""
        super().__init__()
        self.serving, self.messages, self.options = serving, list(messages), dict(options)
        self.id = ""  # of its message, if it has one
        self.conversation = ""
        self.recording = Recording() if start is None else start.before
        self.text = self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.status: Status = "running"
        self.error: str | None = None
        self.figures = Figures()
        self.info: dict[str, Any] = {}  # what is kept of it, when it is over
        self.finished_with: Finished | None = None  # how the engine ended it
        self._clock, self._media, self._start = clock, media, start
        self._began: float | None = None
        self._token_ids: list[int] = []
        self._stopped = False
        self._why: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self.status == "running"

    def start(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin, unless it was stopped before; once. ``tools`` are declared to the model."""
        if not self.running:
            return
        self._task = asyncio.get_running_loop().create_task(self._run(tools))
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        if self.running:  # stopped before it had begun
            self._end("stopped", None)
            self._tell()

    def stop(self, why: str | None = None) -> None:
        """End it within a step; what was committed stays. ``why``: what is told of that, if it was not the user."""
        self._stopped, self._why = True, why
        if self.running and self._task is not None:
            self._task.cancel()
        elif self.running:  # it waits for its tools
            self._end("stopped", why)
            self._tell()

    def fail(self, why: str, advice: str = "") -> None:
        """It cannot begin."""
        self._end("failed", why, advice)
        self._tell()

    async def finished(self) -> None:
        """Wait until it is over."""
        while self.running:
            await self.changed()

    async def _run(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """All of it. Nothing is raised: what goes wrong is the answer's ``error``."""
        request: Request | None = None
        try:
            messages = self.messages if self._media is None else await asyncio.to_thread(
                with_files, self.messages, self._media)
            adapter = self.serving.adapter(self.options.get("adapter"))
            asked = replace(ask_of(messages, self.options, tools), adapter=adapter)
            request = await engine_request(
                self.serving, asked if self._start is None else self._start.asked_in(asked))
            if self._start is not None:
                self._read(request)
            listener = RequestListener(self.serving.metrics, request, self.serving.model.tokenizer.decode)
            events = await self.serving.backend.admit(request)
            try:
                async for event in events:
                    listener(event)
                    self._apply(event, request)
                    self._tell()
            finally:
                await asyncio.shield(events.aclose())
            if self.running:
                self._end("failed", "The engine ended without finishing this answer.")
        except asyncio.CancelledError:
            self._cut(request)
            if not self._stopped:
                raise  # the loop is ending
        except Exception as error:
            foreseen = DgemmaError(str(error)) if isinstance(error, ValueError) else error  # of what cannot be run
            failure = as_api_error(foreseen)
            self._end("failed", failure.message, advice_for(failure))
        finally:
            self._tell()

    def _apply(self, event: Event, request: Request) -> None:
        tokenizer = self.serving.model.tokenizer
        self.recording.apply(event, lambda token: (tokenizer.token_bytes(token), tokenizer.is_special(token)))
        if isinstance(event, CanvasStarted) and self._began is None:
            self._began = self._clock()
            self.figures = Figures(prompt_tokens=len(request.prompt_ids))
        elif isinstance(event, CanvasCommitted):
            self._token_ids += event.token_ids
            self._say(event.pieces)
            self._count()
        elif isinstance(event, Finished):
            made, self.finished_with = event.generation, event
            self._say(event.answer.rest)
            if self._start is not None:
                self._read(request)  # what was said before and what was said now meet, in a word or a thought
            reason = "stop" if event.answer.stopped is not None else made.finish_reason
            self._count("tool_calls" if reason == "stop" and self.calls else reason)
            self.info = {"steps": made.steps, "seed": made.seed, "cached_tokens": made.cached_tokens,
                         "thought_tokens": event.answer.thought_tokens}
            cut = reason == "cancelled"
            self._end("stopped" if cut else "done", STOPPING if cut else None)
        elif isinstance(event, Failed):
            log.error("an answer could not be finished: %s", event.error)
            self._end("failed", event.told or "The engine could not finish this answer: the terminal says why.")

    def _say(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Called):
                self.calls.append({"name": piece.name, "arguments": piece.arguments})
            elif isinstance(piece, Thought):
                self.reasoning += piece.text
            else:
                self.text += piece.text

    def _count(self, finish_reason: str | None = None) -> None:
        seconds = 0.0 if self._began is None else self._clock() - self._began
        self.figures = Figures(len(self._token_ids), seconds, len(self.recording.canvases),
                               self.figures.prompt_tokens, finish_reason)

    def _read(self, request: Request) -> None:
        """Read all that was said, with what it goes on from (the end of the request's prompt)."""
        prefix = [] if self._start is None else self._start.prefix
        prompt_ids = request.prompt_ids[: len(request.prompt_ids) - len(prefix)]
        read = read_answer(self.serving.model.tokenizer, prompt_ids, [*prefix, *self._token_ids], **request.reading)
        self.text, self.reasoning, self.calls = read.text, read.reasoning or "", list(read.tool_calls)

    def _cut(self, request: Request | None) -> None:
        """It was stopped: what was committed is all there is."""
        if request is not None:
            self._read(request)
            self.info = {"seed": request.seed}
        self._count("stopped")
        self._end("stopped", self._why)

    def _end(self, status: Status, error: str | None, advice: str = "") -> None:
        if not self.running:
            return
        self.status, self.error, figures = status, error, self.figures
        self.info = {**self.info, "finish_reason": figures.finish_reason, "tokens": figures.tokens,
                     "seconds": round(figures.seconds, 3), "tokens_per_second": round(figures.tokens_per_second, 1),
                     "prompt_tokens": figures.prompt_tokens, "canvases": figures.canvases,
                     "model": self.serving.settings.served_names[0], "options": self.options}
        if self.calls:
            self.info["tool_calls"] = self.calls
        if error is not None:
            self.info["error"] = error
        if advice:
            self.info["advice"] = advice


def advice_for(error: ApiError) -> str:
    """What to do about an error."""
    if error.status in (429, 503):
        return "Others are being answered: try again in a moment."
    if error.code == "context_length_exceeded":
        return "Start a new chat, or edit a message to say less."
    if "vision tower" in error.message:
        return "Edit the message and leave the picture out, or start the studio with a model that sees (-m, --mmproj)."
    if error.status == 400:
        return "Change that in the settings (the sliders above), and try again."
    return "Try again; the terminal says more."


class Answers:
    """The answers to the messages of conversations: those that are made, and the recordings of recent ones.

    ``tools`` are those that conversations may choose. ``serving`` gives what answers at the moment. ``changed`` is told
    of a conversation in which something began or ended.
    """

    def __init__(self, serving: Callable[[], Serving], store: Store,
                 changed: Callable[[str], None] = lambda conversation: None,
                 clock: Callable[[], float] = time.monotonic, tools: Toolboxes | None = None):
        self._serving, self._store, self._changed, self._clock = serving, store, changed, clock
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._savers: set[asyncio.Task[None]] = set()
        self.tools = tools or Toolboxes(store)
        self._turns: dict[asyncio.Task[None], str] = {}  # those that go on -> their conversations
        self._calls: dict[str, CallInHand] = {}

    def get(self, message: str) -> Answer | None:
        """The answer that a message of the assistant is, if it is made now or was lately."""
        return self._answers.get(message)

    def call(self, message: str) -> CallInHand | None:
        """The call that a message of a tool is, if it is being made now."""
        return self._calls.get(message)

    def busy(self, conversation: str) -> bool:
        """Whether something is said or done in a conversation, or waits for an approval."""
        return conversation in self._turns.values() or bool(self.running(conversation))

    def running(self, conversation: str) -> list[Answer]:
        """What is made in a conversation now."""
        return [answer for answer in self._answers.values() if answer.conversation == conversation and answer.running]

    def start(self, question: Message, options: Mapping[str, Any] | None = None,
              start: Start | None = None) -> Answer:
        """Answer a message, the last one of its branch; another answer to the same one is a branch beside it.

        ``options``: those of the conversation if None; ``start``: the canvas that it goes on from. With tools chosen in
        the options, what comes back is the first answer of a turn. Raises DgemmaError when the conversation is not
        there any more.
        """
        owner = self._store.conversation(question.conversation)
        if owner is None:
            raise DgemmaError("this conversation was deleted")
        options = owner.options if options is None else options
        messages = prompt_of(self._store, owner.system, question)
        settings, chosen = settings_of(options, messages), options.get("tools") or {}
        answer = self._add(question.id, owner.id, messages, settings, start)
        if is_chosen(chosen):
            turn = asyncio.get_running_loop().create_task(self._take_turn(question, answer, chosen))
            self._turns[turn] = owner.id
            turn.add_done_callback(partial(self._turn_over, answer))
        else:
            answer.start()
        self._changed(owner.id)
        return answer

    def denoise_again(self, message: Message, start: Start, seed: int | None = None) -> Answer:
        """Go on from a canvas of an answer, edited: another answer beside it, with the conversation's settings of now.

        ``seed`` None: that of the settings. Raises DgemmaError when the answer, or what it answers, is there no more.
        """
        question, owner = self._store.message(message.parent or ""), self._store.conversation(message.conversation)
        if question is None or owner is None:
            raise DgemmaError("this answer was deleted")
        return self.start(question, {**owner.options, **({} if seed is None else {"seed": seed})}, start)
    def _add(self, parent: str, conversation: str, messages: Sequence[Mapping[str, Any]],
             settings: Mapping[str, Any], start: Start | None = None) -> Answer:
        """An answer that has a message and has not begun."""
        answer = Answer(self._serving(), messages, settings, self._clock, self._store.media, start)
        message = self._store.add_message(conversation, "assistant", "", parent=parent, status="running",
                                          info={"model": answer.serving.settings.served_names[0]})
        answer.id, answer.conversation = message.id, conversation
        self._answers[message.id] = answer
        self._forget()
        saver = asyncio.get_running_loop().create_task(self._save(answer))
        self._savers.add(saver)
        saver.add_done_callback(self._savers.discard)
        return answer

    async def _take_turn(self, question: Message, first: Answer, chosen: Mapping[str, str]) -> None:
        """Let the model answer with tools, ``first`` its first answer."""
        conversation = question.conversation

        async def speak(parent: str, messages: list[dict[str, Any]],
                        tools: list[dict[str, Any]]) -> tuple[str, Finished | None]:
            answer = first
            if parent != question.id:
                answer = self._add(parent, conversation, messages, first.options)
                self._changed(conversation)
            answer.start(tools)
            try:
                await answer.finished()
            except asyncio.CancelledError:
                answer.stop()
                raise
            return answer.id, answer.finished_with if answer.status == "done" else None

        try:
            async with self.tools.use(conversation, chosen) as toolbox:
                await Turn(self._store, question, first.messages, toolbox, speak, self._calls,
                           lambda: self._changed(conversation), partial(self._allow, conversation)).run()
        except DgemmaError as error:
            # It has not begun, or the conversation is gone.
            first.fail(str(error), "Mend that, or turn the tool off in the settings (the sliders above).")

    def _allow(self, conversation: str, tool: str) -> None:
        """A tool of a conversation runs without a question from now on."""
        if (owner := self._store.conversation(conversation)) is not None:
            options = {**owner.options, "tools": {**owner.options.get("tools", {}), tool: "auto"}}
            self._store.change_conversation(conversation, options=options)

    def _turn_over(self, first: Answer, turn: asyncio.Task[None]) -> None:
        conversation = self._turns.pop(turn)
        first.stop()  # if it has not begun
        if not turn.cancelled() and (error := turn.exception()) is not None:
            log.error("a turn could not be finished", exc_info=error)
        self._changed(conversation)

    def stop(self, message: str) -> None:
        """Stop the answer, if it is being made."""
        if (answer := self.get(message)) is not None:
            answer.stop()

    def stop_all(self, conversation: str) -> None:
        """Stop what is made in a conversation, as when it is deleted."""
        for turn, owner in self._turns.items():
            if owner == conversation:
                turn.cancel()
        for answer in self.running(conversation):
            answer.stop()

    def stop_those_of(self, serving: Serving, why: str) -> None:
        """Stop what a model makes that is about to go; ``why`` is told of these answers."""
        for answer in self._answers.values():
            if answer.running and answer.serving is serving:
                answer.stop(why)

    def let_go(self, gone: Serving, now: Serving) -> None:
        """Keep nothing of a model that has gone: its answers that are over are as good as those of another one."""
        for answer in self._answers.values():
            if answer.serving is gone:
                answer.serving = now

    def recording(self, message: str) -> Recording | None:
        """How an answer came to be; None if nothing was kept of it. Raises DgemmaError when that is damaged."""
        if (answer := self.get(message)) is not None:
            return answer.recording
        data = self._store.recording(message)
        return None if data is None else Recording.unpack(data)

    def _forget(self) -> None:
        over = [id for id, answer in self._answers.items() if not answer.running]
        for id in over[: max(len(self._answers) - RECENT, 0)]:
            del self._answers[id]

    async def _save(self, answer: Answer) -> None:
        """Write an answer down as it comes: at its canvases' ends, once a second at most, and when it is over."""
        saved, last = 0, -SAVE_EVERY
        while answer.running:
            await answer.changed()
            if answer.running and answer.figures.canvases and answer.figures.tokens > saved:
                wait = last + SAVE_EVERY - self._clock()
                if wait > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(answer.finished(), wait)
                if answer.running:
                    saved, last = answer.figures.tokens, self._clock()
                    self._store.change_message(answer.id, content=answer.text, reasoning=answer.reasoning)
        self._store.change_message(answer.id, content=answer.text, reasoning=answer.reasoning, status=answer.status,
                                   info=answer.info)
        if answer.recording.canvases:
            self._store.put_recording(answer.id, answer.recording.pack())
        self._changed(answer.conversation)

    async def close(self) -> None:
        """Stop everything, and wait until it is written down."""
        for answer in self._answers.values():
            answer.stop(STOPPING)
        for turn in self._turns:
            turn.cancel()
        while going := [*self._turns, *self._savers]:
            await asyncio.wait(going)
        await self.tools.close_all()
