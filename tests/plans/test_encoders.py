"""Parameters in PostgreSQL's text format are to the server what the driver's are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.db import connections
from django.db.models import Q

from django_asyncsession import Session
from django_asyncsession.orm import planned
from django_asyncsession.plans import cache
from django_asyncsession.plans.encoders import constant_text
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import EXISTS, Ending, Plan, numbered
from tests.models import Book, User, Values

EAST = timezone(timedelta(hours=5, minutes=30))

#: A field, a lookup of it, and values.
VALUES: list[tuple[str, list[Any]]] = [
    ("big", [0, 1, -(2**63), 2**63 - 1]),
    ("big__gt", [0, -5]),
    ("big__in", [[1, 0, 3], [2**62]]),
    ("text", ["", "abc", "it's", "élan \U0001f600", "a\\b%c_d\n\t"]),
    ("text__contains", ["", "%", "_", "\\", "é", "a\\b%c_d"]),
    ("text__istartswith", ["A\\", "É"]),
    ("text__iexact", ["ABC", "a%c"]),
    ("text__regex", ["^a.*d", "é"]),
    ("text__in", [["abc", "", "it's"]]),
    ("decimal", [Decimal("0"), Decimal("-1.500000"), Decimal("1E+3"), Decimal("12.25")]),
    ("decimal__range", [(Decimal(0), Decimal("1E+3"))]),
    ("number", [0.1, -1.7976931348623157e308, 5e-320, 2.5, -0.0]),
    ("date", [date(1, 1, 1), date(2024, 2, 29), date(9999, 12, 31)]),
    ("time", [time(0, 0), time(23, 59, 59, 999999)]),
    ("moment", [datetime(2024, 3, 31, 1, 30, 0, 123456, tzinfo=UTC)]),
    (
        "moment__lte",
        [datetime(2024, 3, 31, 7, 0, 0, 123456, tzinfo=EAST), datetime.max.replace(tzinfo=UTC)],
    ),
    ("uid", [UUID(int=1), UUID(int=2**127)]),
]


@pytest.fixture
def alias() -> str:
    """The alias of PostgreSQL, which alone has this format."""
    return "default"


def plan_of(**lookups: Any) -> tuple[Plan, tuple[Any, ...]]:
    """The plan of a filter, and its values; called in the bridge."""
    recording = planned.begin(Values, "default").then("filter", (Q(flag=None),), lookups)
    recording = recording.at(("order_by", ("pk",)))
    entry = recording.learn(Ending())
    assert entry.plan is not None, entry.refusal
    return entry.plan, recording.slots


def found_by_text(plan: Plan, values: Sequence[Any]) -> list[int]:
    """Keys of the rows that the server finds when it is given texts."""
    pgconn = connections["default"].connection.pgconn
    result = pgconn.exec_params(plan.text, plan.encode(values))
    assert result.error_message == b"", result.error_message
    return [int(result.get_value(row, 0)) for row in range(result.ntuples)]


@pytest.mark.parametrize("name, samples", VALUES, ids=[name for name, _ in VALUES])
async def test_the_server_finds_the_same(session: Session, name: str, samples: list[Any]) -> None:
    def compare() -> None:
        cache.clear_all()
        field = name.partition("__")[0]
        for sample in samples:
            for value in sample if isinstance(sample, list | tuple) else (sample,):
                Values.objects.create(**{field: value})
        Values.objects.create()
        seen = 0
        for sample in samples:
            plan, values = plan_of(**{name: sample})
            expected = Values.objects.filter(**{name: sample}).order_by("pk")
            keys = [row.pk for row in expected]
            assert found_by_text(plan, values) == keys
            seen += len(keys)
        assert seen

    await session.run_sync(compare)


async def test_a_constant_has_a_text(session: Session) -> None:
    def run() -> None:
        entry = planned.begin(User, "default").then("filter", (), {"level": 1})
        plan = entry.learn(Ending(EXISTS)).plan
        assert plan is not None
        assert plan.encode([5]) == [b"1", b"5"]

    await session.run_sync(run)
    assert [
        encode(None) for encode in map(constant_text, (True, False, None, 7, "x")) if encode
    ] == [
        b"t",
        b"f",
        None,
        b"7",
        b"x",
    ]
    assert constant_text(object()) is None


async def test_what_has_no_such_text_is_refused(session: Session) -> None:
    def run() -> None:
        plan, _ = plan_of(duration=timedelta(1))
        with pytest.raises(Fallback, match="no text"):
            plan.encode([timedelta(2)])
        plan, _ = plan_of(text="x")
        for value, reason in [("a\0", "nul"), ("\ud800", "nul"), (1, "value_type")]:
            with pytest.raises(Fallback) as caught:
                plan.encode([value])
            assert caught.value.reason == reason
        plan, _ = plan_of(big=1)
        for number, reason in [(2**63, "out_of_range"), (True, "value_type")]:
            with pytest.raises(Fallback) as caught:
                plan.encode([number])
            assert caught.value.reason == reason
        plan, _ = plan_of(decimal=Decimal(1))
        with pytest.raises(Fallback, match="infinite"):
            plan.encode([Decimal("NaN")])

    await session.run_sync(run)


async def test_only_numbers_of_the_column_are_encoded(session: Session) -> None:
    def run() -> None:
        entry = planned.begin(User, "default").then("filter", (), {"level": 1}).learn(Ending())
        assert entry.plan is not None
        assert entry.plan.encode([2**31 - 1]) == [b"2147483647"]
        with pytest.raises(Fallback, match="out of the range"):
            entry.plan.encode([2**31])

    await session.run_sync(run)


async def test_joins_and_foreign_keys_have_texts(session: Session) -> None:
    def run() -> None:
        steps = {"author": 5, "editor__name__startswith": "x%"}
        entry = planned.begin(Book, "default").then("filter", (), steps).learn(Ending())
        assert entry.plan is not None
        assert entry.plan.encode([7, "a_"]) == [b"7", b"a\\_%"]

    await session.run_sync(run)


@pytest.mark.parametrize(
    "sql, text",
    [
        ("SELECT 1", b"SELECT 1"),
        ("a = %s AND b = %s", b"a = $1 AND b = $2"),
        ("a LIKE '%%s' AND b = %s", b"a LIKE '%s' AND b = $1"),
        ("%%%s", b"%$1"),
    ],
)
def test_markers_are_numbered(sql: str, text: bytes) -> None:
    assert numbered(sql) == text
