"""Values come back from a session as they do from Django's sync ORM, on every database.

With real commits: what the pools' driver wrote, Django's own connection reads, and the other way
round.
"""

from __future__ import annotations

import asyncio
import datetime
import decimal
import enum
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, connections, models
from django.test import override_settings
from django.utils import timezone
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy

from django_asyncsession import DatabaseInterface, databases
from tests.faults import outcome_of
from tests.models import Values
from tests.names import name_of

EAST = datetime.timezone(datetime.timedelta(hours=5, minutes=30))


class Colour(models.TextChoices):
    RED = "red'ish"


class Size(enum.IntEnum):
    BIG = 7


VALUES: list[tuple[str, Any]] = [
    ("decimal", decimal.Decimal("12345678901234.567890")),
    ("decimal", decimal.Decimal("-0.000001")),
    ("decimal", decimal.Decimal("0")),
    ("date", datetime.date(1, 1, 1)),
    ("date", datetime.date(2024, 2, 29)),
    ("date", datetime.date(9999, 12, 31)),
    ("time", datetime.time(0, 0)),
    ("time", datetime.time(23, 59, 59, 999999)),
    ("moment", datetime.datetime(2024, 3, 31, 1, 30, 0, 123456, tzinfo=datetime.UTC)),
    ("moment", datetime.datetime(2024, 10, 27, 2, 30, tzinfo=EAST)),
    ("duration", datetime.timedelta(0)),
    ("duration", datetime.timedelta(days=-3, seconds=5, microseconds=7)),
    ("duration", datetime.timedelta(days=1000, microseconds=999999)),
    ("uid", uuid.UUID("12345678-1234-5678-1234-567812345678")),
    ("data", {"a": [1, 2.5, None, True, "é\U0001f600'\"\\"], "b": {"c": {}}}),
    ("data", []),
    ("data", "text"),
    ("data", 0),
    ("data", False),
    ("binary", b""),
    ("binary", bytes(range(256)) * 40),
    ("binary", memoryview(b"\x00'\\\"%s")),
    ("flag", True),
    ("flag", False),
    ("number", 0.1),
    ("number", -1.7976931348623157e308),
    ("number", 5e-320),
    ("big", 2**63 - 1),
    ("big", -(2**63)),
    ("big", Size.BIG),
    ("text", ""),
    ("text", "quotes ' \" ` \\ \\' %s %% %(a)s ; -- /* é \U0001f600 \n\r\t"),
    ("text", "x" * 100_000),
    ("text", Colour.RED),
    ("text", mark_safe("<b>'safe'</b>")),
    ("text", gettext_lazy("lazy 'text'")),
    *((field.name, None) for field in Values._meta.fields if field.name != "id"),
]


@pytest.fixture(autouse=True)
def empty_table(alias: str) -> Iterator[None]:
    yield
    Values.objects.using(alias).all().delete()


@pytest.fixture
async def db(alias: str) -> AsyncIterator[DatabaseInterface]:
    yield databases[alias]
    await databases[alias].close()


def write(alias: str, name: str, value: Any) -> int:
    return int(Values.objects.using(alias).create(**{name: value}).pk)


def read(alias: str, pk: int, name: str) -> list[Any]:
    """The value as an attribute, in `values_list()`, and found by a filter with the same value."""
    rows = Values.objects.using(alias)
    raw = rows.raw("SELECT * FROM tests_values WHERE id = %s", [pk])[0]
    return [getattr(rows.get(pk=pk), name), *rows.filter(pk=pk).values_list(name)[0], raw.data]


async def in_sync_code(alias: str, fn: Any, *args: Any) -> Any:
    """What Django's sync ORM returns, in a thread of its own."""

    def call() -> Any:
        try:
            return fn(*args)
        finally:
            connections[alias].close()

    return await asyncio.to_thread(call)


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("name, value", VALUES, ids=lambda value: name_of(value)[:20] or "empty")
async def test_a_value_round_trips_as_in_sync_code(
    db: DatabaseInterface, name: str, value: Any
) -> None:
    """Written by either, read by either: the same value of the same type."""
    async with db.get_session() as session:
        ours = await session.run_sync(write, db.alias, name, value)
    theirs = await in_sync_code(db.alias, write, db.alias, name, value)
    expected = await in_sync_code(db.alias, read, db.alias, theirs, name)
    assert same(await in_sync_code(db.alias, read, db.alias, ours, name), expected)
    async with db.get_session() as session:
        for pk in (ours, theirs):
            assert same(await session.run_sync(read, db.alias, pk, name), expected)
        if value is not None and name not in ("data", "number"):
            found = Values.objects.using(db.alias).filter(**{name: value}, pk=ours)
            assert await session.run_sync(found.exists)


