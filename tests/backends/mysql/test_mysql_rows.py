"""Statements and rows of MySQL and MariaDB: parameters, errors, and values that Python has not. On
real connections, which are the point."""

from __future__ import annotations

import asyncio
import datetime
import decimal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asyncmy.constants import FIELD_TYPE
from django.conf import settings
from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    ProgrammingError,
    connections,
    models,
)
from django.db.backends.mysql import base

from django_asyncsession import Session
from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import interface, rows, sync
from tests.faults import FaultProxy, address
from tests.models import User

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


async def in_django(fn: Callable[[], Any]) -> Any:
    """What `fn` returns, or raises, with Django's own connection."""

    def call() -> Any:
        try:
            return fn()
        finally:
            connections["mysql"].close()

    return await asyncio.to_thread(call)


class Odd(models.Model):
    """The table of the test below, on the connection that it makes."""

    day = models.DateField(null=True)
    at = models.DateTimeField(null=True)
    lasts = models.TimeField(null=True)

    class Meta:
        app_label = "tests_mysql"
        db_table = "odd"
        managed = False


ODD = [
    ("day", "0000-00-00", "date"),
    ("day", "2020-00-10", "date"),
    ("at", "0000-00-00 00:00:00", "date"),
    ("lasts", "25:01:02", "time of day"),
    ("lasts", "-01:00:00", "time of day"),
    ("lasts", "838:59:59", "time of day"),
]


@pytest.fixture
def odd() -> Iterator[None]:
    """A table with a good row, and one for each value that Python has not."""
    sync("DROP TABLE IF EXISTS odd")
    sync("CREATE TABLE odd (id integer PRIMARY KEY, day date, at datetime, lasts time(6))")
    sync("INSERT INTO odd VALUES (0, '2020-01-02', '2020-01-02 03:04:05', '23:59:59.5')")
    mode = "sql_mode=''"
    for number, (column, value, _) in enumerate(ODD, 1):
        sync(
            f"SET STATEMENT {mode} FOR INSERT INTO odd (id, {column}) VALUES ({number}, '{value}')"
        )
    yield
    sync("DROP TABLE odd")


@pytest.mark.parametrize("number", range(1, len(ODD) + 1))
async def test_a_date_or_time_that_python_has_not_names_its_column(
    odd: None, one: DatabaseInterface, number: int
) -> None:
    """By get, select, raw SQL and streams; the connection stays, and so do good rows."""
    column, value, kind = ODD[number - 1]
    sql = f"SELECT id, {column} AS label FROM odd WHERE id IN (0, {number}) ORDER BY id"

    async def stream(rows: Any) -> list[Any]:
        return [row async for row in rows]

    reads: list[Callable[[Session], Any]] = [
        lambda s: s.get(Odd, number),
        lambda s: s.select(Odd).all(),
        lambda s: s.fetch_all(sql),
        lambda s: s.cursor(sql),
        lambda s: stream(s.stream(sql)),
        lambda s: stream(s.select(Odd).stream()),
        lambda s: s.run_sync(lambda: list(Odd.objects.using("mysql").raw("SELECT * FROM odd"))),
    ]
    text = rf"column '{column}' of table 'odd' holds .*, which is no {kind} in Python; .*CAST"
    async with one.get_session(autocommit=True) as session:
        for read in reads:
            with pytest.raises(DataError, match=r"of table 'odd' holds .*in Python; .*CAST"):
                await read(session)
        with pytest.raises(DataError, match=text):
            await session.fetch_all(sql)
        good = await session.get(Odd, 0)
        assert (str(good.day), str(good.lasts)) == ("2020-01-02", "23:59:59.500000")
        as_text = f"SELECT CAST({column} AS CHAR) FROM odd WHERE id = {number}"
        assert str(await session.fetch_value(as_text)).startswith(value)
    assert one.stats()["connections_num"] == 1


async def test_a_conversion_of_the_projects_own_is_asked_first(odd: None) -> None:
    own = {**base.django_conversions, FIELD_TYPE.DATE: str, FIELD_TYPE.TIME: str}
    db = interface(options={"conv": own})
    async with db.get_session() as session:
        values = await session.fetch_all(
            "SELECT day, lasts FROM odd WHERE id IN (1, 4) ORDER BY id"
        )
        assert [tuple(row) for row in values] == [("0000-00-00", None), (None, "25:01:02.000000")]
    await db.close()


