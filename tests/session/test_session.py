"""Session: its states and errors, begin and end, and what becomes of one that is forgotten.

On real connections of the pools where the test is about a commit, or about what goes back to the
pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import DatabaseError, InterfaceError

from django_asyncsession import (
    ConfigurationError,
    DatabaseInterface,
    Outcome,
    Session,
    SessionClosedError,
    SessionStateError,
    State,
    databases,
)
from tests.models import Author, User
from tests.sessions import COUNT, INSERT, names, pool, slow, soon, whole

# Every call that needs a session in a certain state.
CALLS: dict[str, Any] = {
    "commit": lambda s: s.commit(),
    "rollback": lambda s: s.rollback(),
    "rollback to": lambda s: s.rollback("sp"),
    "execute": lambda s: s.execute("SELECT 1"),
    "execute_many": lambda s: s.execute_many(INSERT, [["a"]]),
    "execute_script": lambda s: s.execute_script("SELECT 1"),
    "cursor": lambda s: s.cursor("SELECT 1"),
    "fetch": lambda s: s.fetch("SELECT 1"),
    "fetch_value": lambda s: s.fetch_value("SELECT 1"),
    "fetch_all": lambda s: s.fetch_all("SELECT 1"),
    "stream": lambda s: anext(s.stream("SELECT 1")),
    "run_sync": lambda s: s.run_sync(print),
    "render": lambda s: s.render(None, "base.html"),
    "add": lambda s: s.add(User(name="a")),
    "add_all": lambda s: s.add_all([User(name="a")]),
    "remove": lambda s: s.remove(User(pk=1)),
    "refresh": lambda s: s.refresh(User(pk=1)),
    "get": lambda s: s.get(User, 1),
    "get_one": lambda s: s.get_one(User, 1),
    "truncate": lambda s: s.truncate(User),
    "driver_connection": lambda s: s.driver_connection(),
    "atomic": lambda s: s.atomic().__aenter__(),
    "released": lambda s: s.released().__aenter__(),
    "hold": lambda s: s.one_connection().__aenter__(),
}
AT_ONCE: dict[str, Any] = {
    "begin_nested": lambda s: s.begin_nested(),
    "savepoint": lambda s: s.savepoint(),
    "set_rollback": lambda s: s.set_rollback(True),
    "get_rollback": lambda s: s.get_rollback(),
    "on_commit": lambda s: s.on_commit(print),
    "on_rollback": lambda s: s.on_rollback(print),
}


async def refused(session: Session, name: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        if name in CALLS:
            await CALLS[name](session)
        else:
            AT_ONCE[name](session)
    assert isinstance(caught.value, InterfaceError)


# States and errors


@pytest.mark.parametrize("name", [*CALLS, *AT_ONCE])
@pytest.mark.parametrize("autocommit", [False, True])
async def test_before_begin_every_call_says_how_to_begin(name: str, autocommit: bool) -> None:
    session = databases["default"].get_session(autocommit=autocommit)
    await refused(
        session,
        name,
        SessionStateError,
        "<Session 'default' not begun.*> has not begun; use `async with",
    )
    assert databases["default"].stats()["requests_num"] == 0
    assert session.state is State.NEW


@pytest.mark.parametrize("name", ["begin", *CALLS, *AT_ONCE])
async def test_after_close_every_call_says_where_the_session_was_made(name: str) -> None:
    session = await databases["default"].get_session().begin()
    await session.close()
    calls = {**CALLS, "begin": lambda s: s.begin()}
    with pytest.raises(
        SessionClosedError, match=r"made at .*test_session\.py:\d+ in .* is closed; make a new"
    ):
        if name in calls:
            await calls[name](session)
        else:
            AT_ONCE[name](session)
    assert session.closed
    with pytest.raises(SessionClosedError):
        await session.__aenter__()


async def test_closing_twice_or_before_begin_does_nothing(database: DatabaseInterface) -> None:
    session = database.get_session()
    await session.close()
    await session.close()
    assert session.closed and session.state is State.CLOSED
    other = await database.get_session().begin()
    await other.execute(INSERT, ["a"])
    await other.close()
    await other.close()
    assert await names(database) == []


async def test_beginning_twice_is_an_error_that_names_nesting(
    database: DatabaseInterface,
) -> None:
    session = await database.get_session().begin()
    for begin in (session.begin, session.start):
        with pytest.raises(SessionStateError, match="already; nest with `async with session"):
            await begin()
    async with session:
        with pytest.raises(SessionStateError, match="is entered already"):
            await session.__aenter__()
    with pytest.raises(SessionClosedError):
        async with session:
            pass
    plain = await database.get_session(autocommit=True).begin()
    with pytest.raises(SessionStateError, match="has begun already; use `async with"):
        await plain.begin()
    await plain.close()


async def test_begin_and_start_return_the_session(database: DatabaseInterface) -> None:
    session = database.get_session()
    assert await session.start() is session
    assert session.in_transaction
    await session.close()


async def test_the_repr_shows_the_state_and_no_secret(database: DatabaseInterface) -> None:
    session = database.get_session()
    alias = repr(database.alias)
    assert repr(session) == f"<Session {alias} not begun>"
    async with session:
        assert repr(session) == f"<Session {alias} in transaction>"
        async with session.begin_nested():
            assert repr(session) == f"<Session {alias} in transaction, 1 savepoint>"
            async with session.begin_nested():
                assert "2 savepoints" in repr(session)
                assert "2 savepoints" in repr(session.transaction)
        await session.commit()
        assert repr(session) == f"<Session {alias} open>"
    assert repr(session) == f"<Session {alias} closed>"
    assert repr(database.get_session(autocommit=True)) == f"<Session {alias} not begun, autocommit>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolation": "chaos"}, "unknown isolation level 'chaos'; use one of"),
        ({"timeout": 0}, "timeout is 0; give seconds above 0"),
        ({"lock_timeout": -1}, "lock_timeout is -1"),
        ({"idle_timeout": 0.0}, "idle_timeout is 0.0"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        databases["default"].get_session(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError):
        databases["default"].get_session(isolaton="serializable")


async def test_nothing_is_taken_from_the_pool_before_the_first_statement(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session(isolation="serializable") as session:
        session.on_rollback(print)
        session.set_rollback(True)
        session.set_rollback(False)
        session.begin_nested()
        assert session.in_transaction
        await session.rollback()
        await session.commit()
    assert real_database.stats()["requests_num"] == 0


async def test_begin_on_use_begins_with_the_first_statement(
    database: DatabaseInterface,
) -> None:
    session = database.get_session(begin_on_use=True)
    assert not session.in_transaction
    await session.execute(INSERT, ["a"])
    assert session.in_transaction
    await session.commit()
    await session.close()
    assert await names(database) == ["a"]


async def test_a_custom_subclass_and_its_info_are_the_users_own(
    database: DatabaseInterface,
) -> None:
    class Shop(Session):
        async def users(self) -> int:
            return int(await self.fetch_value(COUNT))

    async with Shop(bind=database, read_only=None) as session:
        session.info["request"] = 7
        assert await session.users() == 0
        assert repr(session).startswith("<Shop ")
    assert session.info == {"request": 7}
    assert database.get_session().info == {}


# Begin, commit, rollback


async def test_async_with_commits(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        assert await names(real_database) == []
    assert session.closed
    assert session.outcome is Outcome.COMMITTED
    assert await names(real_database) == ["a"]
    await whole(real_database)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyboardInterrupt(),
        SystemExit(1),
        asyncio.CancelledError(),
        DatabaseError("no"),
    ],
)
async def test_async_with_rolls_back_on_any_exception_and_lets_it_pass(
    real_database: DatabaseInterface, error: BaseException
) -> None:
    session = real_database.get_session()
    with pytest.raises(type(error)) as caught:
        async with session:
            await session.execute(INSERT, ["a"])
            raise error
    assert caught.value is error
    assert session.closed
    assert session.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == []
    await whole(real_database)


async def test_after_commit_the_next_statement_begins_a_new_transaction(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        assert await session.commit() is session
        assert not session.in_transaction and session.state is State.IDLE
        await whole(real_database)
        await session.commit()
        await session.execute(INSERT, ["b"])
        assert await session.rollback() is session
        await session.rollback()
        await session.begin()
        await session.execute(INSERT, ["c"])
    assert await names(real_database) == ["a", "c"]


async def test_a_reset_session_can_begin_again(database: DatabaseInterface) -> None:
    session = await database.get_session().begin()
    await session.execute(INSERT, ["a"])
    assert (await session.reset()).state is State.NEW
    async with session:
        await session.execute(INSERT, ["b"])
    assert await names(database) == ["b"]
    assert (await session.reset()).state is State.NEW


async def test_a_failed_commit_leaves_the_session_closed(real_database: DatabaseInterface) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    session.on_commit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await session.commit()
    assert session.closed
    assert session.outcome is Outcome.COMMITTED
    assert await names(real_database) == ["a"]
    await whole(real_database)


async def test_released_commits_and_holds_no_connection_meanwhile(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        async with session.released():
            assert await names(real_database) == ["a"]
            await whole(real_database)
            with pytest.raises(
                SessionStateError, match=r"gave its connection back for the `released\(\)` block"
            ):
                await session.execute("SELECT 1")
            with pytest.raises(SessionStateError):
                await session.commit()
        await session.execute(INSERT, ["b"])
    assert await names(real_database) == ["a", "b"]
    async with real_database.get_session(autocommit=True) as plain:
        async with plain.released():
            pass
        await plain.execute(INSERT, ["c"])
    assert await names(real_database) == ["a", "b", "c"]


async def test_an_error_in_released_leaves_the_session_as_it_was(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(ValueError):
            async with session.released():
                raise ValueError
        await session.execute(INSERT, ["a"])
        async with session.begin_nested():
            with pytest.raises(SessionStateError, match=r"commit\(\) inside a nested block"):
                await session.released().__aenter__()
    assert await names(real_database) == ["a"]


# Autocommit mode


async def test_the_drivers_own_connection_can_be_reached(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        connection = await session.driver_connection()
        assert hasattr(connection, "cursor")


async def test_a_session_never_closed_warns_with_where_it_was_made_and_loses_no_slot(
    real_database: DatabaseInterface, without_collector: None
) -> None:
    told: list[str] = []
    with pool(real_database, max_size=1):
        await real_database.connect()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *args: told.append(str(message))  # type: ignore[assignment]
        session = await real_database.get_session().begin()
        await session.execute(INSERT, ["a"])
        del session
    assert re.search(
        r"<Session .* in transaction> made at .*test_session\.py:\d+ in .* was never", told[0]
    )
    assert await soon(
        lambda: real_database.stats()["pool_size"] == real_database.stats()["pool_available"]
    )
    assert await names(real_database) == []
    await whole(real_database)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is not freed by its reference count stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def broken(session: Session) -> None:
    async with session, session.begin_nested():
        await session.add(Author(name="a"))
        await session.add(Author(name="a"))


async def swallowed(session: Session) -> None:
    async with session:
        with contextlib.suppress(DatabaseError):
            await session.execute("SELECT * FROM no_such_table")


async def fine(session: Session) -> None:
    async with session:
        session.on_commit(lambda: session.closed)
        session.on_rollback(lambda: session.closed)
        async with session.begin_nested(), session.atomic():
            await session.run_sync(lambda: list(User.objects.using(session.alias)))
        async for _ in session.stream("SELECT 1"):
            pass
        await session.commit()
        await session.execute("SELECT 1")


async def cancelled(session: Session) -> None:
    async with session:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.execute(slow(databases[session.alias], 1))
        raise ValueError


@pytest.mark.parametrize("request_of", [fine, broken, swallowed, cancelled])
async def test_a_session_is_freed_without_the_collector(
    real_database: DatabaseInterface, request_of: Any, without_collector: None
) -> None:
    async def serve() -> weakref.ref[Session]:
        session = real_database.get_session()
        task = asyncio.create_task(request_of(session))
        await asyncio.wait([task])
        assert (task.exception() is None) is (request_of is fine)
        return weakref.ref(session)

    assert (await serve())() is None
    await whole(real_database)
