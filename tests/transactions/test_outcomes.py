"""What an error says of how a transaction ended and why: known, where it can be known. On real
pools, where connections are lost, transactions commit and locks are waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, OperationalError
from django.db.transaction import TransactionManagementError
from django.test import override_settings

from django_asyncsession import DatabaseInterface, Session, databases
from django_asyncsession.backends.options import TransactionOptions
from django_asyncsession.conf import settings
from django_asyncsession.exceptions import CommitUnknown, ConfigurationError, QueryTimeout
from django_asyncsession.transactions.transaction import Outcome
from tests.faults import outcome_of, watchdog
from tests.sessions import INSERT, behind, names, slow, soon

MY_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}
END_SESSION = {"postgresql": "SELECT pg_terminate_backend(%s)", "mysql": "KILL %s"}
END_STATEMENT = {"postgresql": "SELECT pg_cancel_backend(%s)", "mysql": "KILL QUERY %s"}
RUNNING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE id = %s AND info <> ''",
}


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(60):
        yield


async def commit_in_vain(session: Any) -> None:
    """Commit; the error must say that nothing was saved."""
    rolled_back = asyncio.Event()
    session.on_rollback(rolled_back.set)
    with pytest.raises(DatabaseError) as caught:
        await session.commit()
    assert not isinstance(caught.value, CommitUnknown), caught.value
    assert session.outcome is Outcome.ROLLED_BACK
    assert rolled_back.is_set()


async def test_a_transaction_ended_for_its_idleness_is_rolled_back_not_unknown(
    real_database: DatabaseInterface,
) -> None:
    seconds = {"postgresql": 0.2, "mysql": 1, "sqlite": 0.2}[real_database.vendor]
    session = await real_database.get_session(idle_timeout=seconds).begin()
    await session.execute(INSERT, ["a"])
    await asyncio.sleep(seconds + 0.6)
    await commit_in_vain(session)
    assert await names(real_database) == []


async def test_a_session_that_the_administrator_ended_before_commit_is_rolled_back_not_unknown(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite has no administrator")
    session = await real_database.get_session().begin()
    number = await session.fetch_value(MY_ID[real_database.vendor])
    await session.execute(INSERT, ["a"])
    async with real_database.get_session(autocommit=True) as admin:
        await admin.execute(END_SESSION[real_database.vendor], [number])
    [lease] = real_database.pool().leases
    assert await soon(lease.connection.has_hung_up)
    await commit_in_vain(session)
    assert await names(real_database) == []


async def test_a_network_that_was_cut_before_commit_leaves_nothing_unknown(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        proxy.reset()
        [lease] = far.pool().leases
        assert await soon(lease.connection.has_hung_up)
        await commit_in_vain(session)
    assert await names(real_database) == []


async def test_nowait_is_no_query_timeout(real_database: DatabaseInterface) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite has no NOWAIT")
    async with real_database.get_session() as holder:
        await holder.execute(INSERT, ["a"])
        await holder.commit()
        await holder.execute("UPDATE tests_user SET level = 2")
        async with real_database.get_session(timeout=30, lock_timeout=30) as session:
            with pytest.raises(OperationalError) as caught:
                await session.execute("SELECT * FROM tests_user FOR UPDATE NOWAIT")
            assert not isinstance(caught.value, QueryTimeout)
            await session.rollback()


async def test_a_statement_cancelled_by_somebody_else_is_no_query_timeout(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite has no administrator")
    session = await real_database.get_session(timeout=30, lock_timeout=30).begin()
    number = await session.fetch_value(MY_ID[real_database.vendor])
    # In MariaDB a sleep that is killed succeeds.
    sql = {"postgresql": slow(real_database, 20), "mysql": f"{_COUNTING}"}[real_database.vendor]
    running = asyncio.create_task(outcome_of(session.fetch_value(sql)))
    async with real_database.get_session(autocommit=True) as admin:

        async def is_running() -> bool:
            return bool(await admin.fetch_value(RUNNING[real_database.vendor], [number]))

        assert await soon(is_running)
        await admin.execute(END_STATEMENT[real_database.vendor], [number])
    error = await running
    assert isinstance(error, OperationalError) and not isinstance(error, QueryTimeout), error
    await session.rollback()


_COUNTING = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900000000) "
    "SELECT SQL_NO_CACHE COUNT(*) FROM n AS a, n AS b"
)


@pytest.mark.parametrize("option", ["timeout", "lock_timeout", "idle_timeout"])
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1, 0])
def test_times_that_are_no_times_are_refused(alias: str, option: str, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} is .*; give seconds above 0, or None"):
        databases[alias].get_session(**{option: seconds})


async def test_a_swallowed_loss_says_that_it_is_rolled_back(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        proxy.reset()
        await outcome_of(session.execute(INSERT, ["b"]))
        with pytest.raises(TransactionManagementError, match="because its connection was lost"):
            await session.commit()
        assert session.outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1])
async def test_seconds_to_wait_that_are_no_time_are_refused_and_nothing_is_closed(
    real_database: DatabaseInterface, seconds: float
) -> None:
    with pytest.raises(ConfigurationError, match=r"timeout is .*; give seconds"):
        await real_database.pool().acquire(seconds)
    async with real_database.get_session(autocommit=True) as session:
        for close in (real_database.close, databases.close_all, real_database.pool().close):
            with pytest.raises(ConfigurationError, match=r"grace is .*; give seconds"):
                await close(seconds)
        assert await session.fetch_value("SELECT 1") == 1


@pytest.mark.parametrize(
    "name",
    [
        "STREAM_TIMEOUT",
        "SLOW_QUERY_SECONDS",
        "LEAK_WARNING_SECONDS",
        "LOOP_BLOCK_WARNING_SECONDS",
    ],
)
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1])
def test_settings_in_seconds_that_are_no_times_are_refused(name: str, seconds: float) -> None:
    with (
        override_settings(ASYNC_SESSION={name: seconds}),
        pytest.raises(ConfigurationError, match=rf'"{name}"\] is .*; give seconds'),
    ):
        settings.ALIAS  # noqa: B018


LOCALES = ["de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "es_ES.UTF-8", "ru_RU.UTF-8"]


async def speak_another_language(session: Session) -> bool:
    """Let the server's messages be in another language than English, if it has one."""
    for name in LOCALES:
        try:
            await session.execute("SELECT set_config('lc_messages', %s, false)", [name])
        except DatabaseError:
            await session.rollback()
            await session.begin()
            continue
        return True
    return False


