"""Readers of answers for engines over networks whose tokens are no text."""

from dgemma.diffusion.reading import NoReader


def reading(answer, stop=lambda tokens: None):
    """A `MakeReader`: ``answer(request, tokens)`` is (text, reasoning, tool calls); ``stop(tokens)`` is where they end.

    Each canvas is a piece.
    """
    class Reader(NoReader):
        def __init__(self, request):
            super().__init__()
            self.request, self.tokens = request, []

        def feed(self, token_ids):
            self.tokens += token_ids
            self.stop_place = stop(self.tokens) if self.stop_place is None else self.stop_place
            return [list(token_ids)]

        def finish(self):
            return NoReader(*answer(self.request, self.tokens[: self.stop_place]))

    return Reader
