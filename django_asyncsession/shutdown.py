"""Lets the statements of requests that are cut end with a server that is told to stop by SIGTERM.

uvicorn cancels what runs for too long and then raises the signal again, which ends the process
before the cancelled tasks had a turn: nothing tells the database. So the signal, once the server
has taken note of it, is held back until the event loop has ended its tasks and pools, and ends the
process then.
"""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

SIGNAL = signal.SIGTERM


class _HeldBack:
    """The server's own handler; after its call the signal waits for `let_go`."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handler(number, frame)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])


def hold_back() -> None:
    """Hold the signal back from now on, if a server in this thread handles it; called when a pool
    is made. Handlers of the event loop raise it again for nobody, and are left alone."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(SIGNAL)
    if not callable(handler) or isinstance(handler, _HeldBack):
        return
    if getattr(handler, "__module__", "").startswith("asyncio"):
        return
    # Not on Windows, where nothing can be held back.
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(SIGNAL, _HeldBack(handler))


def let_go() -> None:
    """Let a signal that was held back come through."""
    if hasattr(signal, "pthread_sigmask"):
        with suppress(ValueError):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])


# When the event loop has ended, or if it never does.
atexit.register(let_go)