async def test_keys_of_many_rows_come_back_from_one_insert(db: DatabaseInterface) -> None:
    try:
        async with db.get_session() as session:
            users = [User(name=f"u{n}") for n in range(5)]
            await session.run_sync(User.objects.using("mysql").bulk_create, users)
            if db.features.can_return_rows_from_bulk_insert:
                assert len({u.pk for u in users}) == 5 and users[0].pk is not None
            one = await session.add(User(name="one"))
            assert await session.get(User, one.pk) is not None
    finally:
        sync("DELETE FROM tests_user")


async def test_execute_many_sends_many_in_one_packet(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
            before = proxy.round_trips
            count = await session.execute_many(
                "INSERT INTO t (n) VALUES (%s)", [[n] for n in range(500)]
            )
        assert count == 500 and len(rows()) == 500
        assert proxy.round_trips - before < 20
        with pytest.raises(IntegrityError):
            async with db.get_session() as session:
                await session.execute_many("INSERT INTO t (n) VALUES (%s)", [[1000], [7], [1001]])
        assert len(rows()) == 500
        await db.close()


async def test_an_error_of_a_later_statement_is_raised(db: DatabaseInterface) -> None:
    """Of several statements in one packet, what fails in a later one must not go unnoticed."""

    def both() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.executemany("INSERT INTO t (n) VALUES (%s)", [[1], [1]])

    with pytest.raises(IntegrityError):
        async with db.get_session() as session:
            await session.run_sync(both)
    assert rows() == []


async def test_sync_code_sends_one_statement_at_a_time(db: DatabaseInterface) -> None:
    def both() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (1); INSERT INTO t (n) VALUES (2)")

    with pytest.raises(ProgrammingError):
        async with db.get_session() as session:
            await session.run_sync(both)
    assert rows() == []


async def test_errors_are_those_of_djangos_driver(db: DatabaseInterface) -> None:
    statements = {
        "SELECT * FROM missing": DatabaseError,
        "SELEC 1": DatabaseError,
        "INSERT INTO t (id, n) VALUES (1, 1), (1, 2)": IntegrityError,
        "INSERT INTO t (n) VALUES ('x')": DatabaseError,
        "INSERT INTO t (n) VALUES (99999999999)": DataError,
        "SELECT count(*) FROM t WHERE n = (SELECT 1 UNION SELECT 2)": DatabaseError,
    }
    for sql, kind in statements.items():
        with pytest.raises(DatabaseError) as expected:
            await in_django(lambda sql=sql: connections["mysql"].cursor().execute(sql))  # type: ignore[misc]
        with pytest.raises(kind) as info:
            async with db.get_session() as session:
                await session.execute(sql)
        assert type(info.value) is type(expected.value)
        assert info.value.args == expected.value.args
        assert type(info.value.__cause__) is type(expected.value.__cause__)


async def test_text_that_the_character_set_cannot_hold_is_refused_before_it_is_sent(
    one: DatabaseInterface,
) -> None:
    async with one.get_session() as session:
        with pytest.raises(UnicodeEncodeError):
            await session.fetch_value("SELECT %s", ["\ud800"])
        with pytest.raises(UnicodeEncodeError):
            await session.fetch_value("SELECT %s", ["\udc80"])
        assert await session.fetch_value("SELECT %s", ["\U0001f600\x00"]) == "\U0001f600\x00"


async def test_parameters_are_quoted_by_their_type(db: DatabaseInterface) -> None:
    values: list[tuple[Any, Any]] = [
        (None, None),
        (True, 1),
        (7, 7),
        (2**63, 2**63),
        (1.5, 1.5),
        (decimal.Decimal("1.10"), decimal.Decimal("1.10")),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.timedelta(hours=30, microseconds=5), "30:00:00.000005"),
        ("a'b\\c\"%s", "a'b\\c\"%s"),
        (b"bytes'", "bytes'"),
        (bytearray(b"x"), "x"),
    ]
    async with db.get_session() as session:
        for value, expected in values:
            assert await session.fetch_value("SELECT %s", [value]) == expected
        value = bytes(range(256))
        assert await session.fetch_value("SELECT _binary %s", [value]) == value
        assert await session.fetch_value("SELECT 2 IN %s", [(1, 2)]) == 1
