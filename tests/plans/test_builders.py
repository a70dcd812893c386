"""Generated code: what it costs and what it is given; no database is asked."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import pytest
from django.db import connections
from django.db.models import QuerySet

from django_asyncsession.orm import snapshots
from django_asyncsession.plans import builders, encoders, operands
from django_asyncsession.plans.builders import Built, converter, instances
from django_asyncsession.plans.compare import built_by_django, compiled, difference
from django_asyncsession.plans.plan import Compiled, Ending, Plan, make_plan
from tests.models import Book, User

MOMENT = datetime(2024, 1, 1, tzinfo=UTC)


def of(queryset: QuerySet[Any], alias: str = "default") -> tuple[Compiled, Built]:
    """A query that is compiled, and what builds its rows."""
    django = compiled(queryset.using(alias), Ending(), connections[alias])
    return django, instances(django.compiler, snapshots.MARKS)


def user(at: int) -> tuple[Any, ...]:
    return 1000 + at, f"user {at}", 2000 + at, 3000 + at


def book(at: int) -> tuple[Any, ...]:
    return 1000 + at, f"book {at}", 5000 + at, None, Decimal(at), MOMENT


CASES: list[tuple[QuerySet[Any], Callable[[int], tuple[Any, ...]]]] = [
    (User.objects.all(), user),
    (Book.objects.all(), book),
    (Book.objects.select_related("author"), lambda n: (*book(n), 5000 + n, f"author {n}", None)),
]


def size_of(make: Callable[[], Any]) -> int:
    """Bytes that what is made takes."""
    tracemalloc.start()
    try:
        kept = make()
        size, _ = tracemalloc.get_traced_memory()
        assert len(kept) == 500
        return size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("queryset, row", CASES)
def test_a_row_is_no_larger_than_django_s(queryset: Any, row: Callable[[int], Any]) -> None:
    django, built = of(queryset)

    def by_django() -> Any:
        rows = built_by_django(django, [row(at) for at in range(500)])
        snapshots.remember(rows)
        return rows

    def by_plan() -> Any:
        return built.build([row(at) for at in range(500)], "default")

    assert difference(by_plan(), by_django()) is None
    assert size_of(by_plan) <= size_of(by_django)


def test_the_source_is_kept() -> None:
    _, built = of(User.objects.only("name"))
    assert "o0.name = v1" in built.source and "level" not in built.source
    assert built.models == (User,)


def test_converters_are_given_the_current_connection() -> None:
    django, built = of(Book.objects.all(), "sqlite")
    assert built.convert is not None
    seen = []

    class Watched:
        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            seen.append(name)
            return getattr(self._real, name)

    convert = converter(django.compiler)
    assert convert is not None
    given = (1, "x", 2, None, 1.5, "2024-01-01 00:00:00")
    (row,) = convert([given], Watched(connections["sqlite"]))
    assert row == (1, "x", 2, None, Decimal("1.50"), MOMENT)
    assert "ops" in seen


@pytest.mark.parametrize("alias", ["default", "sqlite", "mysql"])
def test_a_plan_keeps_no_connection(alias: str) -> None:
    connection = connections[alias]
    plan = make_plan(
        lambda values: compiled(Book.objects.filter(title=values[0]), Ending(), connection),
        [(str, 1)],
        Ending(),
        connection,
        snapshots.MARKS,
    )
    reached, left = set(), [plan.params, plan.convert, plan.build, plan.check, plan.encode]
    kinds = (dict, list, tuple, FunctionType, MethodType, Plan, CellType, partial)
    while left:
        found = left.pop()
        if id(found) not in reached and isinstance(found, kinds):
            reached.add(id(found))
            skipped = vars(builders), vars(operands), vars(encoders)
            left += [o for o in gc.get_referents(found) if not any(o is s for s in skipped)]
        assert found is not connection and found is not connection.ops
    assert len(reached) > 20


def test_without_converters_rows_stay_as_they_are() -> None:
    _, built = of(User.objects.all())
    assert built.convert is None
