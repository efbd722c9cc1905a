"""How much memory there is, and how much a model, a request and a step take of it."""

from dgemma.memory.machine import conversation_bytes, machine_memory, model_bytes, program_bytes, release_freed

__all__ = ["conversation_bytes", "machine_memory", "model_bytes", "program_bytes", "release_freed"]
