"""What plans give is what plain Django gives: the same rows, down to the order of their attributes,
their state and their pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.core.files.base import ContentFile
from django.db.models import F, Model, Q, QuerySet
from django.test import override_settings

from django_asyncsession import Session, databases, table
from django_asyncsession.orm import snapshots
from django_asyncsession.plans import cache
from django_asyncsession.plans.compare import difference
from tests.models import (
    Author,
    Book,
    Box,
    Hero,
    Line,
    Member,
    Place,
    Profile,
    Restaurant,
    Shelf,
    Tag,
    Upload,
    User,
    Values,
    Wrapped,
)

books, users, values = table(Book), table(User), table(Values)
MOMENT = datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=UTC)
UID = UUID(int=7)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test learns its own plans."""
    cache.clear_all()
    yield
    cache.clear_all()


def fill(using: str) -> None:
    """Rows of each kind of model, with and without what may be missing."""
    ann, bea = (Author.objects.using(using).create(name=n, born=b) for n, b in PEOPLE)
    for at in range(6):
        book = Book.objects.using(using).create(
            title=f"b%{at}_", author=[ann, bea][at % 2], editor=[None, bea, ann][at % 3], price=at
        )
        book.tags.create(name=f"t{at % 2}")
    owner = User.objects.using(using).create(name="own\\er", level=2, xp=5)
    User.objects.using(using).create(name="other")
    Profile.objects.using(using).create(user=owner, bio="long")
    Tag.objects.using(using).create(name="red", owner=owner)
    Place.objects.using(using).create(name="square")
    Restaurant.objects.using(using).create(name="inn", stars=3)
    Line.objects.using(using).create(order=1, number=2, text="x")
    Box.objects.using(using).create(width=2)
    Member.objects.using(using).create(email="a@b", club="c", name="n")
    shelf = Shelf.objects.using(using).create(name="top")
    Shelf.objects.using(using).create(name="under", parent=shelf)
    Upload.objects.using(using).create(file=ContentFile(b"x", name="x.txt"))
    Upload.objects.using(using).create(file=None)
    for full in (True, False):
        given = VALUES if full else dict.fromkeys(VALUES)
        Values.objects.using(using).create(**given)
    Wrapped.objects.using(using).create(uid=UID, number=1, day=date(2024, 1, 1), ratio=0.5)


PEOPLE = [("ann", date(1990, 1, 2)), ("bea", None)]
VALUES: dict[str, Any] = {
    "decimal": Decimal("12.250000"),
    "date": date(2024, 2, 29),
    "time": time(12, 30, 15),
    "moment": MOMENT,
    "duration": timedelta(days=2, seconds=3),
    "uid": UID,
    "data": {"a": [1, None]},
    "binary": b"\0\1",
    "flag": True,
    "number": 2.5,
    "big": 2**62,
    "text": "a%c",
}

Case = tuple[Callable[[Any], Any], Callable[[Any], QuerySet[Any]]]


def same(model: type[Model], use: Callable[[Any], Any]) -> Case:
    """A query that is written in the same words here and there."""
    return lambda s: use(s.select(model)), lambda using: use(_Django(model.objects.using(using)))  # type: ignore[attr-defined]


class _Django:
    """A QuerySet under the names of our methods."""

    def __init__(self, queryset: Any) -> None:
        self.queryset = queryset

    def __getattr__(self, name: str) -> Any:
        method = getattr(
            self.queryset, {"where": "filter", "related": "select_related"}.get(name, name)
        )
        return lambda *args, **kwargs: _Django(method(*args, **kwargs))

    def __getitem__(self, part: slice) -> _Django:
        return _Django(self.queryset[part])


