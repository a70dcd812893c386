"""Tools that replace a driver's `connect` and put cursors, or proxies, of their own in its place.

On real connections of the pools: statements are run, each is seen once, and nothing blocks the
loop; what cannot work is refused by name, before anything is lost.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import socket
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import connections

from django_asyncsession import DatabaseInterface
from django_asyncsession.exceptions import ConfigurationError
from tests.faults import LoopProbe
from tests.models import User
from tests.postgres import gone, new_name, sessions_of
from tests.sessions import INSERT, names, pool

only_postgresql = pytest.mark.parametrize("alias", ["default"], ids=["postgresql"], indirect=True)
only_sqlite = pytest.mark.parametrize("alias", ["sqlite"], indirect=True)


@asynccontextmanager
async def own(alias: str, **changes: Any) -> AsyncIterator[DatabaseInterface]:
    """An interface of the test's own, with a pool of its own, for an alias's database."""
    settings = copy.deepcopy(dict(connections[alias].settings_dict))
    settings["OPTIONS"] = {**settings["OPTIONS"], **changes.pop("OPTIONS", {})}
    db = DatabaseInterface("own", {**settings, **changes})
    try:
        yield db
    finally:
        await db.close()


# PostgreSQL


class Tool:
    """What tracers of psycopg do: `connect` of both kinds of connection is replaced, and gives what
    it opens a cursor factory that notes the statements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.connected: list[dict[str, Any]] = []
        self._replace = monkeypatch.setattr
        seen = self.seen

        class Traced(psycopg.Cursor[Any]):
            def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(query if isinstance(query, str) else repr(query))
                return super().execute(query, *args, **kwargs)

        class AsyncTraced(psycopg.AsyncCursor[Any]):
            async def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(str(query))
                return await super().execute(query, *args, **kwargs)

        self.sync_cursor, self.async_cursor = Traced, AsyncTraced

    def install(self, cursor: type | None = None) -> None:
        """Replace both."""
        plain: Any = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]
        plain_async: Any = psycopg.AsyncConnection.connect.__func__  # type: ignore[attr-defined]

        def connect(cls: Any, *args: Any, **kwargs: Any) -> Any:
            connection = plain(cls, *args, **kwargs)
            self.connected.append(kwargs)
            connection.cursor_factory = cursor or self.sync_cursor
            return connection

        async def connect_async(cls: Any, *args: Any, **kwargs: Any) -> Any:
            connection = await plain_async(cls, *args, **kwargs)
            connection.cursor_factory = self.async_cursor
            return connection

        self._replace(psycopg.Connection, "connect", classmethod(connect))
        self._replace(psycopg.AsyncConnection, "connect", classmethod(connect_async))


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A tracer, not installed yet."""
    return Tool(monkeypatch)


@only_postgresql
async def test_a_traced_connection_runs_each_statement_once_and_saves_it(
    alias: str, tool: Tool, empty_database: None
) -> None:
    tool.install()

    async def one(number: int) -> int:
        async with db.get_session() as session:
            assert await session.execute(INSERT, (f"traced {number}",)) == 1
            return int(await session.fetch_value(f"SELECT {number}"))

    async with own(alias) as db:
        assert await asyncio.gather(*map(one, range(20))) == list(range(20))
        async with db.get_session() as session:
            assert await session.run_sync(lambda: User.objects.using("own").count()) == 20
            await session.gather(*[lambda s: s.fetch_value("SELECT 'gathered'")] * 2)
    counts = Counter(tool.seen)
    assert [counts[f"SELECT {number}"] for number in range(20)] == [1] * 20
    assert counts[INSERT] == 20 and counts["SELECT 'gathered'"] == 2
    assert {"dbname", "password"} & tool.connected[0].keys(), "the tool saw what is connected to"
    assert len(await names(own_names(alias))) == 20


def own_names(alias: str) -> DatabaseInterface:
    from django_asyncsession import databases

    return databases[alias]


@only_postgresql
async def test_the_tool_has_the_connection_in_every_session(alias: str, tool: Tool) -> None:
    """Also after a reset, which brings its cursor factory back if code has changed it."""
    tool.install()

    def change() -> None:
        connections["own"].connection.cursor_factory = psycopg.Cursor  # type: ignore[attr-defined]

    async with own(alias) as db:
        for number in range(3):
            async with db.get_session() as session:
                await session.fetch_value(f"SELECT {number}")
                await session.run_sync(change)
                await session.execute("SET lock_timeout = 99")
    assert [s for s in tool.seen if s[-1] in "012"] == ["SELECT 0", "SELECT 1", "SELECT 2"]


@only_postgresql
async def test_cursors_of_the_async_kind_are_refused_by_name(alias: str, tool: Tool) -> None:
    """They run nothing: each statement would be a coroutine that nobody awaits."""
    name = new_name()
    tool.install(tool.async_cursor)
    async with own(alias, OPTIONS={"application_name": name}) as db:
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"'own' are .*AsyncTraced, .* async kind"):
                await db.connect()
        assert time.monotonic() - started < 20, "nobody waits for what would only fail again"
        assert await gone(name), "what was opened is closed"


@only_postgresql
@pytest.mark.parametrize("kind", ["AsyncCursor", "AsyncClientCursor", "AsyncRawCursor"])
async def test_an_option_of_the_async_kind_is_refused_by_name(alias: str, kind: str) -> None:
    async with own(alias, OPTIONS={"cursor_factory": getattr(psycopg, kind)}) as db:
        with pytest.raises(ConfigurationError, match=f"psycopg.{kind}.*subclass of psycopg.Cursor"):
            await db.connect()


@only_postgresql
async def test_a_connection_that_would_block_is_refused_by_name(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = new_name()
    plain = psycopg.Connection.connect
    monkeypatch.setattr(psycopg.Connection, "connect", staticmethod(partial(plain)))
    async with own(alias, OPTIONS={"application_name": name}) as db:
        with pytest.raises(ConfigurationError, match="blocks the event loop"):
            await db.connect()
        assert sessions_of(name) == 0


class Proxy:
    """As wrapt's: it looks like what it stands for, and wraps the cursors that come out of it."""

    def __init__(self, wrapped: Any, seen: list[str]) -> None:
        object.__setattr__(self, "_self", (wrapped, seen))

    @property
    def __class__(self) -> Any:
        return type(self._self[0])

    @property
    def __dict__(self) -> Any:
        return vars(self._self[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._self[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._self[0], name, value)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._self[0].__exit__(*exc_info)

    def __iter__(self) -> Any:
        return iter(self._self[0])

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return Proxy(self._self[0].cursor(*args, **kwargs), self._self[1])

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        self._self[1].append(str(query))
        return self._self[0].execute(query, *args, **kwargs)


def proxying(monkeypatch: pytest.MonkeyPatch, vendor: str) -> list[str]:
    """Let the driver's `connect` give proxies, and return what they see."""
    seen: list[str] = []
    if vendor == "postgresql":
        plain: Any = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]
        replaced = classmethod(lambda cls, *args, **kw: Proxy(plain(cls, *args, **kw), seen))
        monkeypatch.setattr(psycopg.Connection, "connect", replaced)
    else:
        connect = sqlite3.dbapi2.connect
        proxied = lambda *args, **kw: Proxy(connect(*args, **kw), seen)  # noqa: E731
        monkeypatch.setattr(sqlite3.dbapi2, "connect", proxied)
    return seen


@pytest.mark.parametrize("alias", ["default", "sqlite"], indirect=True)
async def test_a_proxied_connection_works_and_each_statement_is_seen_once(
    alias: str, monkeypatch: pytest.MonkeyPatch, empty_database: None
) -> None:
    seen = proxying(monkeypatch, connections[alias].vendor)

    def rows() -> list[Any]:
        with connections["own"].cursor() as cursor:
            # Not in DB-API, but what many rely on.
            return list(cursor.execute("SELECT 1 UNION SELECT 2 ORDER BY 1").fetchall())

    async with own(alias) as db:
        async with db.get_session() as session:
            assert await session.execute(INSERT, ("proxied",)) == 1
            await session.run_sync(lambda: User.objects.using("own").create(name="orm"))
            assert await session.run_sync(rows) == [(1,), (2,)]
        with pytest.raises(LookupError):
            async with db.get_session() as session:
                await session.execute(INSERT, ("rolled back",))
                raise LookupError
        async with db.get_session() as session:
            assert [r[0] async for r in session.stream("SELECT name FROM tests_user")] == [
                "proxied",
                "orm",
            ]
    sql = INSERT if alias == "default" else INSERT.replace("%s", "?")
    assert len([query for query in seen if query in (sql, INSERT)]) == 2


@pytest.mark.parametrize("alias", ["default", "sqlite"], indirect=True)
async def test_a_tool_sees_the_context_of_who_runs_the_statement(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it finds the parent of its span; also in the thread of a connection to SQLite."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[tuple[str, str]] = []
    plain = Proxy.execute

    def execute(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((request.get(), str(query)))
        return plain(self, query, *args, **kwargs)

    monkeypatch.setattr(Proxy, "execute", execute)
    proxying(monkeypatch, connections[alias].vendor)

    async def one(number: int) -> None:
        request.set(f"request {number}")
        async with db.get_session() as session:
            await session.execute(f"SELECT '{number}'")

    async with own(alias) as db:
        await asyncio.gather(*(asyncio.create_task(one(number)) for number in range(20)))
    for number in range(20):
        assert (f"request {number}", f"SELECT '{number}'") in seen


async def test_a_tool_on_the_sync_driver_of_mysql_sees_sync_code_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sessions have asyncmy. PyMySQL, where it stands in for mysqlclient, is asked for at each
    connect: a tool may replace it at any time."""
    import pymysql

    connected: list[str] = []
    plain = pymysql.connect

    def connect(*args: Any, **kwargs: Any) -> Any:
        connected.append(threading.current_thread().name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(pymysql, "connect", connect)
    async with own("mysql") as db, db.get_session() as session:
        assert await session.fetch_value("SELECT 1") == 1
    assert connected == []

    def sync() -> Any:
        wrapper: Any = connections["mysql"].copy()
        try:
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT 1")
                return cursor.fetchone()
        finally:
            wrapper.close()

    assert await asyncio.to_thread(sync) == (1,)
    assert len(connected) == 1


# Connecting itself


@only_postgresql
async def test_names_of_hosts_are_looked_up_without_blocking_the_loop(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []
    plain = socket.getaddrinfo
    loops_thread = threading.get_ident()

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((host, threading.get_ident() == loops_thread))
        if host == "slow.test":
            time.sleep(0.3)
            host = "127.0.0.1"
        return plain(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with (
        own(alias, HOST="slow.test") as db,
        LoopProbe() as probe,
        db.get_session() as session,
    ):
        assert await session.fetch_value("SELECT 1") == 1
        info = await session.run_sync(lambda: connections["own"].connection.info)  # type: ignore[attr-defined]
        assert info.host == "slow.test" and info.hostaddr == "127.0.0.1"
    assert asked == [("slow.test", False)] and probe.worst < 0.2


@asynccontextmanager
async def silent_port() -> AsyncIterator[int]:
    """A port that takes connections and never says anything."""

    async def say_nothing(reader: Any, writer: Any) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@only_postgresql
async def test_each_of_several_hosts_gets_the_time_to_connect(alias: str) -> None:
    """One that does not answer is left after `connect_timeout`, one without an address at once."""
    port = connections[alias].settings_dict["PORT"] or 5432
    async with silent_port() as silent:
        hosts = {
            "HOST": "nowhere.invalid,localhost,127.0.0.1",
            "PORT": f"1,{silent},{port}",
            "OPTIONS": {"connect_timeout": 2},
        }
        async with own(alias, **hosts) as db, LoopProbe() as probe:
            started = time.monotonic()
            async with db.get_session() as session:
                assert await session.fetch_value("SELECT 1") == 1
            assert time.monotonic() - started > 1.9
    assert probe.worst < 0.5


@only_postgresql
@pytest.mark.parametrize("fails", ["password", "host", "option"])
async def test_what_fails_while_connecting_shows_no_password(
    alias: str, tool: Tool, fails: str
) -> None:
    tool.install(tool.async_cursor if fails == "option" else None)
    secret = "tr0ub4dor&3"
    changes: dict[str, dict[str, Any]] = {
        "password": {"USER": "nobody_of_this_name"},
        "host": {"HOST": "nowhere.invalid"},
        "option": {},
    }
    async with own(alias, PASSWORD=secret, **changes[fails]) as db:
        with pytest.raises(Exception) as raised:
            await db.connect()
    shown: list[str] = []
    error: BaseException | None = raised.value
    while error is not None:
        shown.append(str(error))
        traceback = error.__traceback__
        while traceback is not None:
            if "/tests/" not in traceback.tb_frame.f_code.co_filename:
                shown += map(repr, traceback.tb_frame.f_locals.values())
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__
    assert secret not in "".join(shown)


@only_postgresql
async def test_a_cancelled_attempt_to_connect_leaves_nothing(alias: str) -> None:
    async with silent_port() as silent, own(alias, HOST="127.0.0.1", PORT=silent) as db:
        with pool(db, timeout=30):
            waiting = asyncio.create_task(db.connect())
            while not db.pools or not db.pool()._openers:
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await db.close()
        assert not db.pools
