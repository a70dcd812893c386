"""Plans that are sent below the driver's cursor, and what Django's code makes of the transaction.

With real commits on connections of the pools: on the connection of a test, which sync code
shares, nothing is sent so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import ProgrammingError
from django.test import override_settings

from django_asyncsession import DatabaseInterface, Outcome, Session, databases
from django_asyncsession.backends.postgresql import base
from django_asyncsession.backends.postgresql.wire import Wire
from django_asyncsession.plans import cache
from tests.faults import cancel_at, outcome_of
from tests.models import Book, User
from tests.postgres import ask
from tests.sessions import names, pool, whole

SET = "SELECT current_setting('app.tenant', true)"


@pytest.fixture
async def db(empty_tables: None) -> AsyncIterator[DatabaseInterface]:
    """PostgreSQL with one row, and the plan of a get that is proved."""
    db = databases["default"]
    async with db.get_session() as session:
        await session.insert_now(User(id=1000, name="one"))
    for _ in range(4):
        async with db.get_session() as session:
            await session.get(User, 1000)
    yield db
    await db.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What goes below the cursor: the first word of each statement, with BEGIN before it."""
    found: list[bytes] = []
    execute, simple = Wire.execute, Wire.simple

    async def noted(self: Wire, sql: bytes, values: Any = (), **options: Any) -> Any:
        begin = options.get("begin")
        found.append(sql.split()[0] if begin is None else begin + b"; " + sql.split()[0])
        return await execute(self, sql, values, **options)

    async def noted_simple(self: Wire, sql: bytes, **options: Any) -> Any:
        found.append(sql)
        return await simple(self, sql, **options)

    monkeypatch.setattr(Wire, "execute", noted)
    monkeypatch.setattr(Wire, "simple", noted_simple)
    yield found


async def get(session: Session) -> str:
    return (await session.get_one(User, 1000)).name


async def test_begin_goes_with_the_first_statement_and_commit_is_all_that_follows(
    db: DatabaseInterface, sent: list[bytes]
) -> None:
    async with db.get_session() as session:
        assert await get(session) == await get(session) == "one"
    assert sent == [b"BEGIN; SELECT", b"SELECT", b"COMMIT"]
    assert session.outcome is Outcome.COMMITTED


async def test_options_go_with_begin_and_an_error_rolls_back(
    db: DatabaseInterface, sent: list[bytes]
) -> None:
    with pytest.raises(ValueError):
        async with db.get_session(isolation="serializable", timeout=5) as session:
            await get(session)
            raise ValueError
    begin = b"BEGIN ISOLATION LEVEL SERIALIZABLE; SET LOCAL statement_timeout = 5000; SELECT"
    assert sent == [begin, b"ROLLBACK"]
    assert session.outcome is Outcome.ROLLED_BACK
    await whole(db)


async def test_in_autocommit_mode_a_statement_is_all_that_is_sent(
    db: DatabaseInterface, sent: list[bytes]
) -> None:
    async with db.get_session(autocommit=True) as session:
        found = await asyncio.gather(*(get(session) for _ in range(3)))
    assert found == ["one"] * 3 and sent == [b"SELECT"] * 3


