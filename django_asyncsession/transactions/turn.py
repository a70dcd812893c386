"""The queue for one connection: one task at a time has the turn, first come first served."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from typing import Any

from django_asyncsession.exceptions import SessionInUseError
from django_asyncsession.origins import task_name

Task = asyncio.Task[Any]
Mark = contextvars.Token[tuple[object, ...]]

# The turns that the current task, or one it descends from, is inside of.
inside: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("inside", default=())


class Turn:
    """The right to use a connection. The task that has it may come again; a task that it started
    meanwhile is refused, because the one may be waiting for the other.

    Args:
        alias: what messages call the connection.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        # Who has it, how often it came, and what marks the context of what it runs.
        self.task: Task | None = None
        self.depth = 0
        self.mark: object = None
        self._waiters: deque[tuple[Task, asyncio.Future[None]]] = deque()

    def take(self, task: Task) -> bool:
        """Take it without waiting, if it is free or this task has it; tell whether that worked."""
        if self.depth == 0:
            self.task, self.depth, self.mark = task, 1, object()
            return True
        if self.task is task:
            self.depth += 1
            return True
        return False

    async def enter(self) -> None:
        """Take it, waiting if need be.

        Raises:
            As `wait`.
        """
        task = asyncio.current_task()
        assert task is not None
        if not self.take(task):
            await self.wait(task)

    async def wait(self, task: Task) -> None:
        """Wait for it, after all who wait already.

        Raises:
            SessionInUseError: the task was started by what has it.
        """
        if self.mark in inside.get():
            raise SessionInUseError(
                f"task {task_name()!r} uses the session of {self._alias!r} inside a call that task "
                f"{self.task and self.task.get_name()!r} still has running; use a session of its "
                "own"
            )
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((task, waiter))
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                # Cancelled in the very tick in which it was handed over: it goes to the next.
                self.leave()
            else:
                self._waiters.remove((task, waiter))
            raise

    def leave(self) -> None:
        """Leave it as often as it was taken; then the next who waits has it at once, so that nobody
        comes in between."""
        self.depth -= 1
        if self.depth:
            return
        self.task = self.mark = None
        while self._waiters:
            task, waiter = self._waiters.popleft()
            if not waiter.done():
                self.task, self.depth, self.mark = task, 1, object()
                waiter.set_result(None)
                return
