"""The DDL session: tables, columns, indexes and foreign keys, made, changed and described.

With real commits where the database has no other way to change its schema.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from django.db import IntegrityError, ProgrammingError, connections, models
from django.test.utils import isolate_apps

from django_asyncsession import DatabaseInterface, databases, table
from django_asyncsession.ddl import ColumnInfo, DDLSession
from tests.models import Author, Book

NAMES = ("ddl_one", "ddl_two")


@pytest.fixture
def database_of_ddl(alias: str, request: pytest.FixtureRequest) -> DatabaseInterface:
    """Each database in turn: PostgreSQL in the transaction of the test; the others as they are, as
    there each change of the schema is final."""
    database: DatabaseInterface = databases[alias]
    return request.getfixturevalue("database") if rolls_back(alias) else database


@pytest.fixture
async def ddl(database_of_ddl: DatabaseInterface) -> AsyncIterator[DDLSession]:
    """A DDL session on each database in turn; what is not rolled back of its tables is dropped."""
    ddl = database_of_ddl.get_ddl_session()
    await ddl.begin()
    yield ddl
    await ddl.close()
    if not rolls_back(ddl.alias):
        await drop_all(ddl.alias)
        await database_of_ddl.close()


def rolls_back(alias: str) -> bool:
    """Whether a change of the schema can be part of a transaction."""
    features = connections[alias].features
    return bool(features.can_rollback_ddl and features.atomic_transactions)


async def drop_all(alias: str) -> None:
    """Drops what a test made, those that refer to others first."""
    async with databases[alias].get_ddl_session() as ddl:
        for name in reversed(NAMES):
            await ddl.drop_table(name, cascade=True)


async def make_one(ddl: DDLSession) -> None:
    await ddl.create_table(
        "ddl_one",
        id=models.BigAutoField(primary_key=True),
        name=models.CharField(max_length=20, unique=True),
        size=models.IntegerField(null=True),
    )
    await ddl.execute("INSERT INTO ddl_one (name, size) VALUES ('a', 1), ('b', NULL)")


async def columns(ddl: DDLSession, name: str = "ddl_one") -> dict[str, ColumnInfo]:
    """The columns of a table by name."""
    return {info.name: info for info in await ddl.get_columns(name)}


async def rows(ddl: DDLSession, sql: str) -> list[tuple[Any, ...]]:
    """What a query gives."""
    return [tuple(row) for row in await ddl._session.fetch_all(sql)]


async def test_create_and_describe_a_table(ddl: DDLSession) -> None:
    await make_one(ddl)
    await ddl.create_table("ddl_one", id=models.AutoField(primary_key=True))
    assert "ddl_one" in await ddl.get_tables()
    found = await columns(ddl)
    assert list(found) == ["id", "name", "size"]
    assert [info.nullable for info in found.values()] == [False, False, True]
    assert [info.primary_key for info in found.values()] == [True, False, False]
    assert found["name"].type == "CharField" and found["name"].max_length == 20
    unique = [i for i in await ddl.get_indexes("ddl_one") if i.unique and not i.primary_key]
    assert [i.columns for i in unique][:1] == [("name",)]
    assert await rows(ddl, "SELECT id, name FROM ddl_one ORDER BY id") == [(1, "a"), (2, "b")]


@isolate_apps("tests")
async def test_create_the_table_of_a_model(ddl: DDLSession) -> None:
    class One(models.Model):
        name = models.CharField(max_length=20, db_index=True)
        level = models.IntegerField(db_column="lvl", default=3)
        author = models.ForeignKey(Author, models.CASCADE)

        class Meta:
            app_label = "tests"
            db_table = "ddl_one"
            indexes = (models.Index(fields=["name", "level"], name="ddl_pair"),)

    await ddl.create_table(table(One))
    assert list(await columns(ddl)) == ["id", "name", "lvl", "author_id"]
    indexes = await ddl.get_indexes(One)
    assert any(i.name == "ddl_pair" and i.columns == ("name", "lvl") for i in indexes)
    assert any(i.foreign_key == ("tests_author", "id") for i in indexes)
    await ddl.drop_table(One)
    assert "ddl_one" not in await ddl.get_tables()
    await ddl.drop_table(One)
    with pytest.raises(ProgrammingError, match="no table 'ddl_one'"):
        await ddl.drop_table("ddl_one", if_exists=False)


async def test_rename_a_table(ddl: DDLSession) -> None:
    await make_one(ddl)
    await ddl.rename_table("ddl_one", "ddl_two")
    assert {"ddl_one", "ddl_two"} & set(await ddl.get_tables()) == {"ddl_two"}
    assert len(await rows(ddl, "SELECT * FROM ddl_two")) == 2


async def test_add_and_drop_columns(ddl: DDLSession) -> None:
    await make_one(ddl)
    await ddl.add_column("ddl_one", "note", models.CharField(max_length=9, null=True))
    await ddl.add_column("ddl_one", "level", models.IntegerField(default=5))
    await ddl.add_column("ddl_one", "code", models.IntegerField(null=True, unique=True))
    found = await columns(ddl)
    assert list(found) == ["id", "name", "size", "note", "level", "code"]
    assert (found["note"].nullable, found["level"].nullable) == (True, False)
    assert await rows(ddl, "SELECT level, note FROM ddl_one") == [(5, None), (5, None)]
    await ddl.drop_column("ddl_one", "size")
    await ddl.drop_column("ddl_one", "code")
    found = await columns(ddl)
    assert list(found) == ["id", "name", "note", "level"]
    assert found["id"].primary_key and not found["name"].nullable
    assert any(i.unique and i.columns == ("name",) for i in await ddl.get_indexes("ddl_one"))
    with pytest.raises(ProgrammingError, match="no column 'nothing' in table 'ddl_one'"):
        await ddl.drop_column("ddl_one", "nothing")


@isolate_apps("tests")
async def test_add_a_column_that_the_model_declares(ddl: DDLSession) -> None:
    class One(models.Model):
        name = models.CharField(max_length=20)
        level = models.IntegerField(default=7)
        author = models.ForeignKey(Author, models.CASCADE, null=True)

        class Meta:
            app_label = "tests"
            db_table = "ddl_one"

    await make_one(ddl)
    await ddl.add_column(One, "level")
    await ddl.add_column(One, table(One).get_column("author"))
    assert list(await columns(ddl)) == ["id", "name", "size", "level", "author_id"]
    assert await rows(ddl, "SELECT level, author_id FROM ddl_one") == [(7, None), (7, None)]
    assert any(i.foreign_key == ("tests_author", "id") for i in await ddl.get_indexes(One))
    with pytest.raises(TypeError, match="has no field; give one"):
        await ddl.add_column("ddl_one", "level")


async def test_alter_the_type_of_a_column(ddl: DDLSession) -> None:
    await make_one(ddl)
    await ddl.alter_column_type("ddl_one", "size", models.CharField(max_length=30, null=True))
    found = await columns(ddl)
    assert found["size"].type == "CharField" and found["size"].nullable
    assert await rows(ddl, "SELECT size FROM ddl_one ORDER BY id") == [("1",), (None,)]
    assert found["id"].primary_key
    assert any(i.unique and i.columns == ("name",) for i in await ddl.get_indexes("ddl_one"))


async def test_indexes(ddl: DDLSession) -> None:
    await make_one(ddl)
    await ddl.create_index("ddl_one", "ddl_size", "size", "name")
    await ddl.create_index("ddl_one", "ddl_size", "size", if_not_exists=True)
    await ddl.create_index("ddl_one", "ddl_once", "size", "name", unique=True)
    found = {i.name: i for i in await ddl.get_indexes("ddl_one")}
    assert (found["ddl_size"].columns, found["ddl_size"].unique) == (("size", "name"), False)
    unique = [i.columns for i in found.values() if i.unique and not i.primary_key]
    assert ("size", "name") in unique and ("name",) in unique
    (by_name,) = [i.name for i in found.values() if i.unique and i.columns == ("name",)][:1]
    await ddl.drop_index("ddl_one", by_name)
    await ddl.execute("INSERT INTO ddl_one (name, size) VALUES ('a', 9)")
    await ddl.drop_column("ddl_one", "size")
    assert list(await columns(ddl)) == ["id", "name"]
    left = [i for i in await ddl.get_indexes("ddl_one") if not i.primary_key]
    assert not any(i.unique or "size" in i.columns for i in left)
    await ddl.create_index("ddl_one", "ddl_name", "name")
    await ddl.drop_index("ddl_one", "ddl_name")
    assert "ddl_name" not in {i.name for i in await ddl.get_indexes("ddl_one")}
    with pytest.raises(ProgrammingError, match="no index 'nothing' on 'ddl_one'"):
        await ddl.drop_index("ddl_one", "nothing")


async def test_foreign_keys_are_real(ddl: DDLSession) -> None:
    """asyncqlio collected them and sent none."""
    await make_one(ddl)
    await ddl.create_table(
        "ddl_two",
        id=models.BigAutoField(primary_key=True),
        one=models.BigIntegerField(null=True),
    )
    await ddl.add_foreign_key("ddl_two", "one", "ddl_one", "id")
    keys = [i.foreign_key for i in await ddl.get_indexes("ddl_two") if i.foreign_key]
    assert keys == [("ddl_one", "id")]
    await ddl.execute("INSERT INTO ddl_two (one) VALUES (1)")
    await ddl.commit()
    with pytest.raises(IntegrityError):
        await ddl.execute("INSERT INTO ddl_two (one) VALUES (999)")
        await ddl.commit()


async def test_all_columns_and_indexes(ddl: DDLSession) -> None:
    everything = await ddl.get_columns()
    assert {"tests_book", "tests_author"} <= {info.table for info in everything}
    title = next(i for i in everything if (i.table, i.name) == ("tests_book", "title"))
    assert (title.type, title.nullable) == ("CharField", False)
    keys = {i.foreign_key for i in await ddl.get_indexes() if i.table == "tests_book"}
    assert ("tests_author", "id") in keys
    assert (await ddl.get_columns(Book))[0].name == "id"


async def test_changes_roll_back_together_where_the_database_can(alias: str) -> None:
    """With a transaction of their own, as it is about that."""
    db = databases[alias]
    with pytest.raises(ZeroDivisionError):
        async with db.get_ddl_session() as ddl:
            await make_one(ddl)
            assert repr(ddl).startswith(f"<DDLSession {alias!r}")
            raise ZeroDivisionError
    async with db.get_ddl_session() as ddl:
        assert ("ddl_one" in await ddl.get_tables()) is not rolls_back(alias)
        await ddl.drop_table("ddl_one")
    await db.close()