MODELS = (Author, Book, Box, Hero, Line, Member, Place, Profile, Restaurant, Shelf, Tag, Upload)
SERVED: dict[str, Case] = {
    **{f"all {m.__name__}": same(m, lambda q: q.order_by("pk")) for m in MODELS},
    "every type": same(Values, lambda q: q.order_by("pk")),
    "wrapped": same(Wrapped, lambda q: q),
    "nothing found": same(User, lambda q: q.where(level=77)),
    "text": same(Book, lambda q: q.where(title__contains="%", author__name="ann").order_by("-pk")),
    "ends": same(Book, lambda q: q.where(title__endswith="_", title__istartswith="B%")),
    "iexact": same(User, lambda q: q.where(name__iexact="OWN\\ER")),
    "regex": same(User, lambda q: q.where(name__regex="^o.+r$").order_by("id")),
    "list": same(Book, lambda q: q.where(price__in=[Decimal(1), Decimal(2), Decimal(5)])),
    "set": same(Book, lambda q: q.where(author__name__in={"ann", "x"}).order_by("id")),
    "range": same(Book, lambda q: q.where(price__range=(Decimal(1), Decimal(3))).order_by("id")),
    "null": same(Book, lambda q: q.where(editor=None).order_by("title")),
    "not null": same(Book, lambda q: q.where(editor__isnull=False).order_by("title")),
    "boolean": same(Member, lambda q: q.where(active=True)),
    "excluded": same(Book, lambda q: q.exclude(editor__name="ann").order_by("title")),
    "excluded of many": same(Book, lambda q: q.exclude(tags__name="t1").order_by("title")),
    "of many": same(Book, lambda q: q.where(tags__name="t1").order_by("title").distinct()),
    "or": same(Book, lambda q: q.where(Q(title="b%1_") | ~Q(price__lt=Decimal(4))).order_by("id")),
    "xor": same(Book, lambda q: q.where(Q(title="b%1_") ^ Q(price__gte=Decimal(1))).order_by("id")),
    "a page": same(Book, lambda q: q.order_by("author__name", "-title")[1:4]),
    "any order": same(Book, lambda q: q.order_by(F("title").desc(nulls_last=True), F("id"))),
    "related": same(Book, lambda q: q.related("author", "editor").order_by("id")),
    "nullable related": same(Tag, lambda q: q.related("owner").order_by("id")),
    "related of itself": same(Shelf, lambda q: q.related("parent__parent").order_by("id")),
    "one to one": same(Profile, lambda q: q.related("user")),
    "reverse one to one": same(User, lambda q: q.related("profile").order_by("id")),
    "both ways": same(Profile, lambda q: q.related("user__profile")),
    "child": same(Place, lambda q: q.related("restaurant").order_by("id")),
    "of the parent": same(Restaurant, lambda q: q.where(name="inn", stars__gte=1)),
    "parent": same(Restaurant, lambda q: q.related("place_ptr")),
    "only": same(Book, lambda q: q.only("title").order_by("id")),
    "only a key": same(Book, lambda q: q.only("author").order_by("id")),
    "only of related": same(
        Book, lambda q: q.related("author").only("title", "author__name").order_by("id")
    ),
    "defer": same(Book, lambda q: q.defer("title", "editor").order_by("id")),
    "defer of a parent": same(Restaurant, lambda q: q.defer("name")),
    "values": same(Book, lambda q: q.order_by("id").values("title", "price", "author__name")),
    "all values": same(Values, lambda q: q.order_by("id").values()),
    "tuples": same(Values, lambda q: q.order_by("id").values_list("decimal", "moment", "data")),
    "flat": same(Values, lambda q: q.order_by("id").values_list("uid", flat=True)),
    "named": same(Book, lambda q: q.order_by("id").values_list("title", "price", named=True)),
    **{
        f"by {name}": same(Values, lambda q, n=name: q.where(**{n: VALUES[n]}))
        for name in VALUES
        if name not in ("data", "binary", "flag")
    },
}


async def by_django(session: Session, case: Case) -> list[Any]:
    """What Django finds, as rows of the session."""

    def find() -> list[Any]:
        found: Any = case[1](session.alias)
        rows = list(found.queryset)
        snapshots.remember(rows)
        return rows

    return await session.run_sync(find)


@pytest.mark.parametrize("mode", [True, "compare"])
@pytest.mark.parametrize("name", SERVED)
async def test_rows_are_django_s(session: Session, name: str, mode: Any) -> None:
    await session.run_sync(fill, session.alias)
    case = SERVED[name]
    theirs = await by_django(session, case)
    with override_settings(ASYNC_SESSION={"PLANS": mode}):
        for _ in range(4):
            mine = list(await case[0](session))
            assert difference(mine, theirs) is None
            assert pickle.dumps(mine) == pickle.dumps(theirs)
        said = case[0](session).why()
    assert difference(copy.deepcopy(mine), copy.deepcopy(theirs)) is None
    assert said.startswith("Runs on a plan") and ("compared" in said) is (mode == "compare")
    assert mine or name == "nothing found"


