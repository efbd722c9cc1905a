"""A studio whose model writes a given text, at a given speed, in words and canvases of 256: to be seen, and for tests
that need an answer that takes its time. Where it has tools it calls Python before. `python -m support.studio_demo
--help`."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dgemma
from dgemma.chat.reply import Answer
from dgemma.chat.speech import Said
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished, Generation
from dgemma.diffusion.request import Request
from dgemma.serve.app import create_app
from dgemma.serve.server import bind, run, url_of
from dgemma.serve.settings import Settings
from dgemma.studio.app import create_studio
from dgemma.studio.store import Store
from support.scripted_service import Answering, ScriptedService

CANVAS, FIRST = 256, 1000  # positions of a canvas; the id of the first word
NOISE = ("the of and light harbour ## fog def return lifts **grey** slow, boat if else water morning a an into while "
         "was were gull rope 42 ( ) [ ] = :").split()
TEXT = """Denoising starts from noise and looks at **all of it at once**. Three things happen in every step:

1. the network predicts a token for every position,
2. the sampler believes those it is sure of, while their entropies sum to less than the bound $\\epsilon$,
3. everything else becomes noise again, and it looks once more.

```python
def accept(entropy, bound):
    order = entropy.argsort()
    before = entropy[order].cumsum(0) - entropy[order]
    return order[before <= bound]
```

| step | believed | mean entropy |
|---|---|---|
| 1 | 14 | 3.21 |
| 8 | 121 | 0.84 |
| 17 | 256 | 0.004 |

After ten to thirty looks nothing changes any more, and the canvas is committed as text. So
$p(x) \\approx \\prod_i p(x_i)$ holds for what was believed together.
"""


CODE = """from PIL import Image

Image.linear_gradient("L").rotate(90).save("fog.png")
for step in range(1, 31):
    print(step, round(3.2 * 0.8 ** step, 3))
"""
CALL = f'<|tool_call>call:python{{code:<|"|>{CODE}<|"|>}}<tool_call|>'


class Words:
    """The bundled model's tokenizer, with words beside its bytes."""

    def __init__(self, tokenizer: Any, text: str):
        self._tokenizer = tokenizer
        self.pieces = re.findall(r"\n| ?[A-Za-z]+| ?\d+| ?[^\sA-Za-z\d]+| ", text)
        self.spelt = list(dict.fromkeys([*self.pieces, *(f" {word}" for word in NOISE)]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def ids(self) -> list[int]:
        return [FIRST + self.spelt.index(piece) for piece in self.pieces]

    def token_bytes(self, token: int) -> bytes:
        return self.spelt[token - FIRST].encode() if token >= FIRST else self._tokenizer.token_bytes(token)

    def is_special(self, token: int) -> bool:
        return token < FIRST and self._tokenizer.is_special(token)


class Slow(ScriptedService):
    """Denoises the text in ``steps`` steps a canvas, ``seconds`` each."""

    def __init__(self, model: Any, words: Words, steps: int, seconds: float):
        super().__init__(model, "")
        self.words, self.steps, self.pause = words, steps, seconds
        self.called = False

    def start(self) -> None:
        """As a `Service` does."""

    async def stop(self, grace: float = 0) -> int:
        return 0

    async def admit(self, request: Request) -> Any:
        self.called = bool(request.tools) and not self.called
        made = self._events(request, CALL) if self.called else self._denoise(request)
        return Answering(self, made)  # type: ignore[arg-type]

    async def _denoise(self, request: Request) -> AsyncIterator[Event]:
        random_ = random.Random(request.seed)
        noise = [FIRST + self.words.spelt.index(f" {word}") for word in NOISE]
        ids, end = self.words.ids(), self.words.token_to_id("<turn|>")
        canvases = [ids[start : start + CANVAS] for start in range(0, len(ids), CANVAS)]
        for index, tokens in enumerate(canvases):
            target = [*tokens, *[end] * (CANVAS - len(tokens))]
            settles = [1 + (self.steps - 3) * (0.55 * place / CANVAS + 0.45 * random_.random())
                       for place in range(CANVAS)]
            start = [random_.choice(noise) for _ in target]
            yield CanvasStarted(0, index, start, [False] * CANVAS, len(request.prompt_ids), 48)
            before = start
            for step in range(1, self.steps + 1):
                await asyncio.sleep(self.pause)
                sure = [step >= at for at in settles]
                draft = [token if step >= at - 2 else random_.choice(noise)
                         for token, at in zip(target, settles, strict=True)]
                entropies = [random_.uniform(0, 0.02) if known else
                             max(0.1, (at - step) / self.steps * 7) * random_.uniform(0.5, 1)
                             for known, at in zip(sure, settles, strict=True)]
                yield Denoised(0, index, step, draft, draft, entropies, sure,
                               [one != other for one, other in zip(draft, before, strict=True)], 0.8 - step / 100, 0.1)
                before = draft
            text = "".join(self.words.spelt[token - FIRST] for token in tokens)
            yield CanvasCommitted(0, index, tokens, self.steps, 0.1, None, [Said(text, (0, 1))])
        whole = "".join(self.words.pieces)
        yield Finished(0, Generation(whole, None, [], ids, "stop", [self.steps] * len(canvases), 8.0,
                                     len(request.prompt_ids), 1.0, request.seed), Answer(whole, None, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.08, help="of a step")
    parser.add_argument("--model", default="sudoku", help="whose tokenizer, and eyes, it has")
    given = parser.parse_args()
    model = dgemma.load(given.model)
    words = Words(model.tokenizer, TEXT)
    model.tokenizer = words  # type: ignore[assignment]  # of this process alone
    service, settings = Slow(model, words, given.steps, given.seconds), Settings(("demo",), timeout=0)
    with bind("127.0.0.1", given.port) as listener:
        app, studio = create_studio(create_app(model, service, settings), Store(given.data),
                                    port=listener.getsockname()[1])
        run(app, service, listener, grace=1, body_timeout=30, ready=lambda: print(  # type: ignore[arg-type]
            f"open {url_of(listener)}/launch?token={studio.sessions.new_token()} ", flush=True))


if __name__ == "__main__":
    main()
