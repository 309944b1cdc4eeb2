"""OpenAI's and Anthropic's protocols over the engine: wire formats to messages and options, deltas back.

Read `work.py` first: what a request asks, and what comes back, without any wire format. A file for each protocol
stands on it (`chat.py`, `completions.py`, `responses.py`, `messages.py`), `flow.py` runs one request, and `app.py` puts
it together.
"""
