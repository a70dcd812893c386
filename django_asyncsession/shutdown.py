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
    """Hold the signal back from now on, if uvicorn handles it; called when a pool is made. No other
    server raises it again, and what a project has of its own is left alone."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler: Any = signal.getsignal(SIGNAL)
    server = type(getattr(handler, "__self__", None))
    is_uvicorn = any(cls.__module__.startswith("uvicorn.") for cls in server.__mro__)
    # Not on Windows, where nothing can be held back.
    if is_uvicorn and hasattr(signal, "pthread_sigmask"):
        signal.signal(SIGNAL, _HeldBack(handler))


def let_go() -> None:
    """Let a signal that was held back come through, now that the process ends: by the signal, or
    by itself where the program has a handler of its own, which has nothing to end any more."""
    if not hasattr(signal, "pthread_sigmask") or SIGNAL not in signal.sigpending():
        return
    with suppress(ValueError):
        if callable(signal.getsignal(SIGNAL)):
            signal.signal(SIGNAL, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])


# When the event loop has ended, or if it never does.
atexit.register(let_go)
