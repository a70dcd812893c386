"""How statements and sessions that nobody waits for any more are ended on the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any

from asyncmy import errors
from asyncmy.constants.COMMAND import COM_QUIT

from .errors import is_last_word

logger = logging.getLogger("django_asyncsession")
# Seconds that asking the server to end something may take.
STOP_SECONDS = 5.0
# Seconds between two looks at whether the server has ended a killed connection.
LOOK_MIN, LOOK_MAX = 0.005, 0.1
# Writes of a pool that commit by themselves before a connection is opened that could end them, and
# seconds until the next attempt when the server had none left.
FEW_WRITES, REFUSED_SECONDS = 4, 5.0


class Killer:
    """Ends statements on the server over one connection, beside those of a pool however many
    statements there are.

    It is opened when needed. A pool with many writes that commit by themselves keeps it for as long
    as it has a connection.

    Args:
        make: makes asyncmy's connection, not connected yet.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._side: Any = None
        self._writes, self._refused_until = 0, 0.0
        # Ids on the server of those whose statements must end; those that are gone are taken out.
        self.sessions: set[int] = set()
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def is_ready(self) -> bool:
        """Whether the connection is there."""
        return self._side is not None and not self._side._stream_broken

    async def can_be_made_ready(self) -> bool:
        """Open the connection for one more write, if there are enough of them to be worth it;
        whether it is there."""
        self._writes += 1
        if self._writes <= FEW_WRITES or time.monotonic() < self._refused_until:
            return False
        try:
            async with asyncio.timeout(STOP_SECONDS), self._lock:
                await self._connected()
        except (errors.MySQLError, OSError, TimeoutError) as exc:
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            logger.info("no connection to end statements with: %s", exc)
            return False
        return True

    async def end_statement(self, number: int) -> None:
        """KILL QUERY for a session that is in use, and goes on."""
        async with self._lock:
            await self._query(f"KILL QUERY {number}")
            await self._leave_if_unused()

    async def end_sessions(self, number: int) -> None:
        """KILL QUERY for each session that runs something, until the server has dropped all."""
        async with self._lock:
            # Who was first has ended the others' sessions too.
            pause = LOOK_MIN
            while number in self.sessions:
                asked = set(self.sessions)
                running = _running(await self._query(_ASK.format(", ".join(map(str, asked)))))
                self.sessions -= asked - running.keys()
                for other in (other for other, runs in running.items() if runs):
                    # The session may have ended in between.
                    with contextlib.suppress(errors.OperationalError):
                        await self._query(f"KILL QUERY {other}")
                if self.sessions:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LOOK_MAX)
            await self._leave_if_unused()

    async def _query(self, sql: str) -> Any:
        side = await self._connected()
        try:
            await side.query(sql)
        except errors.MySQLError as exc:
            if is_last_word(exc):
                self.close()
            raise
        except BaseException:
            # Its answer is still to come.
            self.close()
            raise
        return side._result

    async def _connected(self) -> Any:
        if not self.is_ready:
            self.close()
            side = self._make()
            try:
                await side.connect()
            except BaseException:
                side.close()
                raise
            self._side = side
        return self._side

    @property
    def _is_unused(self) -> bool:
        return not self.sessions and (not self.users or self._writes <= FEW_WRITES)

    async def _leave_if_unused(self) -> None:
        """The same as `close_if_unused`, and wait until the server has room for another one."""
        if self._is_unused and self.is_ready:
            side = self._side
            say_goodbye(side._transport, waits=True)
            while not side._stream_broken:
                await asyncio.sleep(LOOK_MIN)
            self.close()

    def close_if_unused(self) -> None:
        """Close the connection when there is nothing left that it could be for."""
        if self._is_unused:
            self.close()

    def close(self) -> None:
        """Close the connection without awaiting; in any thread, since collecting may do it."""
        side, self._side = self._side, None
        if side is None or side._transport is None:
            return
        if asyncio._get_running_loop() is self._loop or not self._loop.is_running():
            say_goodbye(side._transport)
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(say_goodbye, side._transport)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


# By event loop, and by what tells servers and users apart.
_killers: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Killer]]
_killers = weakref.WeakKeyDictionary()


def killer_for(key: tuple[Any, ...], make: Callable[[], Any]) -> Killer:
    """The one of the running loop, for connections to the same server."""
    of_loop = _killers.setdefault(asyncio.get_running_loop(), weakref.WeakValueDictionary())
    killer = of_loop.get(key)
    if killer is None:
        killer = of_loop[key] = Killer(make)
    return killer


class Farewell:
    """Waits until the server has dropped the session of an abandoned connection; can be awaited
    again when it was cancelled."""

    def __init__(self, killer: Killer, thread_id: int) -> None:
        self._killer, self._thread_id = killer, thread_id
        killer.sessions.add(thread_id)

    @property
    def is_untold(self) -> bool:
        """Whether the server may still run the session's statement."""
        return self._thread_id in self._killer.sessions

    def __await__(self) -> Generator[Any, Any, None]:
        return self._killer.end_sessions(self._thread_id).__await__()

    def __del__(self) -> None:
        self._killer.sessions.discard(self._thread_id)
        self._killer.close_if_unused()


_ASK = "SELECT id, command <> 'Sleep' FROM information_schema.processlist WHERE id IN ({})"


def _running(result: Any) -> dict[int, bool]:
    """Those sessions that are there, and whether each runs a statement."""
    return {int(number): bool(runs) for number, runs in result.rows}


def say_goodbye(transport: Any, is_dirty: bool = False, waits: bool = False) -> None:
    """Close a connection without awaiting: in order, or at once.

    Args:
        is_dirty: it was left in the middle of a round trip.
        waits: somebody waits for the server to close it.
    """
    try:
        if is_dirty or transport.is_closing():
            transport.abort()
        else:
            transport.write(struct.pack("<iB", 1, COM_QUIT))
            if not waits:
                transport.close()
    except RuntimeError:
        # The loop is closed. The server shall know all the same.
        _shut_down(transport)


def _shut_down(transport: Any) -> None:
    raw = transport.get_extra_info("socket")
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)
    if getattr(transport, "_sock", None) is not None:
        # asyncio's transport closes its socket in its loop only, and would warn that it is open.
        transport._sock.close()
        transport._sock = None