async def test_sync_code_goes_on_in_the_transaction(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await get(session)
        await session.run_sync(User.objects.create, name="two")
        assert await session.select(User).count() == 2
    assert await names(db) == ["one", "two"]
    with pytest.raises(ValueError):
        async with db.get_session() as session:
            await get(session)
            before = await session.fetch_value("SELECT txid_current_if_assigned() IS NULL")
            await session.run_sync(User.objects.create, name="three")
            assert before and await get(session) == "one"
            raise ValueError
    assert await names(db) == ["one", "two"]
    await whole(db)


async def test_sync_code_without_sql_begins_no_transaction_of_its_own(
    db: DatabaseInterface, sent: list[bytes]
) -> None:
    """The driver sends BEGIN with the first statement that passes it; a plan must not be before."""
    async with db.get_session(isolation="repeatable read") as session:
        await session.run_sync(lambda: connection.vendor)
        await get(session)
        await get(session)
        assert await session.fetch_value("SHOW transaction_isolation") == "repeatable read"
        before = await session.fetch_value("SELECT now()")
        await get(session)
        assert before == await session.fetch_value("SELECT now()")
    assert sent == [b"SELECT"] * 2
    await whole(db)


async def test_a_transaction_that_sql_has_ended_does_not_fail_the_next_session(
    db: DatabaseInterface,
) -> None:
    def begin_and_end() -> None:
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT 1")
            cursor.execute("COMMIT")

    with pool(db, max_size=1):
        await db.close()
        for _ in range(4):
            async with db.get_session() as session:
                await get(session)
        async with db.get_session(autocommit=True) as session:
            await session.run_sync(begin_and_end)
        async with db.get_session() as session:
            await get(session)
        assert session.outcome is Outcome.COMMITTED
        await db.close()


async def test_an_error_in_reading_rows_fails_no_transaction(
    db: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def unreadable(self: Wire, result: Any) -> Any:
        raise ValueError("unreadable")

    async with db.get_session() as session:
        session.on_commit(lambda: called.append("saved"))
        await get(session)
        with monkeypatch.context() as patched:
            patched.setattr(Wire, "rows", unreadable)
            with pytest.raises(ValueError, match="unreadable"):
                await get(session)
        assert await get(session) == "one"
        await session.run_sync(User.objects.create, name="two")
    assert called == ["saved"] and await names(db) == ["one", "two"]


async def test_a_subquery_s_table_counts_too(db: DatabaseInterface) -> None:
    """Its table is not among those that are asked for, so the connection is reset."""
    async with db.get_session() as session:
        for _ in range(4):
            query = session.select(Book).exclude(tags__name="x")
            await query
    plans = [entry.plan for entry in cache.of(db.alias)._entries if entry.plan is not None]
    assert [plan.tables for plan in plans if plan.sql.count("SELECT") > 1] == [()]


async def test_blocks_callbacks_and_the_wish_to_roll_back_mean_what_they_do(
    db: DatabaseInterface,
) -> None:
    called: list[str] = []
    async with db.get_session() as session:
        await get(session)
        session.on_commit(lambda: called.append("committed"))
        async with session.begin_nested() as block:
            await session.run_sync(User.objects.create, name="gone")
            await block.rollback()
        await session.run_sync(lambda: transaction.on_commit(lambda: called.append("django")))
        assert called == []
    assert called == ["committed", "django"] and await names(db) == ["one"]
    async with db.get_session() as session:
        await get(session)
        session.set_rollback(True)
        assert session.get_rollback()
    assert session.outcome is Outcome.ROLLED_BACK
    async with db.get_session() as session:
        await get(session)
        session.on_commit(lambda: called.append("alone"))
    assert called[-1] == "alone"


async def test_a_statement_that_fails_dooms_the_transaction(db: DatabaseInterface) -> None:
    ask("ALTER TABLE tests_user RENAME COLUMN name TO other")
    try:
        with pytest.raises(TransactionManagementError, match="swallowed"):
            async with db.get_session() as session:
                with pytest.raises(ProgrammingError):
                    await get(session)
                with pytest.raises(TransactionManagementError):
                    await get(session)
                with pytest.raises(TransactionManagementError):
                    await session.run_sync(User.objects.count)
    finally:
        ask("ALTER TABLE tests_user RENAME COLUMN other TO name")
    assert session.outcome is Outcome.ROLLED_BACK
    async with db.get_session() as session:
        assert await get(session) == "one"
    await whole(db)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_use_that_is_cancelled_anywhere_leaves_the_pool_whole(
    db: DatabaseInterface, autocommit: bool
) -> None:
    async def use() -> list[str]:
        async with db.get_session(autocommit=autocommit) as session:
            return [await get(session), await get(session)]

    for step in range(1, 30):
        attempt = cancel_at(use(), {step})
        outcome = await outcome_of(attempt)
        if attempt.done:
            assert outcome == ["one", "one"] and step > 2
            break
        assert isinstance(outcome, asyncio.CancelledError)
        await whole(db)


async def test_who_wants_to_see_each_statement_sees_it(
    db: DatabaseInterface, sent: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    async with db.get_session() as session:
        await get(session)
        await session.run_sync(lambda: connection.execute_wrappers.append(wrapper))
        await get(session)
    assert len(seen) == 1 and sent == [b"BEGIN; SELECT"]
    sent.clear()
    with override_settings(DEBUG=True):
        async with db.get_session() as session:
            await get(session)
            queries = await session.run_sync(lambda: connection.queries)
    assert any("tests_user" in query["sql"] for query in queries) and not sent
    from django.db.backends.utils import CursorWrapper

    execute = CursorWrapper.execute

    def traced(self: Any, sql: Any, params: Any = None) -> Any:
        seen.append(sql)
        return execute(self, sql, params)

    monkeypatch.setattr(CursorWrapper, "execute", traced)
    async with db.get_session() as session:
        await get(session)
    assert len(seen) == 2 and not sent


@pytest.fixture
def view(db: DatabaseInterface) -> Iterator[None]:
    """The table is a view now, which sets something for whoever reads it."""
    ask("ALTER TABLE tests_user RENAME TO tests_user_kept")
    ask(
        "CREATE VIEW tests_user AS SELECT * FROM tests_user_kept "
        "WHERE set_config('app.tenant', 'ann', false) = 'ann'",
    )
    base.FACTS.clear()
    try:
        yield
    finally:
        ask("DROP VIEW tests_user")
        ask("ALTER TABLE tests_user_kept RENAME TO tests_user")
        base.FACTS.clear()


@pytest.mark.parametrize("autocommit", [False, True])
async def test_what_a_view_sets_does_not_reach_the_next_session(
    db: DatabaseInterface, sent: list[bytes], autocommit: bool
) -> None:
    await db.close()
    with pool(db, max_size=1):
        # The first times Django runs it.
        for _ in range(6):
            async with db.get_session(autocommit=autocommit) as session:
                assert await get(session) == "one"
            async with db.get_session(autocommit=autocommit) as session:
                assert await session.fetch_value(SET) in ("", None)
    assert sent and db.stats()["connections_lost"] == 0
    await db.close()
