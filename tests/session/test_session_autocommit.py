"""Session in autocommit mode: each statement is saved at once. On real connections of the pools."""

from __future__ import annotations

import asyncio

import pytest
from django.db import DatabaseError

from django_asyncsession import DatabaseInterface, SessionStateError
from tests.faults import LoopProbe, longest_stall
from tests.sessions import INSERT, names, pool, slow, whole


async def test_in_autocommit_mode_each_statement_is_saved_at_once(
    real_database: DatabaseInterface,
) -> None:
    session = await real_database.get_session(autocommit=True).begin()
    await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]
    with pytest.raises(DatabaseError):
        await session.execute("SELECT * FROM no_such_table")
    await session.execute(INSERT, ["b"])
    assert not session.in_transaction
    for call in (session.commit, session.rollback):
        with pytest.raises(
            SessionStateError, match="in autocommit mode: every statement is committed already"
        ):
            await call()
    for at_once in (session.begin_nested, session.get_rollback, lambda: session.on_rollback(print)):
        with pytest.raises(
            SessionStateError, match="needs a transaction, and this session is in autocommit mode"
        ):
            at_once()
    await session.close()
    assert await names(real_database) == ["a", "b"]
    await whole(real_database)


async def test_in_autocommit_mode_gather_is_parallel_on_connections_of_their_own(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session(autocommit=True) as session:
        await asyncio.gather(*(session.fetch_value("SELECT 1") for _ in range(5)))
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                stats = real_database.stats()
                most = max(most, stats["pool_size"] - stats["pool_available"])
                await asyncio.sleep(0.005)

        watcher = asyncio.create_task(watch())
        async with asyncio.timeout(20), LoopProbe() as probe:
            await asyncio.gather(*(session.execute(slow(real_database, 0.1)) for _ in range(5)))
        watcher.cancel()
    assert most == 5
    assert probe.worst < longest_stall()
    await whole(real_database)


async def test_in_autocommit_mode_atomic_is_a_transaction(real_database: DatabaseInterface) -> None:
    async with real_database.get_session(autocommit=True) as session:
        async with session.atomic():
            await session.execute(INSERT, ["a"])
            assert session.in_transaction
            async with session.atomic(), session.begin_nested():
                await session.execute(INSERT, ["b"])
            assert await names(real_database) == []
        assert not session.in_transaction
        with pytest.raises(ZeroDivisionError):
            async with session.atomic(durable=True):
                await session.execute(INSERT, ["c"])
                raise ZeroDivisionError
        await session.execute(INSERT, ["d"])
    assert await names(real_database) == ["a", "b", "d"]
    await whole(real_database)


async def test_in_autocommit_mode_on_commit_calls_at_once(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    async def awaits() -> None:
        calls.append("awaited")

    async with real_database.get_session(autocommit=True) as session:
        session.on_commit(lambda: calls.append("now"))
        assert calls == ["now"]
        for cannot in (awaits, lambda: awaits()):
            with pytest.raises(SessionStateError, match="cannot await in autocommit mode"):
                session.on_commit(cannot)
        with pytest.raises(ZeroDivisionError):
            session.on_commit(lambda: 1 / 0)
        session.on_commit(lambda: 1 / 0, robust=True)
        with pytest.raises(TypeError):
            session.on_commit("no")  # type: ignore[arg-type]
        async with session.atomic():
            session.on_commit(awaits)
            assert calls == ["now"]
    assert calls == ["now", "awaited"]
    assert "error calling" in caplog.text


async def test_in_autocommit_mode_options_hold_for_each_statement_and_do_not_stick(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("SHOW is PostgreSQL's")
    with pool(real_database, max_size=1):
        await real_database.connect()
    async with real_database.get_session(
        autocommit=True, timeout=5, read_only=True, isolation="serializable"
    ) as session:
        assert await session.fetch_value("SHOW statement_timeout") == "5s"
        assert await session.fetch_value("SHOW transaction_read_only") == "on"
        assert await session.fetch_value("SHOW transaction_isolation") == "serializable"
        with pytest.raises(DatabaseError, match="read-only"):
            await session.execute(INSERT, ["a"])
    async with real_database.get_session() as plain:
        assert await plain.fetch_value("SHOW statement_timeout") == "0"
        assert await plain.fetch_value("SHOW transaction_read_only") == "off"
        assert await plain.fetch_value("SHOW transaction_isolation") == "read committed"
