"""A small book shop whose ASGI views all run on an injected session."""
