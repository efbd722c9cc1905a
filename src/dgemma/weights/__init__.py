"""Checkpoints to tensors and back. Knows nothing of sampling."""