@pytest.mark.parametrize("seconds", [30, 0.2], ids=["cancelled", "timed out"])
async def test_in_another_language_too_a_cancelled_statement_is_no_query_timeout(
    real_database: DatabaseInterface, seconds: float
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("the other databases have numbers for both")
    session = await real_database.get_session(timeout=seconds).begin()
    if not await speak_another_language(session):
        await session.close()
        pytest.skip("the server has messages in English only")
    number = await session.fetch_value(MY_ID["postgresql"])
    running = asyncio.create_task(outcome_of(session.fetch_value(slow(real_database, 20))))
    async with real_database.get_session(autocommit=True) as admin:

        async def is_running() -> bool:
            return bool(await admin.fetch_value(RUNNING["postgresql"], [number]))

        if seconds == 30:
            assert await soon(is_running)
            await admin.execute(END_STATEMENT["postgresql"], [number])
        error = await running
    assert "user request" not in str(error) and "statement timeout" not in str(error.__cause__)
    assert isinstance(error, OperationalError)
    assert isinstance(error, QueryTimeout) == (seconds == 0.2), error
    await session.rollback()


async def test_a_cancelled_statement_is_told_from_a_timeout_by_its_time_where_words_do_not_help(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("the other databases have numbers for both")
    # As a server says it whose messages are German.
    error = OperationalError("breche Anfrage wegen Benutzeraufforderung ab")
    error.__cause__ = psycopg.errors.QueryCanceled(*error.args)
    async with real_database.get_session() as session:
        await session.fetch_value("SELECT 1")
        [lease] = real_database.pool().leases
        assert not lease.connection.is_timeout(error, TransactionOptions(timeout=30))
        assert lease.connection.is_timeout(error, TransactionOptions(timeout=0.000001))


async def test_a_lock_that_sqlite_does_not_wait_for_is_no_query_timeout(tmp_path: Path) -> None:
    db = DatabaseInterface.from_dsn(
        f"sqlite:///{tmp_path / 'db.sqlite3'}?transaction_mode=DEFERRED"
    )
    async with db:
        async with db.get_session() as session:
            await session.execute("CREATE TABLE t (n int)")
        async with db.get_session(lock_timeout=30) as reader:
            await reader.fetch_value("SELECT count(*) FROM t")
            async with db.get_session() as writer:
                await writer.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(OperationalError, match="database is locked") as caught:
                await reader.execute("INSERT INTO t VALUES (2)")
            assert not isinstance(caught.value, QueryTimeout)
            await reader.rollback()
