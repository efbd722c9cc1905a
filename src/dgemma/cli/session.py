"""What every command that generates needs: loading with a progress bar, stopping on Ctrl-C, showing events."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.terminal.console import SafeConsole
from dgemma.cli.terminal.progress import DownloadBar, ProgressBar
from dgemma.machine import signals_handled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dgemma.cli.remote.model import RemoteModel
    from dgemma.diffusion.events import Event, Generation
    from dgemma.model import Model

    AnyModel = Model | RemoteModel

BUNDLED = "sudoku"
LOADING_PATIENCE = 0.5  # seconds that loading takes before there is a bar
PATIENCE = 2.0  # seconds that a second Ctrl-C waits for the model's present step
HINT = ("Using the bundled Sudoku model. For the 26B model: dgemma run -m model.gguf \"…\" (18 GB of memory in "
        "Q4_K_M), or dgemma run -m google/diffusiongemma-26B-A4B-it \"…\" (52 GB)")


def load_model(name: str | None, *, hint: bool = True, **local: Any) -> Model:
    """Load a model for a command, as `dgemma.load` does, with a progress bar on stderr when it takes a while."""
    import dgemma

    if name is None and hint:
        SafeConsole(stderr=True, highlight=False).print(HINT, style="dim", soft_wrap=True, markup=False)
    with ProgressBar("loading", patience=LOADING_PATIENCE) as bar:
        model = dgemma.load(BUNDLED if name is None else name, progress=bar.update, downloads=DownloadBar, **local)
    _say_if_tight(model)
    return model


def open_model(name: str | None, *, url: str | None, api_key: str | None, live: bool, **local: Any) -> AnyModel:
    """The model that a command asks for: on the server at ``url``, else loaded here with the ``local`` options.

    Raises DgemmaError when a local option comes with a url.
    """
    if url is None:
        return load_model(name, **local)
    from dgemma.cli.remote.model import connect, refuse_with_url

    refuse_with_url(**local)
    return connect(url, api_key, name, drafts=live)


def _say_if_tight(model: Model) -> None:
    """Tell on stderr what to expect if weights that stay in their file are more than memory can hold.

    The program itself is in memory already: `machine_memory` does not count what it takes as available.
    """
    from dgemma.formats import size_text
    from dgemma.memory import conversation_bytes, machine_memory
    from dgemma.memory.inference import mapped_bytes
    from dgemma.nn.packed import packed_bytes

    weights = mapped_bytes(model.network)
    needed = weights + conversation_bytes(weights, packed_bytes(model.network) > 0)
    available, _ = machine_memory()
    if not weights or available is None or needed <= available:
        return
    SafeConsole(stderr=True, highlight=False).print(
        f"Note: this model wants about {size_text(needed)} of memory and "
        f"{size_text(available)} are available. It runs all the same, but what does not fit is read from the disk "
        "again in every step: expect that to decide the speed. Closing programs or a smaller quantisation helps.",
        style="yellow", soft_wrap=True, markup=False)


def piece_of(model: AnyModel) -> Callable[[int], tuple[bytes, bool]]:
    """What the live canvas and a trace ask about a token: its bytes and whether it is special."""
    tokenizer = model.tokenizer
    return lambda token: (tokenizer.token_bytes(token), tokenizer.is_special(token))


def follow(model: AnyModel, events: Iterable[Event], *, visual: bool, trace: Path | None = None, prompt: str = "",
           pace: float = 0.0, insist: bool = True) -> Generation:
    """Consume a request's events: draw them live if ``visual``, save them if asked; Ctrl-C ends the answer early.

    ``pace`` shows every step for at least so many seconds. The model runs on meanwhile, in a thread of its own: neither
    a slow terminal nor a pace for the eye slows it down or spoils its figures. ``insist``: a second Ctrl-C is a
    KeyboardInterrupt; without it, it only asks again. However this is left, the model has stopped then (but for a long
    step that a KeyboardInterrupt does not wait for).
    """
    from dgemma.diffusion.events import Denoised, Finished

    # Queues and not Events: a signal handler that sets an Event can come in the middle of a wait for it, and then
    # both wait for the Event's lock. A SimpleQueue is made for this.
    hurry: queue.SimpleQueue[None] = queue.SimpleQueue()
    hurried = False

    def stop(*_: object) -> None:  # in the middle of anything: it must not wait for a lock
        if insist:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        hurry.put(None)
        model.cancel()

    generation = None
    with ExitStack() as stack:
        stack.enter_context(signals_handled(stop, signal.SIGINT))
        writer = canvas = None
        if trace is not None:
            from dgemma.diffusion.trace import TraceWriter

            writer = stack.enter_context(TraceWriter(trace, model=model.name, prompt=prompt, piece_of=piece_of(model)))
        if visual:
            from dgemma.cli.terminal.canvas import LiveCanvas, PlainText

            # A server without drafts gives text as it comes.
            viewer = LiveCanvas if getattr(model, "has_drafts", True) else PlainText
            canvas = stack.enter_context(viewer(SafeConsole(highlight=False), piece_of(model)))
            events = stack.enter_context(_in_thread(events, model.cancel))
        else:
            stack.callback(_close, events)
        for event in events:
            if writer is not None:
                writer.write(event)
            if canvas is not None:
                canvas.show(event)
            if isinstance(event, Finished):
                generation = event.generation
            elif visual and pace and not hurried and isinstance(event, Denoised):
                with suppress(queue.Empty):
                    hurry.get(timeout=pace)
                    hurried = True
    if generation is None:
        raise RuntimeError("the engine stopped without finishing the request")
    return generation


@contextmanager
def _in_thread(events: Iterable[Event], cancel: Callable[[], None]) -> Iterator[Iterator[Event]]:
    """The events, made in a thread of their own, which has ended when this has; ``cancel`` makes it end early.

    Only a KeyboardInterrupt does not wait for a long step to end: whoever asks twice wants to leave at once.
    """
    made: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    abandoned = ended = False

    def make() -> None:
        try:
            for event in events:
                made.put(event)
                if abandoned:
                    break
            made.put(None)
        except BaseException as error:  # carried over to the thread that waits, and raised there
            made.put(error)
        finally:
            _close(events)

    def received() -> Iterator[Event]:
        nonlocal ended
        while (event := made.get()) is not None and not isinstance(event, BaseException):
            yield event
        ended = True
        if event is not None:
            raise event

    worker = threading.Thread(target=make, daemon=True)
    worker.start()
    patience = None
    try:
        yield received()
    except KeyboardInterrupt:
        patience = PATIENCE
        raise
    finally:
        abandoned = True
        if not ended:
            cancel()
        worker.join(patience)


def _close(events: Iterable[Event]) -> None:
    """End a generator: what it holds is free then, not some time later."""
    close = getattr(events, "close", None)
    if close is not None:
        close()
