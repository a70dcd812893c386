"""PostgreSQL: options, engines, handles, and what Django finds in a session and after it.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import (
    InterfaceError,
    connection,
    connections,
)
from django.db.backends.signals import connection_created
from django.db.utils import load_backend

from django_asyncsession import DatabaseInterface, bridge, databases
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.exceptions import SessionClosedError
from tests.backends.postgresql.pools import interface
from tests.faults import (
    FaultProxy,
    LoopProbe,
    address,
)
from tests.postgres import dsn_of_tests, gone

# Options of DATABASES


def entry(**changes: Any) -> dict[str, Any]:
    """A complete entry of DATABASES for the test database, changed."""
    made = dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    made["OPTIONS"] = {**made["OPTIONS"], **changes.pop("OPTIONS", {})}
    return {**made, **changes}


async def test_djangos_options_hold_also_after_a_reset() -> None:
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    options = {
        "isolation_level": IsolationLevel.SERIALIZABLE,
        "assume_role": "pg_monitor",
        "server_side_binding": True,
        "options": "-c lock_timeout=1234",
        "pool": {"max_size": 1},
    }
    probes = ["transaction_isolation", "role", "lock_timeout", "TimeZone"]
    settings = entry(OPTIONS=options, TIME_ZONE="Asia/Tokyo")
    async with DatabaseInterface("own", settings) as db:
        for _ in range(2):
            async with db.get_session() as session:
                seen = [await session.fetch_value(f"SHOW {probe}") for probe in probes]
                assert seen[:3] == ["serializable", "pg_monitor", "1234ms"]
                assert seen[3] == "Asia/Tokyo"
                # The server binds: it has to be told the type of a bare parameter.
                assert await session.fetch_value("SELECT %s::int + 1", [1]) == 2
                factory = await session.run_sync(
                    lambda: connections["own"].connection.cursor_factory
                )
                assert "ServerBinding" in factory.__name__
                await session.execute("SET lock_timeout = 99")
        async with db.get_session(read_only=True) as session:
            assert await session.fetch_value("SHOW transaction_isolation") == "serializable"
        async with db.get_session(isolation="read committed") as session:
            assert await session.fetch_value("SHOW transaction_isolation") == "read committed"


# Engines


@pytest.mark.parametrize("engine", ["tests.thirdparty", "django_asyncsession.backends.postgresql"])
async def test_an_engine_of_ones_own_is_bridged(engine: str) -> None:
    db = DatabaseInterface("own", entry(ENGINE=engine))
    await db.connect()
    async with db.get_session() as session:
        wrapper: Any = await session.run_sync(lambda: connections["own"])
        assert isinstance(wrapper, BridgedMixin)
        assert isinstance(wrapper, load_backend(engine).DatabaseWrapper)
        if engine == "tests.thirdparty":
            assert wrapper.ops.third_party() == "third party"
            assert await session.fetch_value("SHOW third.party") == "was here"
        async with LoopProbe() as probe:
            await session.execute("SELECT pg_sleep(0.2)")
        assert probe.worst < 0.1
        await session.execute("SET third.party = 'gone'")
    if engine == "tests.thirdparty":
        async with db, db.get_session() as session:
            assert await session.fetch_value("SHOW third.party") == "was here"


async def test_what_a_receiver_of_connection_created_sets_every_session_has(
    db: DatabaseInterface,
) -> None:
    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own":
            with connection.cursor() as cursor:
                cursor.execute("SET statement_timeout = '77s'")

    connection_created.connect(receive)
    try:
        seen = []
        for statement in ("SELECT 1", "SET statement_timeout = '1s'", "SET ROLE pg_monitor"):
            async with db.get_session() as session:
                seen.append(await session.fetch_value("SHOW statement_timeout"))
                await session.execute(statement)
        assert seen == ["77s"] * 3 and db.stats()["connections_num"] == 1
    finally:
        connection_created.disconnect(receive)


def test_our_engine_works_in_sync_code() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql", TIME_ZONE=None), "own"
    )
    try:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1 + %s", [1])
            assert cursor.fetchone() == (2,)
        wrapper.set_autocommit(False)
        with wrapper.cursor() as cursor:
            cursor.execute("CREATE TABLE das_never (a int)")
        wrapper.rollback()
        wrapper.set_autocommit(True)
        assert "das_never" not in wrapper.introspection.table_names()
    finally:
        wrapper.close()


async def test_outside_a_session_djangos_guards_hold_as_ever() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql"), "own"
    )
    with pytest.raises(SynchronousOnlyOperation):
        wrapper.cursor()
    with pytest.raises(SynchronousOnlyOperation):
        connection.cursor()


async def test_our_engine_awaits_in_the_bridge_although_nobody_pooled_it() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql"), "own"
    )

    def use() -> None:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.8)")

    try:
        async with LoopProbe() as probe:
            # Receivers of connection_created ask for the connection of the alias.
            await bridge.run_with(wrapper, use)
        assert probe.worst < 0.6
    finally:
        await bridge.run(wrapper.close)


# Stale handles


async def test_a_handle_of_a_session_that_ended_sends_nothing(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        async with db.get_session() as session:
            cursor = await session.run_sync(lambda: connections["own"].cursor())
            await session.run_sync(cursor.execute, "SELECT generate_series(1, 10)")
            wrapper: Any = await session.run_sync(lambda: connections["own"])
            driver = wrapper.connection
        sent = proxy.received
        uses: list[Callable[[], Any]] = [
            lambda: cursor.execute("SELECT 1"),
            lambda: cursor.fetchone(),
            lambda: list(cursor),
            lambda: driver.execute("SELECT 1"),
            lambda: wrapper.connection.execute("SELECT 1"),
            driver.commit,
        ]
        async with db.get_session() as other:
            await other.execute("SELECT 1")
            sent = proxy.received
            for use in uses:
                with pytest.raises((SessionClosedError, InterfaceError, SynchronousOnlyOperation)):
                    use()
        assert proxy.received - sent < 300, "COMMIT with the reset, and nothing more"


async def test_a_handle_in_a_thread_is_refused(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        wrapper: Any = await session.run_sync(lambda: connections["own"])
        with pytest.raises(SessionClosedError, match="outside the session that leased it"):
            await asyncio.to_thread(wrapper.connection.execute, "SELECT 1")


# Context


async def test_django_finds_its_own_connections_again_after_a_session() -> None:
    before = {alias: connections[alias] for alias in connections}
    async with databases["default"].get_session() as session:
        inside = await session.run_sync(lambda: connections["default"])
        assert inside is not before["default"]
        assert {alias: connections[alias] for alias in connections} == before
        with pytest.raises(ZeroDivisionError):
            await session.run_sync(lambda: 1 / 0)
        assert {alias: connections[alias] for alias in connections} == before
    assert {alias: connections[alias] for alias in connections} == before
    await databases.close_all()


async def test_code_may_remove_the_connection_it_was_served(db: DatabaseInterface) -> None:
    async with db.get_session() as session:

        def remove() -> str:
            del connections["own"]
            return "removed"

        assert await session.run_sync(remove) == "removed"
        assert await session.fetch_value("SELECT 1") == 1


async def test_sessions_of_two_databases_nest(db: DatabaseInterface) -> None:
    async with databases["default"].get_session() as outer, db.get_session() as inner:

        def use_both() -> tuple[Any, ...]:
            first = bridge.await_(inner.fetch_value("SELECT 2"))
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT 1")
                return cursor.fetchone()[0], first

        assert await outer.run_sync(use_both) == (1, 2)
    await databases.close_all()


async def test_uvloop_works_as_well(name: str) -> None:
    uvloop = pytest.importorskip("uvloop")
    dsn = dsn_of_tests(application_name=name, pool_max_size=2)

    async def main() -> None:
        db = DatabaseInterface.from_dsn(dsn, alias="own")
        await asyncio.gather(*(db.ping() for _ in range(10)))
        for _ in range(5):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05), db.get_session() as session:
                    await session.execute("SELECT pg_sleep(10)")
        assert await gone(name, where="state = 'active'")
        await db.ping()

    def thread() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    await asyncio.to_thread(thread)
    assert await gone(name)
