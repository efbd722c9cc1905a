"""Denoising: the sampler as pure functions, a request's way through its canvases, the events it makes.

Knows nothing of HTTP or the terminal.
"""
