"""Ordinary queries of Django's are recognised by their structure, and run on the same plans."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from django.db import connections
from django.db.models import Count, Exists, F, OuterRef, Prefetch, Q, QuerySet
from django.db.models.functions import Lower

from django_asyncsession import Session
from django_asyncsession.orm import snapshots
from django_asyncsession.plans.compare import difference, difference_of_texts
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.keys import compiled_with, structure_of, with_values
from django_asyncsession.plans.plan import COUNT, Ending, Plan, compiled, make_plan
from django_asyncsession.plans.probes import refilled
from django_asyncsession.plans.shapes import is_padded
from tests.models import Author, Book, Line, Place, Restaurant, Tag, User

Use = Callable[[int], QuerySet[Any]]

#: Queries with a number in them.
SERVED: dict[str, Use] = {
    "get": lambda n: User.objects.filter(pk=n).order_by()[:21],
    "all": lambda n: User.objects.all(),
    "text": lambda n: Book.objects.filter(title__contains=f"b{n}", author__name=f"a{n}"),
    "or": lambda n: User.objects.filter(Q(level=n) | ~Q(name=f"u{n}", xp=n + 1)),
    "list": lambda n: User.objects.filter(level__in=[n, n + 1, n + 2]),
    "range": lambda n: Book.objects.filter(price__range=(Decimal(n), Decimal(n + 1))),
    "null": lambda n: Book.objects.filter(editor__isnull=True, price__gt=Decimal(n)),
    "dates": lambda n: Author.objects.filter(born__lte=date(1990, 1, n + 1)),
    "order": lambda n: User.objects.filter(level=n).order_by("-name", F("xp").desc()),
    "related": lambda n: Book.objects.select_related("author", "editor").filter(author=n),
    "child": lambda n: Restaurant.objects.filter(stars=n, name="x"),
    "parent": lambda n: Place.objects.select_related("restaurant").filter(pk=n),
    "only": lambda n: Book.objects.only("title").filter(pk=n),
    "defer": lambda n: Book.objects.defer("title").filter(pk=n),
    "values": lambda n: Book.objects.filter(author__name=f"a{n}").values("title", "author__name"),
    "tuples": lambda n: Book.objects.filter(pk__gte=n).values_list("pk", "title"),
    "flat": lambda n: Book.objects.filter(pk__gte=n).values_list("pk", flat=True),
    "distinct": lambda n: Tag.objects.filter(books__price=Decimal(n)).distinct(),
    "slice": lambda n: User.objects.filter(level=n)[2:5],
    "columns": lambda n: Book.objects.filter(author_id=F("editor_id"), price=Decimal(n)),
}


def plan_of(queryset: QuerySet[Any], connection: Any) -> Plan:
    """The plan of a query's structure."""
    structure = structure_of(queryset.query)
    return make_plan(
        lambda values: compiled_with(queryset, values, Ending(), connection),
        structure.kinds,
        Ending(),
        connection,
        snapshots.MARKS,
    )


@pytest.mark.parametrize("name", SERVED)
def test_the_structure_is_the_same_whatever_the_values(name: str) -> None:
    first, second = (structure_of(SERVED[name](n).query) for n in (1, 2))
    assert first.key == second.key and hash(first.key) == hash(second.key)
    assert first.kinds == second.kinds
    assert len(first.values) == sum(count for _, count in first.kinds)
    assert name == "all" or first.values != second.values


def test_no_two_structures_are_the_same() -> None:
    assert len({structure_of(use(1).query).key for use in SERVED.values()}) == len(SERVED)
    # Only their rows are made in another way.
    assert structure_of(SERVED["tuples"](1).query).key != structure_of(SERVED["flat"](1).query).key


@pytest.mark.parametrize("name", SERVED)
def test_the_values_can_be_put_back(name: str) -> None:
    query = SERVED[name](1).query
    other = structure_of(SERVED[name](2).query)
    changed = structure_of(with_values(query, other.values))
    assert (changed.key, changed.values) == (other.key, other.values)
    assert structure_of(query).values == structure_of(SERVED[name](1).query).values


@pytest.mark.parametrize("name", SERVED)
async def test_a_plan_of_a_structure_sends_and_gives_what_django_does(
    session: Session, name: str
) -> None:
    def run() -> None:
        using = session.alias
        for at in (1, 2):
            author, _ = Author.objects.using(using).get_or_create(name=f"a{at}")
            Book.objects.using(using).create(title=f"b{at}", author=author, price=at)
            User.objects.using(using).create(name=f"u{at}", level=at)
        connection = connections[using]
        plan = plan_of(SERVED[name](1).using(using), connection)
        for n in (1, 2, 3):
            queryset = SERVED[name](n).using(using)
            structure = structure_of(queryset.query)
            values = structure.values
            meant = compiled(queryset, Ending(), connection)
            if is_padded(structure.kinds, values):
                values = tuple(refilled(structure.kinds, values))
                meant = compiled_with(queryset, values, Ending(), connection)
            assert difference_of_texts(plan, values, meant) is None
            with connection.cursor() as cursor:
                cursor.execute(plan.sql, plan.params(structure.values, connection))
                rows = plan.converted(cursor.fetchall(), connection)
            theirs: Any = list(queryset)
            snapshots.remember(theirs)
            assert difference(plan.build(rows, using), theirs) is None

    await session.run_sync(run)


REFUSED: list[tuple[str, Callable[[], QuerySet[Any]]]] = [
    ("expression", lambda: User.objects.annotate(n=Count("tags"))),
    ("expression", lambda: User.objects.filter(level__gt=F("xp") + 1)),
    ("expression", lambda: User.objects.order_by(Lower("name"))),
    ("expression", lambda: User.objects.filter(level__in=User.objects.values("xp"))),
    ("expression", lambda: User.objects.filter(Exists(Tag.objects.filter(owner=OuterRef("pk"))))),
    ("lookup", lambda: Author.objects.filter(born__year=1990)),
    ("list", lambda: User.objects.filter(level__in=[])),
    ("list", lambda: User.objects.filter(level__in=[1, None])),
    ("nul", lambda: User.objects.filter(name="a\0")),
    ("lookup", lambda: User.objects.extra(where=["1 = 1"])),
    ("query", lambda: User.objects.extra(select={"one": "1"})),
    ("query", lambda: User.objects.all().union(User.objects.all())),
    ("lookup", lambda: Line.objects.filter(pk=(1, 2))),
]


@pytest.mark.parametrize("reason, use", REFUSED)
def test_other_queries_have_no_structure(reason: str, use: Callable[[], QuerySet[Any]]) -> None:
    with pytest.raises(Fallback) as caught:
        structure_of(use().query)
    assert caught.value.reason == reason


def test_what_the_key_leaves_out_is_left_out_by_the_compiler() -> None:
    query = User.objects.prefetch_related(Prefetch("tags")).filter(level=1).query
    assert structure_of(query).key == structure_of(User.objects.filter(level=2).query).key
    assert structure_of(User.objects.filter(level=1).query).key != (
        structure_of(User.objects.filter(level=1).select_for_update().query).key
    )
    with pytest.raises(Fallback):
        compiled(User.objects.all()[:5], Ending(COUNT), connections["sqlite"])
