"""How much memory there is, and how much a model, a request, a step and a training run take of it."""

from dgemma.memory.machine import (
    available_memory,
    conversation_bytes,
    machine_memory,
    model_bytes,
    program_bytes,
    release_freed,
)

__all__ = ["available_memory", "conversation_bytes", "machine_memory", "model_bytes", "program_bytes", "release_freed"]