WRONG: list[tuple[str, Any]] = [
    ("decimal", decimal.Decimal("NaN")),
    ("decimal", decimal.Decimal(10) ** 30),
    ("big", 2**63),
    ("text", "\x00"),
    ("text", "\ud800"),
    ("number", float("inf")),
    ("number", float("nan")),
    ("flag", "maybe"),
    ("date", "2024-02-30"),
    ("uid", "no uuid"),
]


@pytest.mark.parametrize("name, value", WRONG, ids=lambda value: name_of(value)[:20] or "empty")
async def test_a_value_that_cannot_be_saved_is_refused_as_in_sync_code(
    db: DatabaseInterface, name: str, value: Any
) -> None:
    async def ours() -> Any:
        async with db.get_session() as session:
            return await session.run_sync(write, db.alias, name, value)

    found = await outcome_of(ours())
    expected = await outcome_of(in_sync_code(db.alias, write, db.alias, name, value))
    assert isinstance(found, Exception) == isinstance(expected, Exception), (found, expected)
    if isinstance(expected, DatabaseError):
        assert type(found) is type(expected)
    elif isinstance(expected, Exception):
        assert isinstance(found, type(expected) | DatabaseError)
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT 1") == 1


async def test_moments_are_in_the_current_time_zone_as_in_sync_code(db: DatabaseInterface) -> None:
    moment = datetime.datetime(2024, 7, 1, 12, tzinfo=datetime.UTC)
    async with db.get_session() as session:
        pk = await session.run_sync(write, db.alias, "moment", moment)

    def parts() -> Any:
        rows = Values.objects.using(db.alias).filter(pk=pk)
        with timezone.override(EAST):
            return rows.values_list("moment__hour", "moment__minute", "moment__date").get()

    expected = await in_sync_code(db.alias, parts)
    if None in expected:
        pytest.skip("the server has no time zone definitions")
    async with db.get_session() as session:
        assert await session.run_sync(parts) == expected == (17, 30, moment.date())


async def test_without_time_zones_moments_are_naive_as_in_sync_code(alias: str) -> None:
    moment = datetime.datetime(2024, 3, 31, 2, 30, 0, 1)
    with override_settings(USE_TZ=False):
        db = databases[alias]
        await db.close()
        async with db.get_session() as session:
            pk = await session.run_sync(write, alias, "moment", moment)
            assert await session.run_sync(read, alias, pk, "moment") == [moment, moment, None]
        assert await in_sync_code(alias, read, alias, pk, "moment") == [moment, moment, None]
        await db.close()


async def test_many_values_and_aggregates_are_equal_to_those_of_sync_code(
    db: DatabaseInterface,
) -> None:
    def work() -> Any:
        rows = Values.objects.using(db.alias)
        rows.all().delete()
        rows.bulk_create(
            Values(big=n, decimal=decimal.Decimal(n) / 8, flag=n % 2 == 0, data={"n": n}, uid=None)
            for n in range(200)
        )
        rows.filter(flag=True).update(
            big=models.F("big") * 2, duration=datetime.timedelta(seconds=1)
        )
        return [
            rows.aggregate(
                total=models.Sum("big"),
                mean=models.Avg("decimal"),
                most=models.Max("duration"),
                count=models.Count("*"),
            ),
            list(
                rows.filter(data__n__gt=150).values_list("data__n", flat=True).order_by("data__n")
            ),
            list(rows.order_by("big", "flag").values_list("big", "decimal", "flag", "duration")),
        ]

    async with db.get_session() as session:
        found = await session.run_sync(work)
    assert found == await in_sync_code(db.alias, work)
