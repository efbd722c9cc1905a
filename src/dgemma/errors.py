"""Errors that are the user's to mend: shown as one clear message, never as a traceback."""


class DgemmaError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do."""


class ContextLengthError(DgemmaError, ValueError):
    """A prompt, with the answer it needs, that is longer than what there is room for.

    ``prompt_tokens``: how long it is, at least; ``most``: how long it may be. Both None where tokens are not the
    measure (memory).
    """

    def __init__(self, message: str, prompt_tokens: int | None = None, most: int | None = None):
        super().__init__(message)
        self.prompt_tokens, self.most = prompt_tokens, most


class CheckpointError(DgemmaError):
    """A checkpoint that cannot be used: the message names the file and the cause."""
