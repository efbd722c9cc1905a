"""The studio: a page in the browser where one chats with a model and watches it denoise.

Works on: `serve`'s application and backend, NiceGUI, SQLite. Knows nothing of: the network.
"""
