"""Messages to tokens, and a model's raw output back to text, thoughts and tool calls.

The checkpoint's own tokenizer and template do the work. Knows nothing of: the network, sampling, HTTP.
"""
