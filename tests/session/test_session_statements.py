"""Session: SQL, streams and rows, on every database.

On real connections of the pools where the test is about what the driver makes of SQL and streams.
"""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from django.db import DatabaseError, IntegrityError

from django_asyncsession import DatabaseInterface, SessionClosedError, databases
from tests.models import Author, Book, Tag, User
from tests.sessions import COUNT, INSERT, names, whole

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
