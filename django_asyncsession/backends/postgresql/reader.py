"""One reader of the event loop for a connection's life in it: what psycopg's generators and the
statements of the wire wait on."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import Any, ClassVar, Protocol, Self, TypeVar

import psycopg
from django.db.utils import InterfaceError
from psycopg import pq, waiting
from psycopg._capabilities import capabilities
from psycopg.abc import PQGen
from psycopg.pq.abc import PGconn, PGresult

from django_asyncsession.backends.sockets import look

RV = TypeVar("RV")

# Times that the reader reads, between two statements, what nobody asked for; then the rest waits in
# the socket, where it holds the server up.
IDLE_READS = 8
# Seconds that a socket may be ready at each step before others get a turn.
BUSY_SECONDS = 0.005
# Plain numbers, which is what libpq gives.
SYNC, FATAL = int(pq.ExecStatus.PIPELINE_SYNC), int(pq.ExecStatus.FATAL_ERROR)
COPIES = frozenset(
    map(int, (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH))
)
# No result of the same statement, or pipeline, comes after them.
LAST = COPIES | {SYNC}
SQLSTATE = pq.DiagnosticField.SQLSTATE
ACTIVE = pq.TransactionStatus.ACTIVE
READY_R, READY_W = int(waiting.READY_R), int(waiting.READY_W)
WAIT_R, WAIT_W = int(waiting.WAIT_R), int(waiting.WAIT_W)
PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)


class Host(Protocol):
    """The connection that a reader belongs to: what it is told of, and asked."""

    pgconn: PGconn
    # The answer to a reset was not read yet.
    resetting: bool

    @property
    def closed(self) -> bool: ...
    @property
    def adapters(self) -> Any: ...
    @property
    def owner(self) -> Any: ...
    @property
    def is_left(self) -> bool: ...
    @property
    def may_reset_behind(self) -> bool: ...

    def cursor(self) -> Any: ...
    def abandon(self) -> None: ...
    def cut(self) -> None: ...
    def note_wait(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def note_end_of_wait(self) -> None: ...
    def note_status(self) -> None: ...
    def note_touched(self) -> None: ...
    def note_end(self, command: bytes) -> None: ...
    def reset_sql(self) -> bytes: ...
    def note_reset(self, results: list[Any]) -> bool: ...


class Reader:
    """Tells what waits for the server when it has answered, in one event loop.

    It holds a copy of the socket's descriptor: libpq closes its own whenever it finds the
    connection lost, and the number may then be that of anybody's file.

    Made by `attached`.

    Attributes:
        loop: the only one in which it works.
        is_dead: the server has closed the connection, seen without a query.
        said: something came between two statements: a notice, a notification, the server's end.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_drives",
        "_fd",
        "_fut",
        "_idle_reads",
        "_is_pipelined",
        "_notes",
        "_pgconn",
        "_pid",
        "_reads",
        "_results",
        "_wants",
        "_writes",
        "is_dead",
        "loop",
        "said",
    )

    # When a connection had to wait last, in seconds of the monotonic clock.
    yielded: ClassVar[float] = 0.0

    def __init__(self, connection: Host, loop: asyncio.AbstractEventLoop) -> None:
        # The loop keeps the reader, which must not keep the connection.
        self._connection = weakref.ref(connection)
        self._pgconn: PGconn = connection.pgconn
        self.loop = loop
        self._fd = os.dup(connection.pgconn.socket)
        self._pid = os.getpid()
        # What the statement under way, or the step of psycopg's generator, waits for.
        self._fut: asyncio.Future[Any] | None = None
        self._drives, self._wants = False, 0
        self._results: list[PGresult] = []
        self._is_pipelined = False
        self._notes: list[pq.PGnotify] = []
        self._reads = self._writes = False
        self._idle_reads = 0
        self.is_dead = self.said = False
        self.resume()

    @classmethod
    def attached(cls, connection: Host) -> Self | None:
        """A reader of the connection in the running loop; None where that has none, as Windows'
        default, or libpq no pipeline mode.

        Raises:
            RuntimeError: no loop runs.
        """
        loop = asyncio.get_running_loop()
        if not capabilities.has_pipeline():
            return None
        try:
            return cls(connection, loop)
        except (NotImplementedError, OSError):
            return None

    # The generators of psycopg's

    async def drive(
        self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None
    ) -> RV:
        """Run a generator of psycopg's on this reader, which its own way would take off.

        Args:
            gen: what yields when it has to wait.
            interval: seconds after which it is asked again, where there is a timeout.
            timeout: seconds that it may take.

        Raises:
            psycopg.Error: a timeout, or that the connection was closed by another task.
            Whatever the generator raises.
        """
        if self._fut is not None:
            self._get_ready()
        connection = self._connection()
        assert connection is not None
        deadline = None if timeout is None else monotonic() + timeout
        connection.note_wait(self.loop)
        waited = False
        try:
            state = int(next(gen))
            waited = True
            while True:
                ready = await self._until(state, interval, deadline)
                if connection.is_left:
                    raise psycopg.OperationalError("the connection was closed in another task")
                state = int(gen.send(ready))
                if deadline is not None and monotonic() >= deadline:
                    raise psycopg.errors._WaitTimeout("wait timeout expired")
        except StopIteration as end:
            # COPY may never have to wait.
            if not waited and monotonic() - Reader.yielded >= BUSY_SECONDS:
                await self._yield()
            return end.value  # type: ignore[no-any-return]
        except OSError as exc:
            raise psycopg.OperationalError("connection socket closed") from exc
        finally:
            # Here too when it is collected, in whichever thread.
            self._fut, self._drives, self.said = None, False, False
            connection.note_end_of_wait()

    async def _until(self, state: int, interval: float, deadline: float | None) -> int:
        """Wait until the socket is ready for what a generator wants of it."""
        if self._fut is not None or not self._reads:
            self._get_ready()
        if state & WAIT_R and self.said:
            # It was read already.
            self.said = False
            return READY_R
        if state & WAIT_W:
            if monotonic() - Reader.yielded >= BUSY_SECONDS:
                await self._yield()
            # Nearly always it is ready for that.
            if ready := int(waiting._ready(self._pgconn.socket, waiting.Wait(state))):
                return ready
            self._write()
        self._drives, self._wants = True, state
        self._fut = fut = self.loop.create_future()
        timer = None
        if deadline is not None:
            left = min(interval, max(0.0, deadline - monotonic()))
            timer = self.loop.call_later(left, _wake, fut, context=Context())
        try:
            return await fut  # type: ignore[no-any-return]
        finally:
            self._fut, Reader.yielded = None, monotonic()
            if timer is not None:
                timer.cancel()

    async def _yield(self) -> None:
        """Give others a turn."""
        await asyncio.sleep(0)
        Reader.yielded = monotonic()

    def _get_ready(self) -> None:
        """Make sure that a statement can be sent now.

        Raises:
            InterfaceError: one is under way, or the connection belongs to another loop.
        """
        if self._fut is not None:
            raise InterfaceError("a statement is under way on this connection; await it first")
        if asyncio._get_running_loop() is not self.loop:
            raise InterfaceError("the connection belongs to another event loop")
        if self._fd >= 0:
            self.resume()

    # The reader

    @property
    def waits(self) -> bool:
        """Whether a statement is under way."""
        return self._fut is not None

    def resume(self) -> None:
        """Put the reader on, in the loop."""
        if not self._reads:
            # Not the context of the request that happens to be first.
            Context().run(self.loop.add_reader, self._fd, self._readable)
            self._reads, self._idle_reads = True, 0

    def pause(self) -> None:
        """Take the reader off, in the loop, as long as something else uses the socket; the next
        statement puts it on again."""
        if self._reads:
            self._reads = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)

    def _readable(self) -> None:
        fut = self._fut
        if fut is None:
            self._hear()
        elif self._drives:
            if not self._wants & WAIT_R:
                # It only wants to write, and would be asked again and again.
                self.pause()
            elif not fut.done():
                self._notify(fut)
        else:
            try:
                self._pgconn.consume_input()
                self._collect(fut)
                while self._fut is fut and look(self._fd)[1]:
                    # All that will ever come is there, and uvloop tells of an error once.
                    self._pgconn.consume_input()
                    self._collect(fut)
            except Exception as exc:
                self._lose(fut, exc)

    def _notify(self, fut: asyncio.Future[Any]) -> None:
        """Let psycopg's generator read, if there is anything to be read: the loop may have found it
        ready for the last statement, whose generator has read it since."""
        came, ended = look(self._fd)
        if ended:
            # uvloop tells of an error once; the next step puts it on again.
            self.pause()
        if came:
            fut.set_result(READY_R)

    def _collect(self, fut: asyncio.Future[Any]) -> None:
        """Take the results that are there; when they are all, let the statement go on."""
        if not self._take():
            return
        pgconn = self._pgconn
        while (note := pgconn.notifies()) is not None:
            self._notes.append(note)
        # Whoever asked for it may keep it; an idle connection does not.
        self._fut, results, self._results = None, self._results, []
        if not fut.done():
            fut.set_result(results)

    def _take(self) -> bool:
        """Take the results that are there; whether they are all."""
        pgconn, results, was_none = self._pgconn, self._results, False
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                if not self._is_pipelined:
                    return True
                if was_none:
                    return False
                was_none = True
                continue
            was_none = False
            if (status := result.status) in LAST:
                if status == SYNC:
                    pgconn.exit_pipeline_mode()
                    self._is_pipelined = False
                else:
                    results.append(result)
                return True
            results.append(result)
        return False

    def _lose(self, fut: asyncio.Future[Any], error: Exception) -> None:
        """Let the statement go on with an error, or with that of the server if it has said why."""
        self._fut, self.is_dead = None, True
        self.pause()
        # It may have said so before the statement came, which is read already.
        with suppress(psycopg.Error):
            self._take()
        if fut.done():
            return
        # Once it is lost, libpq makes results of its own, which have no code.
        failed = [result for result in self._results if result.status == FATAL]
        if any(result.error_field(SQLSTATE) for result in failed):
            fut.set_result(self._results)
        else:
            fut.set_exception(error)

    def _hear(self) -> None:
        """Note what comes between two statements, without losing what a statement would be told of
        it."""
        came, ended = look(self._fd)
        if not came:
            return
        if ended and not self._peek():
            # Not read by libpq, which would forget what the server said before.
            self.is_dead = self.said = True
            self.pause()
            return
        connection = self._connection()
        if connection is None or not connection.resetting:
            self.said = True
            busy = self._pgconn.transaction_status == ACTIVE
            if connection is None or busy or self._idle_reads >= IDLE_READS:
                # Rows that nobody fetches yet, or too much: it waits in the socket.
                self.pause()
                return
        self._idle_reads += 1
        try:
            self._pgconn.consume_input()
        except psycopg.Error:
            ended = True
        if ended:
            self.is_dead = self.said = True
            self.pause()

    def _peek(self) -> bytes:
        """What the socket begins with: nothing at its end."""
        # Lent: an object that nobody closes would be told of at the end of the program.
        lent = socket.socket(fileno=self._fd)
        try:
            return lent.recv(1, PEEK)
        except OSError:
            return b""
        finally:
            lent.detach()

    # The writer

    def _write(self) -> None:
        """Send the rest when the socket has room for it, while answers are read: a server that
        cannot write does not read either."""
        if not self._writes:
            self._writes = True
            Context().run(self.loop.add_writer, self._fd, self._writable)

    def _writable(self) -> None:
        fut = self._fut
        if fut is None or self._drives:
            self._stop_writing()
            if fut is not None and self._wants & WAIT_W and not fut.done():
                fut.set_result(READY_W)
            return
        try:
            if not self._pgconn.flush():
                self._stop_writing()
            # What had to be read so that it could be written is in no socket any more.
            self._collect(fut)
        except Exception as exc:
            self._stop_writing()
            self._lose(fut, exc)

    def _stop_writing(self) -> None:
        if self._writes:
            self._writes = False
            if not self.loop.is_closed():
                self.loop.remove_writer(self._fd)

    # The end

    def wake(self) -> None:
        """Let the statement under way end with an error, from whichever thread: its connection
        was closed by another task."""
        if (fut := self._fut) is not None:
            self._in_loop(_give_up, fut)

    def close(self) -> None:
        """Close the connection: in the loop's own thread, where nothing is read meanwhile."""
        if os.getpid() == self._pid and self._fd >= 0:
            self._in_loop(_close, weakref.ref(self), self._pgconn)
        else:
            self._pgconn.finish()

    def _in_loop(self, fn: Callable[..., None], *args: Any) -> None:
        elsewhere = self.loop.is_running() and asyncio._get_running_loop() is not self.loop
        if elsewhere and not self.loop.is_closed():
            with suppress(RuntimeError):  # closed meanwhile
                self.loop.call_soon_threadsafe(fn, *args, context=Context())
                return
        fn(*args)

    def _detach(self) -> None:
        self.pause()
        self._stop_writing()
        self._close_copy()

    def _close_copy(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # The loop that kept it is gone.
        if hasattr(self, "_fd") and not sys.is_finalizing():
            self._close_copy()


def _close(wire: weakref.ref[Reader], pgconn: PGconn) -> None:
    if (alive := wire()) is not None:
        alive._detach()
    pgconn.finish()


def _wake(fut: asyncio.Future[Any]) -> None:
    if not fut.done():
        fut.set_result(0)


def _give_up(fut: asyncio.Future[Any]) -> None:
    if not fut.done():
        fut.set_exception(psycopg.OperationalError("the connection was closed in another task"))
        # Whoever waited may be gone, and then nobody asks.
        fut.exception()
