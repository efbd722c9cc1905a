"""Errors that are the user's to mend: shown as one clear message, never as a traceback."""


class DgemmaError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do."""


class NotFiniteError(DgemmaError):
    """The network computes numbers that are none: its weights are damaged, or too large for its dtype."""


class CheckpointError(DgemmaError):
    """A checkpoint that cannot be used: the message names the file and the cause."""
