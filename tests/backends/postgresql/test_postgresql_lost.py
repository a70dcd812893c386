"""PostgreSQL: servers that are lost, down, full or ask for another password.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from django.db import (
    Error,
    OperationalError,
)

from django_asyncsession import DatabaseInterface
from tests.backends.postgresql.pools import interface, pid_of
from tests.faults import (
    SERVER,
    Elapsed,
    FaultProxy,
    OwnServer,
    address,
    outcome_of,
)
from tests.postgres import ask, sessions_of

# Lost servers


def terminate(name: str) -> None:
    ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", name)


async def test_a_backend_terminated_in_a_query_is_one_error_and_the_next_works(
    db: DatabaseInterface, name: str
) -> None:
    async def query() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(60)")

    pid = await pid_of(db)
    task = asyncio.create_task(query())
    while not sessions_of(name, "state = 'active'"):
        await asyncio.sleep(0.01)
    terminate(name)
    with pytest.raises(OperationalError, match="terminating connection") as caught:
        await task
    assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)
    assert await pid_of(db) != pid
    assert db.stats()["returns_bad"] == 1


async def test_terminated_between_two_statements_nothing_is_written_behind_ones_back(
    db: DatabaseInterface, name: str, empty_tables: None
) -> None:
    insert = "INSERT INTO tests_user (name, level) VALUES ('x', 1)"
    with pytest.raises(Error):
        async with db.get_session() as session:
            await session.execute(insert)
            terminate(name)
            for _ in range(3):
                with pytest.raises(Error):
                    await session.execute(insert)
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]
    await db.ping()


async def test_idle_too_long_in_a_transaction_the_servers_reason_is_told(
    db: DatabaseInterface,
) -> None:
    with pytest.raises(Error, match="idle-in-transaction"):
        async with db.get_session(idle_timeout=0.1) as session:
            await session.execute("SELECT 1")
            await asyncio.sleep(0.3)
            await session.execute("SELECT 2")
    await db.ping()


async def test_with_check_nobody_notices_that_all_idle_connections_were_killed(name: str) -> None:
    async with interface(name, pool_max_size=5, pool_check="true") as db:
        for _ in range(3):
            leases = [await db.acquire() for _ in range(5)]
            for lease in leases:
                lease.release()
            terminate(name)
            await asyncio.gather(*(db.ping() for _ in range(50)))


async def test_without_check_connections_that_were_killed_cost_no_error(name: str) -> None:
    async with interface(name, pool_max_size=5) as db:
        leases = [await db.acquire() for _ in range(5)]
        for lease in leases:
            lease.release()
        terminate(name)
        while sessions_of(name):
            await asyncio.sleep(0.01)
        for _ in range(20):
            await db.ping()


async def test_a_reset_in_the_middle_of_a_result_is_an_error_and_no_short_result(
    name: str,
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        seen = 0

        def hook(who: str, data: bytes) -> str | None:
            nonlocal seen
            seen += len(data) if who == SERVER else 0
            return "reset" if seen > 200_000 else None

        async with db.get_session() as session:
            await session.execute("SELECT 1")
            proxy.hook = hook
            with pytest.raises(OperationalError):
                await session.fetch_all("SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
            proxy.hook = None
            await session.rollback()
        await db.ping()


async def test_a_server_that_was_down_is_found_again(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=3) as db,
    ):
        await db.ping()
        await proxy.refuse()
        proxy.reset()
        outcomes = [await outcome_of(db.ping()) for _ in range(5)]
        assert all(isinstance(outcome, OperationalError) for outcome in outcomes)
        attempts = db.stats()["connections_num"]
        assert attempts <= 6
        await proxy.accept()
        with Elapsed() as took:
            await asyncio.gather(*(outcome_of(db.ping()) for _ in range(10)))
            await db.ping()
        assert took.seconds < 3


async def test_too_many_connections_for_the_server_are_waited_for(own_server: OwnServer) -> None:
    with own_server.connect() as admin:
        admin.execute("ALTER ROLE guarded CONNECTION LIMIT 3")
        db = DatabaseInterface.from_dsn(
            own_server.dsn("guarded", OwnServer.PASSWORD) + "?pool_max_size=10&pool_timeout=10",
            alias="own",
        )

        async def work() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(0.02)")

        await db.connect()
        outcomes = await asyncio.gather(*(outcome_of(work()) for _ in range(60)))
        assert [outcome for outcome in outcomes if outcome is not None] == []
        assert db.stats()["pool_size"] <= 4
        await db.close()
        admin.execute("ALTER ROLE guarded CONNECTION LIMIT -1")


async def test_a_password_changed_while_the_pool_lives_is_told_and_a_function_is_asked_again(
    own_server: OwnServer,
) -> None:
    current = OwnServer.PASSWORD
    made = dict(DatabaseInterface.from_dsn(own_server.dsn("guarded"))._settings_dict)
    made["OPTIONS"] = {"password": lambda: current}
    db = DatabaseInterface("own", made)
    await db.ping()
    with own_server.connect() as admin:
        admin.execute("ALTER ROLE guarded PASSWORD 'rotated'")
        db.pool().discard_idle()
        with pytest.raises(OperationalError, match="authentication failed"):
            await db.ping()
        current = "rotated"
        await asyncio.sleep(0.15)
        await db.ping()
        admin.execute(f"ALTER ROLE guarded PASSWORD '{OwnServer.PASSWORD}'")
    await db.close()
