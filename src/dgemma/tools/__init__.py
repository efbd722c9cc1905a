"""What a model may call: code in a sandbox, the web, MCP servers; and the loop that lets it.

Works on: messages, tool calls, events. Knows nothing of: HTTP, terminals, the network. Heavy packages are imported when
a tool needs them.
"""
