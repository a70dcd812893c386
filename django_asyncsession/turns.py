"""Lets the tasks that share a connection use it one at a time, first come first served."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from .exceptions import SessionInUseError, WrongLoopError
from .pool import task_name

# The turns that the current task, or one it descends from, is inside of.
_held: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("held", default=())


class Turns:
    """Lets one task at a time use the connection, first come first served; the task that has it
    may come again."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._lock = asyncio.Lock()
        self.task: asyncio.Task[Any] | None = None
        self._token: object = None
        self._depth = 0

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if self._depth == 0 or self.task is not task:
            if self._depth and self._token in _held.get():
                # A child of the task that has the turn, which may be waiting for this child:
                # queueing would deadlock.
                raise SessionInUseError(
                    f"task {task_name()!r} uses the session of {self._alias!r} inside a call that "
                    "task "
                    f"{self.task and self.task.get_name()!r} still has running; use a session of "
                    "its own"
                )
            await self._lock.acquire()
            self.task, self._token = task, object()
        self._depth += 1

    async def __aexit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.task = self._token = None
            self._lock.release()

    @property
    def is_nested(self) -> bool:
        """Whether the task that has the turn has come again."""
        return self._depth > 1

    def held(self) -> contextvars.Token[tuple[object, ...]]:
        """Mark the current context as inside this turn."""
        return _held.set((*_held.get(), self._token))


def check_loop(loop: asyncio.AbstractEventLoop | None, alias: str) -> None:
    """Refuse to use what belongs to `loop` anywhere else.

    Raises:
        WrongLoopError: another event loop runs here, or none, as in a thread.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is not None and running is not loop:
        raise WrongLoopError(
            f"the session of {alias!r} belongs to {loop!r} and is used in {running!r}; "
            "make a session in the loop that uses it"
        )
