"""Names given to a DDL session are quoted whole: no name is SQL.

With real commits: what a name deletes for good shows in another session only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from django.db import Error, models
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from django_asyncsession import DatabaseInterface
from django_asyncsession.ddl import DDLSession

EVIL = [
    '"evil" (i int); delete from ddl_victim; --"',
    "`evil` (i int); delete from ddl_victim; -- `",
    "`ddl_victim`; delete from ddl_victim; -- `",
    '"ddl_victim"; delete from ddl_victim; --"',
    "a'); delete from ddl_victim; --",
    '"a"."b"',
    '"ddl_victim"',
    "`ddl_victim`",
    "100% %s %(a)s",
    "a\0b",
    "[a]",
    "ü; drop table ddl_victim",
    "",
]
PARTS = ['"', "`", "'", ";", "--", "%", "%s", "\0", "\\", ")", "a", "ü", " ", "ddl_victim"]
PARTS += ["; delete from ddl_victim; "]
names = st.one_of(
    st.sampled_from(EVIL),
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
    st.sampled_from("\"`'").flatmap(
        lambda quote: st.lists(st.sampled_from(PARTS), max_size=4).map(
            lambda parts: quote + "".join(parts) + quote
        )
    ),
)
# What a database says to a name that it cannot have, or that is not there.
REFUSALS = (Error, ValueError, TypeError, IndexError, AttributeError)


@pytest.fixture
async def db(real_database: DatabaseInterface) -> AsyncIterator[DatabaseInterface]:
    """A database with a table that nobody may touch."""
    async with real_database.get_session() as session:
        await session.execute("DROP TABLE IF EXISTS ddl_victim")
        await session.execute("CREATE TABLE ddl_victim (i int)")
        await session.execute("INSERT INTO ddl_victim VALUES (1), (2)")
    yield real_database
    async with real_database.get_session() as session:
        await session.execute("DROP TABLE ddl_victim")


async def assert_untouched(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        assert await session.fetch_all("SELECT * FROM ddl_victim ORDER BY i") == [(1,), (2,)]


def calls(ddl: DDLSession, name: str) -> dict[str, Any]:
    """Every public function that takes a name, with this name in each place."""
    number = models.IntegerField
    return {
        "create_table": lambda: ddl.create_table(name, i=number(primary_key=True)),
        "column": lambda: ddl.create_table("ddl_made", **{name or "i": number(primary_key=True)}),
        "get_columns": lambda: ddl.get_columns(name),
        "get_indexes": lambda: ddl.get_indexes(name),
        "add_column": lambda: ddl.add_column("ddl_made", name, number(null=True)),
        "add_column_to": lambda: ddl.add_column(name, "j", number(null=True)),
        "alter_column_type": lambda: ddl.alter_column_type("ddl_made", name, models.TextField()),
        "create_index": lambda: ddl.create_index("ddl_made", name, "i"),
        "drop_index": lambda: ddl.drop_index("ddl_made", name),
        "create_index_on": lambda: ddl.create_index("ddl_made", "ddl_index", name),
        "unique": lambda: ddl.create_index("ddl_made", name, "i", unique=True),
        "add_foreign_key": lambda: ddl.add_foreign_key("ddl_made", name, name, name),
        "drop_column": lambda: ddl.drop_column("ddl_made", name),
        "rename_table": lambda: ddl.rename_table("ddl_made", name),
        "drop_table": lambda: ddl.drop_table(name),
        "drop": lambda: ddl.drop_table("ddl_made"),
    }


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=names)
@example(name=EVIL[0])
@example(name=EVIL[1])
@example(name=EVIL[2])
async def test_no_name_is_sql(db: DatabaseInterface, name: str) -> None:
    if name == "ddl_victim":
        return
    for place in calls(db.get_ddl_session(), name):
        ddl = db.get_ddl_session()
        with suppress(*REFUSALS):
            async with ddl:
                await calls(ddl, name)[place]()
    await assert_untouched(db)


@pytest.mark.parametrize("name", ['"whole"', "`whole`", 'a"b', "a`b", "a'b", '"evil" (i int); --"'])
async def test_a_table_has_the_name_that_was_given(db: DatabaseInterface, name: str) -> None:
    async with db.get_ddl_session() as ddl:
        await ddl.create_table(name, i=models.IntegerField(primary_key=True))
    try:
        async with db.get_ddl_session() as ddl:
            assert name in await ddl.get_tables()
            assert [column.name for column in await ddl.get_columns(name)] == ["i"]
            assert [index.primary_key for index in await ddl.get_indexes(name)] == [True]
    finally:
        async with db.get_ddl_session() as ddl:
            await ddl.drop_table(name)
    async with db.get_ddl_session() as ddl:
        assert name not in await ddl.get_tables()


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=names)
async def test_no_name_of_a_savepoint_is_sql(db: DatabaseInterface, name: str) -> None:
    with suppress(*REFUSALS):
        async with db.get_session() as session, session.begin_nested(name) as savepoint:
            await savepoint.rollback()
    with suppress(*REFUSALS):
        async with db.get_transaction() as transaction:
            await transaction.create_savepoint(name)
            await transaction.rollback(name)
            await transaction.release_savepoint(name)
    await assert_untouched(db)
