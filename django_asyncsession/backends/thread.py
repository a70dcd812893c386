"""The thread of one connection of a driver that cannot await."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from django_asyncsession.bridge import await_


class DriverThread:
    """One thread that runs the calls it is sent, one after the other, until `end`."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        # Held for the length of an assignment or of `interrupt`, never while waiting.
        self._switching = threading.Lock()
        self._running: object = None
        self._timed_out = False
        self._leftovers: list[Callable[[], Any]] = []
        # What a call that waits for something itself has to look at.
        self.stop = threading.Event()
        self.ended = False

    def call(
        self, fn: Callable[[], Any], interrupt: Callable[[], None], timeout: float | None
    ) -> Any:
        """Run `fn` in the thread and await its end; `interrupt` it after `timeout` seconds.

        Raises:
            Whatever `fn` raises, with the attribute `timed_out` if it was interrupted.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        self._start()
        # In the caller's context: what traces a driver finds its parent there.
        call = partial(contextvars.copy_context().run, fn)
        self._jobs.put(partial(self._perform, call, future, loop))
        timer = timeout and loop.call_later(timeout, self._time_out, future, interrupt)
        try:
            result, error = await_(future)
        finally:
            if timer:
                timer.cancel()
        timed_out, self._timed_out = self._timed_out, False
        if timed_out and not self.ended:
            self.stop.clear()
        if error is None:
            return result
        try:
            error.timed_out = timed_out  # type: ignore[attr-defined]
            raise error
        finally:
            # The error's traceback refers to this frame.
            del error

    def post(self, fn: Callable[[], Any]) -> None:
        """Run `fn` in the thread some time, for nobody's sake."""
        if self._thread.ident is not None and not self.ended:
            self._jobs.put(partial(_quietly, fn))

    def finish(self, seconds: float) -> None:
        """Wait, blocking, for the end of the calls sent so far, but not for longer than this."""
        done = threading.Event()
        self.post(done.set)
        if self.alive and not self.ended:
            done.wait(seconds)

    def later(self, fn: Callable[[], Any]) -> None:
        """Run `fn` in the thread before the next call."""
        self._leftovers.append(fn)

    def end(self, last: Callable[[], Any]) -> None:
        """Run `last` after what still runs, then end the thread. Does not wait."""
        if self.ended:
            return
        self.ended = True
        self.stop.set()
        if self._thread.ident is None:
            _quietly(last)
        else:
            self._jobs.put(partial(_quietly, last))
            self._jobs.put(None)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def interrupt(self, how: Callable[[], None]) -> None:
        """Call `how` if a call is being run, and never when it has ended already."""
        with self._switching:
            if self._running is not None:
                how()

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _time_out(self, future: object, how: Callable[[], None]) -> None:
        with self._switching:
            if self._running is future:
                self._timed_out = True
                self.stop.set()
                how()

    def _perform(
        self,
        fn: Callable[[], Any],
        future: asyncio.Future[tuple[Any, BaseException | None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        while self._leftovers:
            _quietly(self._leftovers.pop(0))
        outcome: tuple[Any, BaseException | None]
        with self._switching:
            self._running = future
        try:
            outcome = fn(), None
        except BaseException as error:
            outcome = None, error
        with self._switching:
            self._running = None
        # RuntimeError: the loop is closed, and nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, future, outcome)
        # The error's traceback refers to this frame.
        del outcome


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    """What the thread does. It refers to the queue only, so a connection that is dropped can end
    it."""
    while (job := jobs.get()) is not None:
        job()
        # While it waits for the next, it keeps nothing of the last.
        del job


def _deliver(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        future.set_result(outcome)


def _quietly(fn: Callable[[], Any]) -> None:
    """Call `fn` where nobody is left to be told of an error."""
    with contextlib.suppress(Exception):
        fn()
