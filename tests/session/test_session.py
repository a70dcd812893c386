"""Session: states and errors, SQL, streams, rows and callbacks, on every database.

On real connections of the pools where the test is about a commit and its callbacks, about what goes
back to the pool, or about what the driver makes of SQL and streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, InterfaceError

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
from tests.faults import LoopProbe, longest_stall
from tests.models import Author, Book, Tag, User
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
    "hold": lambda s: s.hold().__aenter__(),
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


# Raw SQL


async def test_one_parameter_style_on_every_database(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        assert await session.fetch_value("SELECT %s", [5]) == 5
        assert await session.fetch_value("SELECT %(a)s", {"a": "x"}) == "x"
        assert await session.fetch_value("SELECT %s", ("%s; '\"",)) == "%s; '\""
        assert await session.fetch_value("SELECT 'a%%b' FROM (SELECT %s) AS t", [1]) == "a%b"
        assert await session.fetch_value("SELECT '100%'") == "100%"
        assert await session.fetch_value("SELECT '{}'") == "{}"
        assert await session.fetch_value("SELECT %s", [None]) is None


async def test_rows_touched_are_told(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        assert await session.execute(INSERT, ["a"]) == 1
        assert await session.execute_many(INSERT, (["b"] for _ in range(3))) == 3
        assert await session.execute("UPDATE tests_user SET level = 2 WHERE name = %s", ["b"]) == 3
        assert await session.execute("DELETE FROM tests_user WHERE name = %(n)s", {"n": "x"}) == 0
        assert await session.execute_many(INSERT, []) in (0, -1)
        assert await session.fetch_value(COUNT) == 4


async def test_a_script_runs_all_its_statements_in_the_transaction(
    real_database: DatabaseInterface,
) -> None:
    script = """
        -- two; users
        INSERT INTO tests_user (name, level) VALUES ('a;b', 1);
        INSERT INTO tests_user (name, level) VALUES ('100%', 1); ;
        /* done; */
    """
    async with real_database.get_session() as session:
        await session.execute_script(script)
        assert await session.fetch_value(COUNT) == 2
        await session.rollback()
        await session.execute_script("-- nothing")
        await session.execute_script("")
        assert await session.fetch_value(COUNT) == 0


WRONG = {
    "wrong SQL": ("SELEKT 1", None, DatabaseError),
    "no such table": ("SELECT * FROM no_such_table", None, DatabaseError),
    "too few parameters": ("SELECT %s, %s", [1], Exception),
    "too many parameters": ("SELECT %s", [1, 2], Exception),
    "a missing name": ("SELECT %(a)s", {"b": 1}, Exception),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_wrong_statement_raises_what_djangos_cursor_raises(
    real_database: DatabaseInterface, wrong: str, autocommit: bool
) -> None:
    sql, params, error = WRONG[wrong]
    session = await real_database.get_session(autocommit=autocommit).begin()
    for call in (session.execute, session.cursor, session.fetch_all):
        with pytest.raises(error) as caught:
            await call(sql, params)
        if isinstance(caught.value, DatabaseError):
            assert caught.value.__cause__ is not None
        if not autocommit:
            await session.rollback()
    assert await session.fetch_value("SELECT 1") == 1
    await session.close()
    await whole(real_database)


async def test_sql_of_a_wrong_type_is_refused(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        for wrong in (b"SELECT 1", 1, None):
            with pytest.raises(TypeError, match="SQL must be a string"):
                await session.execute(wrong)
        assert await session.fetch_value("SELECT 1") == 1


async def test_an_integrity_error_is_djangos_with_the_drivers_as_its_cause(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(IntegrityError) as caught:
            async with session.begin_nested():
                await session.add(Author(name="a"))
                await session.execute("INSERT INTO tests_author (name) VALUES ('a')")
        assert type(caught.value.__cause__).__module__.split(".")[0] not in (
            "django",
            "django_asyncsession",
        )
        assert await session.fetch_value("SELECT COUNT(*) FROM tests_author") == 0


# Streams


@pytest.fixture
async def numbers(real_database: DatabaseInterface) -> DatabaseInterface:
    """A database with 3,000 users, named by their number."""
    async with real_database.get_session() as session:
        await session.run_sync(
            User.objects.using(real_database.alias).bulk_create,
            [User(name=f"{n:05}") for n in range(3000)],
        )
    return real_database


NUMBERS = "SELECT name FROM tests_user ORDER BY name"


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("chunk_size", [7, 2000, 10_000])
async def test_a_stream_gives_every_row_once(
    numbers: DatabaseInterface, autocommit: bool, chunk_size: int
) -> None:
    async with numbers.get_session(autocommit=autocommit) as session:
        rows = [int(row.name) async for row in session.stream(NUMBERS, chunk_size=chunk_size)]
        assert rows == list(range(3000))
        by_name = session.stream(NUMBERS.replace("ORDER", "WHERE name < %s ORDER"), ["00003"])
        assert [row[0] async for row in by_name] == ["00000", "00001", "00002"]
    await whole(numbers)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_stream_left_early_gives_its_connection_back_in_order(
    numbers: DatabaseInterface, autocommit: bool
) -> None:
    async with numbers.get_session(autocommit=autocommit) as session:
        stream = session.stream(NUMBERS, chunk_size=10)
        async for row in stream:
            assert row.name == "00000"
            break
        await stream.aclose()
        assert await session.fetch_value(COUNT) == 3000
    assert numbers.stats()["returns_bad"] == 0
    await whole(numbers)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_stream_just_dropped_is_closed_by_the_loop(
    numbers: DatabaseInterface, autocommit: bool
) -> None:
    async with numbers.get_session(autocommit=autocommit) as session:
        async for _ in session.stream(NUMBERS, chunk_size=10):
            break
        async with session.atomic():
            await asyncio.sleep(0.01)
        assert await session.fetch_value(COUNT) == 3000
    await whole(numbers)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_an_error_in_the_middle_of_a_stream_passes(
    numbers: DatabaseInterface, autocommit: bool
) -> None:
    session = await numbers.get_session(autocommit=autocommit).begin()
    with pytest.raises(ValueError, match="mine"):
        async for row in session.stream(NUMBERS, chunk_size=10):
            if row.name == "00015":
                raise ValueError("mine")
    assert await session.fetch_value(COUNT) == 3000
    await session.close()
    await whole(numbers)


async def test_an_error_of_the_server_in_the_middle_of_a_stream(numbers: DatabaseInterface) -> None:
    if numbers.vendor != "postgresql":
        pytest.skip("only PostgreSQL divides by zero with an error")
    sql = "SELECT 1 / (500 - n) AS n FROM generate_series(0, 3000) AS n"
    session = await numbers.get_session().begin()
    seen = []
    with pytest.raises(DatabaseError, match="division by zero"):
        async for row in session.stream(sql, chunk_size=50):
            seen.append(row.n)
    assert len(seen) == 500
    await session.rollback()
    assert await session.fetch_value(COUNT) == 3000
    await session.close()
    await whole(numbers)


async def test_a_stream_is_cut_by_the_sessions_end(numbers: DatabaseInterface) -> None:
    session = await numbers.get_session().begin()
    stream = session.stream(NUMBERS, chunk_size=10)
    await anext(stream)
    await session.close()
    with pytest.raises(SessionClosedError):
        async for _ in stream:
            pass
    await whole(numbers)


@pytest.mark.parametrize("wrong", [0, -1])
async def test_a_stream_needs_a_chunk_size_above_zero(wrong: int) -> None:
    async with databases["default"].get_session() as session:
        with pytest.raises(
            ValueError, match=f"chunk_size is {wrong}; give a number of rows above 0"
        ):
            await anext(session.stream("SELECT 1", chunk_size=wrong))


async def test_a_stream_needs_little_memory(numbers: DatabaseInterface) -> None:
    sql = "SELECT a.name FROM tests_user a, (SELECT * FROM tests_user LIMIT 33) AS b"
    count = 0
    async with numbers.get_session() as session:
        tracemalloc.start()
        try:
            async for _ in session.stream(sql, chunk_size=500):
                count += 1
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert count == 99_000
    # asyncmy makes rows of all that is in its receive buffer of 256 kB.
    assert peak < 4_000_000


# Rows


async def test_add_inserts_a_new_row_and_updates_a_loaded_one(
    database: DatabaseInterface,
) -> None:
    async with database.get_session() as session:
        user = User(name="heck")
        assert await session.add(user) is user
        assert user.pk
        user.level = 7
        await session.add(user)
        (loaded,) = await session.add_all([await session.get_one(User, user.pk)])
        assert loaded.level == 7
        assert await session.fetch_value(COUNT) == 1
        assert user._state.db == database.alias
    assert await names(database) == ["heck"]


async def test_add_all_is_all_or_none(database: DatabaseInterface) -> None:
    session = await database.get_session(autocommit=True).begin()
    with pytest.raises(IntegrityError):
        async with session.atomic():
            await session.add_all([Author(name="a"), Author(name="a")])
    assert await session.fetch_value("SELECT COUNT(*) FROM tests_author") == 0
    await session.close()


async def test_get_and_get_one(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        user = await session.add(User(name="heck"))
        assert (await session.get_one(User, user.pk)).name == "heck"
        assert await session.get(User, user.pk) == user
        assert await session.get(User, 4711) is None
        with pytest.raises(User.DoesNotExist):
            await session.get_one(User, 4711)
        assert await session.fetch_value(COUNT) == 1


async def test_remove_follows_on_delete(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        author, editor = await session.add_all([Author(name="a"), Author(name="b")])
        book = await session.add(Book(title="t", author=author, editor=editor))
        await session.remove(editor)
        await session.refresh(book)
        assert book.editor_id is None
        assert await session.remove(author) == 2
        assert await session.get(Book, book.pk) is None
        with pytest.raises(ValueError):
            await session.remove(Author(name="new"))


async def test_refresh_reads_again_and_says_when_the_row_is_gone(
    database: DatabaseInterface,
) -> None:
    async with database.get_session() as session:
        user = await session.add(User(name="heck"))
        await session.execute("UPDATE tests_user SET name = 'new', level = 9")
        assert (await session.refresh(user, fields=["name"])).name == "new"
        assert user.level == 1
        assert (await session.refresh(user)).level == 9
        await session.execute("DELETE FROM tests_user")
        with pytest.raises((User.DoesNotExist, DatabaseError)):
            await session.refresh(user)


async def test_truncate_empties_the_table_and_starts_its_keys_anew(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.add_all([Author(name="a"), Author(name="b")])
        await session.execute(INSERT, ["stays"])
    async with real_database.get_session() as session:
        await session.truncate(Author, cascade=real_database.vendor == "postgresql")
        author = await session.add(Author(name="c"))
        assert author.pk == 1
    assert await names(real_database) == ["stays"]


async def test_truncate_says_when_other_tables_refer_to_it(
    database: DatabaseInterface,
) -> None:
    if database.vendor != "postgresql":
        pytest.skip("only PostgreSQL refuses")
    session = await database.get_session().begin()
    with pytest.raises(DatabaseError, match="foreign key"):
        await session.truncate(Author)
    await session.close()


async def test_rows_stay_readable_after_the_session(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        user = await session.add(User(name="heck"))
        tag = await session.add(Tag(name="t", owner=user))
        (row,) = await session.fetch_all("SELECT name FROM tests_tag")
    assert (user.name, tag.owner.name, row.name) == ("heck", "heck", "t")


# Autocommit mode


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
