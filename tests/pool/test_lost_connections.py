"""On real pools: idle connections that the server, or the network, has closed; nobody notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError

from django_asyncsession import DatabaseInterface
from tests.faults import Elapsed, outcome_of, watchdog
from tests.sessions import behind, pool, soon, whole


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(60):
        yield


async def server_id(db: DatabaseInterface) -> Any:
    sql = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}
    async with db.get_session(autocommit=True) as session:
        return await session.fetch_value(sql[db.vendor])


async def fill(db: DatabaseInterface, size: int) -> None:
    """Open so many connections, all idle then."""
    leases = [await db.acquire() for _ in range(size)]
    for lease in leases:
        lease.release()


async def requests(db: DatabaseInterface, count: int = 20) -> list[Any]:
    """The outcomes of so many sessions at the same time."""

    async def one() -> Any:
        async with db.get_session() as session:
            return await session.fetch_value("SELECT 1")

    return list(await asyncio.gather(*(outcome_of(one()) for _ in range(count))))


async def test_after_all_idle_connections_were_ended_by_the_server_no_request_fails(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite has no server")
    kill = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}
    with pool(real_database, max_size=5):
        await real_database.connect()
    await fill(real_database, 5)
    leases = [await real_database.acquire() for _ in range(5)]
    ids = [_id(lease.connection) for lease in leases]
    for lease in leases:
        lease.release()
    other = DatabaseInterface(real_database.alias, real_database._settings_dict)
    async with other, other.get_session(autocommit=True) as admin:
        for number in ids:
            await admin.execute(kill[real_database.vendor], [number])
        async with asyncio.timeout(5):
            while await admin.fetch_value(_COUNT[real_database.vendor].format(*ids)):
                await asyncio.sleep(0.01)
    assert await requests(real_database) == [1] * 20
    await whole(real_database)


_COUNT = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE pid IN ({}, {}, {}, {}, {})",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE id IN ({}, {}, {}, {}, {})",
}


def _id(wrapper: Any) -> int:
    if wrapper.vendor == "postgresql":
        return int(wrapper.connection.info.backend_pid)
    return int(wrapper.connection.thread_id())


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_after_the_network_closed_all_idle_connections_no_request_fails(
    real_database: DatabaseInterface, how: str
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=5):
            await fill(far, 5)
        if how == "reset":
            proxy.reset()
        else:
            for writer in list(proxy._writers):
                writer.close()
        assert await requests(far) == [1] * 20
        await whole(far)
        assert far.stats()["connections_lost"] == 5


async def test_an_idle_connection_that_works_is_not_asked(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=1):
            await fill(far, 1)
        trips = proxy.round_trips
        await fill(far, 1)
        assert proxy.round_trips == trips


async def test_a_request_that_finds_the_server_restarted_is_the_only_one_that_fails(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=5):
            await fill(far, 5)
        session = await far.get_session().begin()
        await session.fetch_value("SELECT 1")
        await proxy.refuse()
        proxy.reset()
        await proxy.accept()
        with pytest.raises(OperationalError):
            await session.fetch_value("SELECT 1")
        await session.close()
        assert await requests(far) == [1] * 20


async def test_an_attempt_to_connect_that_is_never_answered_holds_up_nobody(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        proxy.deaf = True
        asked = [asyncio.create_task(server_id(far)) for _ in range(3)]
        assert await soon(lambda: proxy.accepted >= 3)
        proxy.deaf = False
        with Elapsed() as took:
            await asyncio.gather(*asked)
        assert took.seconds < 4
        await whole(far)


async def test_with_a_single_place_a_hung_attempt_makes_room_for_the_next(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=1):
            proxy.deaf = True
            asked = asyncio.create_task(server_id(far))
            assert await soon(lambda: proxy.accepted == 1)
        proxy.deaf = False
        with Elapsed() as took:
            await asked
        assert took.seconds < 4
        assert far.stats()["pool_size"] == 1