async def test_a_row_that_was_got_is_django_s(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    for model in (*MODELS, Values):
        if model is Line:
            continue
        (row,) = await session.run_sync(lambda m: list(m.objects.using(session.alias)[:1]), model)
        for _ in range(4):
            mine = await session.get(model, row.pk)
            theirs = await by_django(session, same(model, lambda q, k=row.pk: q.where(pk=k)))
            assert difference([mine], theirs) is None
        assert await session.get(model, 987654) is None
        with pytest.raises(model.DoesNotExist, match="matching query does not exist"):
            await session.get_one(model, 987654)
        assert (await session.get_one(model, row.pk)).pk == row.pk
    stats = databases[session.alias].stats()
    assert stats["plan_hits"] > 0 and len(cache.of(session.alias)) >= len(MODELS)


async def test_what_is_counted_is_what_django_counts(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    hits = cache.of(session.alias).hits
    for least in (0, 2, 5, 99):
        query = session.select(Book).where(
            books.price >= Decimal(least), author__name__in=["ann", "bea"]
        )
        wanted = Book.objects.using(session.alias).filter(price__gte=least)
        assert await query.count() == await session.run_sync(wanted.count)
        assert await query.exists() is await session.run_sync(wanted.exists)
    assert cache.of(session.alias).hits == hits + 6


async def test_the_other_ends_of_a_query(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    for _ in range(4):
        query = session.select(User).where(users.level >= 1)
        first = await query.first()
        assert first is not None and first.name == "own\\er"
        assert (await query.order_by(users.name).first()).name == "other"
        assert (await query.where(name="other").one()).name == "other"
        assert await query.where(name="nobody").one_or_none() is None
        with pytest.raises(User.MultipleObjectsReturned):
            await query.one()
        with pytest.raises(User.DoesNotExist):
            await query.where(name="nobody").one()
        assert await query.order_by("name").columns("name", "level").scalar() == "other"
        rows = await query.order_by("name").columns(users.level, users.name)
        assert [list(row) for row in rows] == [[1, "other"], [2, "own\\er"]]
        assert rows[0].keys() == ["level", "name"]
        assert await query.order_by("name").values_list("name", flat=True).scalars() == [
            "other",
            "own\\er",
        ]
        assert [u.name for u in await query.order_by("name").limit(1).offset(1)] == ["own\\er"]
        assert await query.limit(1).count() == 1


async def test_rows_by_key_are_those_of_a_plan(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    expected = await session.run_sync(User.objects.using(session.alias).in_bulk)
    hits = cache.of(session.alias).hits
    for _ in range(4):
        query = session.select(User).where(users.level >= 1)
        found = await query.in_bulk([*expected, *expected, 987654])
        assert found == expected
        assert await query.where(name="other").in_bulk(list(expected)) == {
            pk: user for pk, user in expected.items() if user.name == "other"
        }
        assert await query.in_bulk([]) == {}
        assert await query.in_bulk() == expected
        with pytest.raises(TypeError):
            await query.limit(1).in_bulk(list(expected))
    assert cache.of(session.alias).hits == hits + 6


async def test_a_row_of_a_plan_is_written_as_any_other(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    for at in range(4):
        (row,) = await session.select(User).where(name="other")
        assert snapshots.changed(row) == []
        row.level = 10 + at
        assert snapshots.changed(row) == ["level"]
        await session.add(row)
        assert (await session.get_one(User, row.pk)).level == 10 + at
        (value,) = await session.select(Values).where(text="a%c")
        value.data["a"].append(at)
        assert snapshots.changed(value) == ["data"]


async def test_what_is_not_loaded_says_so(session: Session) -> None:
    from django_asyncsession import NotLoadedError

    await session.run_sync(fill, session.alias)
    for _ in range(4):
        row = (await session.select(Book).only("title").order_by("id"))[0]
        with pytest.raises(NotLoadedError, match="price"):
            _ = row.price
        await session.load(row, "price")
        assert row.price == 0 and snapshots.changed(row) == []


async def test_a_list_that_is_changed_afterwards_does_no_harm(session: Session) -> None:
    await session.run_sync(fill, session.alias)
    for _ in range(4):
        wanted = ["ann"]
        query = session.select(Author).where(name__in=wanted)
        wanted.append("bea")
        assert [a.name for a in await query] == ["ann"]
        assert [a.name for a in await session.run_sync(list, query.queryset)] == ["ann"]
