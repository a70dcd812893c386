"""Rows and result sets: values by name and position, fetched as asked, buffered or not.

On a real pool where the point is what goes back to it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from django_asyncsession import DatabaseInterface, Row, SessionClosedError
from django_asyncsession.results import BaseResultSet, MemoryCursor

ROW = Row(["id", "name", "id"], [1, "heck", 2])


class FakeCursor:
    """A cursor over three rows, which counts its calls."""

    lease: object = None

    def __init__(self, rows: int = 3, columns: tuple[str, ...] = ("n",)) -> None:
        self.db = SimpleNamespace(lease=None)
        self.description = [(name, None) for name in columns]
        self.rowcount = rows
        self.rows = [tuple([n] * len(columns)) for n in range(rows)]
        self.calls: list[tuple[Any, ...]] = []

    def fetchone(self) -> Any:
        self.calls.append(("fetchone",))
        return self.rows.pop(0) if self.rows else None

    def fetchmany(self, size: int) -> list[Any]:
        self.calls.append(("fetchmany", size))
        chunk, self.rows = self.rows[:size], self.rows[size:]
        return chunk

    def fetchall(self) -> list[Any]:
        self.calls.append(("fetchall",))
        return self.fetchmany(len(self.rows))

    def close(self) -> None:
        self.calls.append(("close",))


async def call(fn: Callable[..., Any], /, *args: Any) -> Any:
    return fn(*args)


async def refuse(fn: Callable[..., Any], /, *args: Any) -> Any:
    raise AssertionError("buffered rows need no I/O")


def result_of(cursor: Any, *, buffered: bool = False, **options: Any) -> BaseResultSet:
    return BaseResultSet(cursor, refuse if buffered else call, buffered=buffered, **options)


# Row


def test_a_row_gives_its_values_by_name_position_and_attribute() -> None:
    assert (ROW["name"], ROW[1], ROW.name, ROW[-1], ROW[0:2]) == (
        "heck",
        "heck",
        "heck",
        2,
        (1, "heck"),
    )


def test_columns_of_the_same_name_keep_all_their_values() -> None:
    assert ROW["id"] == 1
    assert list(ROW.values()) == list(ROW) == [1, "heck", 2]
    assert ROW.keys() == ["id", "name"]
    assert ROW.items() == [("id", 1), ("name", "heck")]
    assert len(ROW) == 3


def test_a_row_converts_to_a_dict_a_tuple_and_variables() -> None:
    assert dict(ROW) == {"id": 1, "name": "heck"}
    first, name, second = ROW
    assert (first, name, second) == tuple(ROW) == (1, "heck", 2)


def test_a_missing_column_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(KeyError, match="no column 'nope' in this row; it has \\['id', 'name'\\]"):
        ROW["nope"]
    with pytest.raises(AttributeError, match="no column 'nope'"):
        ROW.nope  # noqa: B018
    with pytest.raises(IndexError):
        ROW[3]
    assert ROW.get("nope") is None
    assert ROW.get("nope", 5) == 5
    assert ROW.get("name") == "heck"
    assert not hasattr(ROW, "__array__")


def test_columns_named_as_methods_are_reached_by_name() -> None:
    row = Row(["keys", "values"], [1, 2])
    assert row["keys"] == 1
    assert list(row.values()) == [1, 2]


def test_a_row_is_read_only() -> None:
    with pytest.raises(AttributeError, match="read-only"):
        ROW.name = "x"
    with pytest.raises(TypeError):
        ROW["name"] = "x"  # type: ignore[index]


def test_rows_compare_and_hash_by_their_values() -> None:
    same = Row(["id", "name", "id"], [1, "heck", 2])
    assert same == ROW
    assert hash(ROW) == hash(same)
    assert ROW == (1, "heck", 2)
    assert Row(["id", "name", "x"], [1, "heck", 2]) != ROW
    assert ROW != [1, "heck", 2]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
def test_a_row_can_be_copied_and_pickled(duplicate: Callable[[Row], Row]) -> None:
    other = duplicate(ROW)
    assert other == ROW
    assert other.name == "heck"


def test_the_repr_shows_names_and_values() -> None:
    assert repr(ROW) == "<Row id=1, name='heck', ?=2>"


# Result sets, without a database


@pytest.mark.parametrize("buffered", [True, False])
async def test_rows_are_fetched_in_any_mixture_and_none_is_lost(buffered: bool) -> None:
    result = result_of(FakeCursor(8), buffered=buffered, chunk_size=3)
    first = await result.fetch_row()
    assert first is not None and first.n == 0
    assert (await result.__anext__())[0] == 1
    assert [row[0] for row in await result.fetch_many(3)] == [2, 3, 4]
    second = await result.fetch_row()
    assert second is not None and second[0] == 5
    assert [row[0] for row in await result.flatten()] == [6, 7]


async def test_iteration_fetches_chunk_by_chunk_and_closes_at_the_end() -> None:
    cursor = FakeCursor(5)
    result = result_of(cursor, chunk_size=2)
    assert [row[0] async for row in result] == [0, 1, 2, 3, 4]
    assert result.closed
    assert [c for c in cursor.calls if c[0] == "fetchmany"] == [("fetchmany", 2)] * 4
    assert cursor.calls[-1] == ("close",)
    assert [row async for row in result] == []


async def test_after_the_last_row_there_is_none_and_no_error() -> None:
    result = result_of(FakeCursor(1))
    assert await result.fetch_row() is not None
    assert await result.fetch_row() is None
    assert await result.fetch_many(5) == []
    assert await result.fetch_all() == []


async def test_a_statement_without_a_result_has_no_rows_and_no_keys() -> None:
    cursor = FakeCursor()
    cursor.description = None  # type: ignore[assignment]
    result = result_of(cursor)
    assert result.keys == []
    assert await result.fetch_row() is None
    assert await result.fetch_many(2) == []
    assert await result.flatten() == []
    assert not any(name.startswith("fetch") for name, *_ in cursor.calls)


@pytest.mark.parametrize("n", [0, -1])
async def test_fetch_many_refuses_a_number_below_one(n: int) -> None:
    with pytest.raises(ValueError, match=r"fetch_many\(.*\): give a number of rows above 0"):
        await result_of(FakeCursor()).fetch_many(n)


async def test_a_closed_result_set_says_so_and_closes_once() -> None:
    cursor = FakeCursor()
    released = []

    async def release() -> None:
        released.append(1)

    async with result_of(cursor, release=release) as result:
        pass
    await result.close()
    assert cursor.calls == [("close",)]
    assert released == [1]
    for fetch in (result.fetch_row(), result.fetch_many(1), result.flatten()):
        with pytest.raises(SessionClosedError, match="closed; run the statement again"):
            await fetch


async def test_rows_fetched_ahead_are_gone_once_it_is_closed() -> None:
    result = result_of(FakeCursor(5))
    await result.__anext__()
    await result.close()
    with pytest.raises(SessionClosedError):
        await result.fetch_row()


async def test_closing_does_not_touch_a_cursor_of_an_earlier_lease() -> None:
    cursor = FakeCursor()
    result = result_of(cursor)
    cursor.lease = object()
    await result.close()
    assert ("close",) not in cursor.calls


async def test_a_memory_cursor_keeps_the_rows_of_another() -> None:
    result = result_of(MemoryCursor(FakeCursor(3)), buffered=True)
    assert (result.rowcount, result.keys) == (3, ["n"])
    assert [row[0] for row in await result.flatten()] == [0, 1, 2]


# On servers


@pytest.mark.parametrize("autocommit", [False, True])
async def test_keys_and_rowcount_are_known_before_the_first_row(
    database: DatabaseInterface, autocommit: bool
) -> None:
    async with database.get_session(autocommit=autocommit) as session:
        result = await session.cursor("SELECT 1 AS a, 2 AS b, 3 AS a UNION ALL SELECT 4, 5, 6")
        assert result.keys == ["a", "b", "a"]
        rows = await result.flatten()
        assert sorted(tuple(row) for row in rows) == [(1, 2, 3), (4, 5, 6)]
        assert dict(rows[0]).keys() == {"a", "b"}


async def test_no_row_at_all(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        result = await session.cursor("SELECT id FROM tests_user")
        assert result.keys == ["id"]
        assert await result.fetch_row() is None
        assert [row async for row in result] == []
        assert await session.fetch("SELECT id FROM tests_user") is None
        assert await session.fetch_value("SELECT id FROM tests_user") is None
        assert await session.fetch_all("SELECT id FROM tests_user") == []


async def test_a_cursor_used_after_its_session_is_refused(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        result = await session.cursor("SELECT 1 UNION ALL SELECT 2")
        await result.fetch_row()
    with pytest.raises(SessionClosedError):
        await result.fetch_row()
    await result.close()


async def test_in_autocommit_mode_rows_are_read_after_the_connection_went_back(
    real_database: DatabaseInterface,
) -> None:
    """On a real pool, as it is about a connection that goes back to it."""
    session = await real_database.get_session(autocommit=True).begin()
    result = await session.cursor("SELECT 1 AS n UNION ALL SELECT 2 ORDER BY 1")
    assert real_database.stats()["pool_available"] == real_database.stats()["pool_size"]
    await session.close()
    assert [row.n async for row in result] == [1, 2]
