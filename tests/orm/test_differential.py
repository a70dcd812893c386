"""What columns and queries find is what plain Django finds, whatever is asked."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.db import OperationalError
from django.db.models import Count, F, Q, QuerySet
from django.test import override_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_asyncsession import Session, table
from tests.models import Author, Book, Tag, User, Values

docs, books, authors, tags = table(Values), table(Book), table(Author), table(Tag)

SAMPLES: dict[str, list[Any]] = {
    "decimal": [Decimal("-1.5"), Decimal(0), Decimal("12.25"), Decimal("99999999999999.000001")],
    "date": [date(1999, 12, 31), date(2024, 2, 29), date(2024, 3, 1)],
    "time": [time(0, 0), time(12, 30, 15), time(23, 59, 59)],
    "moment": [datetime(2024, 2, 29, 12, 30, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)],
    "duration": [timedelta(0), timedelta(days=2, seconds=3), timedelta(microseconds=5)],
    "uid": [uuid.UUID(int=1), uuid.UUID(int=2**127)],
    "flag": [True, False],
    "number": [-1.5, 0.0, 2.5],
    "big": [-(2**62), 0, 7, 2**62],
    "text": ["", "abc", "ABC", "a%c", "a_c", "a\\c", "it's", "élan", "a b"],
    "data": [{"a": 1, "b": {"c": [1, 2]}}, {"a": None}, [1, "x"], "text", 5, {"a": "1"}],
}
PLAIN = [name for name in SAMPLES if name not in ("data",)]
ORDERED = [name for name in PLAIN if name not in ("uid", "flag")]

Pair = tuple[Any, Q]


@pytest.fixture(autouse=True, params=[True, False, "compare"], ids=["plans", "django", "compared"])
def plans(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same holds on plans, without them, and with each compared with Django's compiler."""
    with override_settings(ASYNC_SESSION={"PLANS": request.param}):
        yield


def rows() -> Iterator[Values]:
    """Rows in which each sample comes at least twice, and NULL in every column."""
    for i in range(max(map(len, SAMPLES.values())) + 2):
        picked = {name: values[i % len(values)] for name, values in SAMPLES.items()}
        yield Values(**picked)
        yield Values(**dict.fromkeys((*SAMPLES, "uid")))
        yield Values(**{name: v for j, (name, v) in enumerate(picked.items()) if (i + j) % 3})


@pytest.fixture
async def values(session: Session) -> Session:
    await session.insert.rows(*rows())
    return session


def comparisons(name: str, samples: list[Any]) -> Iterator[Pair]:
    """Each operator of a column beside the lookup of Django that it stands for."""
    column = docs.get_column(name)
    for value in samples:
        yield column == value, Q(**{name: value})
        yield column != value, ~Q(**{name: value})
        if name in ORDERED:
            yield column < value, Q(**{f"{name}__lt": value})
            yield column <= value, Q(**{f"{name}__lte": value})
            yield column > value, Q(**{f"{name}__gt": value})
            yield column >= value, Q(**{f"{name}__gte": value})
    yield column == None, Q(**{f"{name}__isnull": True})  # noqa: E711
    yield column != None, Q(**{f"{name}__isnull": False})  # noqa: E711
    yield column.is_null(), Q(**{f"{name}__isnull": True})
    if name != "data":
        some = [*samples[:2], None]
        yield column.in_(some), Q(**{f"{name}__in": some})
        yield column.not_in(samples[:2]), ~Q(**{f"{name}__in": samples[:2]})
        yield column == column, Q(**{name: F(name)})
    if name in ORDERED:
        low, high = sorted(samples)[:2]
        yield column.between(low, high), Q(**{f"{name}__range": (low, high)})


def text_searches() -> Iterator[Pair]:
    """The operators of text."""
    for value in ("a", "C", "%", "_", "\\", "'", "é", ""):
        for operator in ("contains", "icontains", "startswith", "istartswith", "endswith"):
            yield getattr(docs.text, operator)(value), Q(**{f"text__{operator}": value})
        yield docs.text.iendswith(value), Q(text__iendswith=value)
    yield docs.text.regex("^a.c$"), Q(text__regex="^a.c$")
    yield docs.text.iregex("^a.c$"), Q(text__iregex="^a.c$")


def json_paths() -> Iterator[Pair]:
    """Places inside a JSON column."""
    yield docs.data["a"] == 1, Q(data__a=1)
    yield docs.data["a"] != 1, ~Q(data__a=1)
    yield docs.data["a"] == None, Q(data__a=None)  # noqa: E711
    yield docs.data["a"].is_null(), Q(data__a__isnull=True)
    yield docs.data["a"] > 0, Q(data__a__gt=0)
    yield docs.data["b"]["c"][1] == 2, Q(data__b__c__1=2)
    yield docs.data["b"]["c"].is_null(False), Q(data__b__c__isnull=False)
    yield docs.data["a"].in_([1, "1"]), Q(data__a__in=[1, "1"])
    yield docs.data["a"].icontains("1"), Q(data__a__icontains="1")
    yield docs.data[1] == "x", Q(data__1="x")
    yield docs.data.has_key("a"), Q(data__has_key="a")


def every_leaf() -> list[Pair]:
    """All conditions on one column."""
    found = [pair for name, samples in SAMPLES.items() for pair in comparisons(name, samples)]
    found += [*text_searches(), *json_paths()]
    found += [
        (docs.moment.year == 2024, Q(moment__year=2024)),
        (docs.date.month > 2, Q(date__month__gt=2)),
        (docs.time.hour.in_([0, 12]), Q(time__hour__in=[0, 12])),
        (docs.flag, Q(flag=True)),
        (docs.big < docs.number, Q(big__lt=F("number"))),
        (docs.number > docs.decimal - 1, Q(number__gt=F("decimal") - 1)),
    ]
    # A bare column as a condition is one once it is combined.
    return [(ours & Q() if ours is docs.flag else ours, q) for ours, q in found]


LEAVES = every_leaf()


async def found(session: Session, condition: Any) -> list[int]:
    """Keys of the rows that our condition finds."""
    query = session.select(Values).where(condition).order_by(docs.id)
    return [row.pk for row in await query]


async def found_by_django(session: Session, queryset: QuerySet[Any]) -> list[int]:
    """Keys of the rows that a QuerySet finds."""
    return await session.run_sync(lambda: [r.pk for r in queryset.using(session.alias)])


def test_there_are_enough_conditions() -> None:
    assert len(LEAVES) >= 200


async def test_every_operator_on_every_type(values: Session) -> None:
    for ours, django in LEAVES:
        expected = await found_by_django(values, Values.objects.filter(django).order_by("id"))
        assert await found(values, ours) == expected, str(ours)
        expected = await found_by_django(values, Values.objects.exclude(django).order_by("id"))
        assert await found(values, ~ours) == expected, f"not {ours}"


def combined(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    """Conditions made of conditions."""
    both = st.tuples(pairs, pairs)
    return st.one_of(
        both.map(lambda p: (p[0][0] & p[1][0], p[0][1] & p[1][1])),
        both.map(lambda p: (p[0][0] | p[1][0], p[0][1] | p[1][1])),
        both.map(lambda p: (p[0][0] ^ p[1][0], p[0][1] ^ p[1][1])),
        both.map(lambda p: (p[0][1] | p[1][0], p[0][1] | p[1][1])),
        pairs.map(lambda p: (~p[0], ~p[1])),
    )


trees = st.recursive(st.sampled_from(LEAVES), combined, max_leaves=5)
orders = st.lists(
    st.tuples(st.sampled_from(PLAIN), st.booleans(), st.sampled_from([None, "first", "last"])),
    max_size=3,
)
slices = st.tuples(st.integers(0, 20), st.none() | st.integers(0, 20))
# The session of a test is as good for the second example as for the first: nothing is written.
many = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many
@given(pair=trees, order=orders, part=slices)
async def test_any_query(values: Session, pair: Pair, order: Any, part: Any) -> None:
    ours, django = pair
    mine, theirs = [], []
    for name, down, nulls in order:
        options = {f"nulls_{nulls}": True} if nulls else {}
        column = docs.get_column(name)
        mine.append(column.desc(**options) if down else column.asc(**options))
        theirs.append(F(name).desc(**options) if down else F(name).asc(**options))
    start, size = part
    stop = None if size is None else start + size
    query = values.select(Values).order_by(*mine, docs.id)[start:stop].where(ours)
    queryset = Values.objects.filter(django).order_by(*theirs, "id")[start:stop]
    expected = await found_by_django(values, queryset)
    assert [row.pk for row in await query] == expected
    assert await query.count() == len(expected)
    assert [r[0] for r in await query.columns("id")] == expected


@pytest.fixture
async def library(session: Session) -> Session:
    people = await session.insert.rows(*(Author(name=f"a{i}") for i in range(4)))
    owners = await session.insert.rows(User(name="x", xp=1), User(name="y"))
    labels = await session.insert.rows(
        *(Tag(name=f"t{i % 3}", owner=[*owners, None][i % 3]) for i in range(5))
    )
    written = await session.insert.rows(
        *(
            Book(title=f"b{i}", author=people[i % 4], editor=[None, *people][i % 5], price=i)
            for i in range(12)
        )
    )
    for i, book in enumerate(written):
        await session.related(book).tags.set(labels[i % 4 : i % 4 + i % 3])
    return session


RELATED: list[Pair] = [
    (books.author.name == "a1", Q(author__name="a1")),
    (books.author.name != "a1", ~Q(author__name="a1")),
    (books.editor.name != "a1", ~Q(editor__name="a1")),
    (books.editor == None, Q(editor__isnull=True)),  # noqa: E711
    (books.editor.name == None, Q(editor__name__isnull=True)),  # noqa: E711
    (books.editor.name.in_(["a1", "a2"]), Q(editor__name__in=["a1", "a2"])),
    (books.editor.name.not_in(["a1", "a2"]), ~Q(editor__name__in=["a1", "a2"])),
    (books.author == books.editor, Q(author=F("editor"))),
    (books.tags.name == "t1", Q(tags__name="t1")),
    (books.tags.name != "t1", ~Q(tags__name="t1")),
    (books.tags.name > "t1", Q(tags__name__gt="t1")),
    (books.tags == None, Q(tags__isnull=True)),  # noqa: E711
    (books.tags.owner.xp == 1, Q(tags__owner__xp=1)),
    (books.tags.owner.xp != 1, ~Q(tags__owner__xp=1)),
    (books.tags.owner == None, Q(tags__owner__isnull=True)),  # noqa: E711
    (books.author.books.price > 8, Q(author__books__price__gt=8)),
    (books.author.edited.title == "b3", Q(author__edited__title="b3")),
    (books.author.edited.title != "b3", ~Q(author__edited__title="b3")),
    (books.price > books.author_id, Q(price__gt=F("author_id"))),
]


@many
@given(pair=st.recursive(st.sampled_from(RELATED), combined, max_leaves=4), unique=st.booleans())
async def test_any_query_over_relations(library: Session, pair: Pair, unique: bool) -> None:
    ours, django = pair
    query = library.select(Book).where(ours).order_by(books.id)
    queryset = Book.objects.filter(django).order_by("id")
    if unique:
        query, queryset = query.distinct(), queryset.distinct()
    expected = await found_by_django(library, queryset)
    assert [row.pk for row in await query] == expected
    excluded = Book.objects.exclude(django).order_by("id")
    assert [r.pk for r in await library.select(Book).exclude(ours).order_by("id")] == (
        await found_by_django(library, excluded)
    )


@many
@given(pair=st.sampled_from(RELATED))
async def test_groups_are_django_s(library: Session, pair: Pair) -> None:
    ours, django = pair
    grouped = (
        library.select(Book)
        .where(ours)
        .group_by(books.author.name)
        .annotate(n=Count("id"))
        .having(n__gt=1)
        .order_by("author__name")
    )
    plain = (
        Book.objects.using(library.alias)
        .filter(django)
        .values("author__name")
        .annotate(n=Count("id"))
        .filter(n__gt=1)
        .order_by("author__name")
    )
    assert [dict(row.items()) for row in await grouped] == await library.run_sync(list, plain)


async def undone(session: Session, change: Callable[[], Awaitable[int]]) -> Any:
    """How many rows a change finds, or the error of the database; it is rolled back."""
    try:
        async with session.begin_nested() as savepoint:
            found = await change()
            await savepoint.rollback()
            return found
    except OperationalError as error:
        # MariaDB compares less in a statement that writes than in one that reads.
        return error.args


@many
@given(pair=trees)
async def test_update_and_delete_find_the_same_rows(values: Session, pair: Pair) -> None:
    ours, django = pair
    plain = Values.objects.using(values.alias).filter(django)
    expected = await undone(values, lambda: values.run_sync(plain.update, number=1.25))
    update = values.update(Values).where(ours).set(docs.number, 1.25)
    assert await undone(values, update.run) == expected
    expected = await undone(values, lambda: values.run_sync(lambda: plain.all().delete()[0]))
    assert await undone(values, values.delete(Values).where(ours).run) == expected


def is_like(pattern: str, text: str) -> bool:
    """LIKE as SQL defines it, with a backslash as the escape character."""
    parts, escaped = [], False
    for char in pattern:
        if escaped or char not in "%_\\":
            parts.append(re.escape(char))
            escaped = False
        elif char == "\\":
            escaped = True
        else:
            parts.append(".*" if char == "%" else ".")
    if escaped:
        parts.append(re.escape("\\"))
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


texts = st.text(st.sampled_from("aAbB%_\\'\"x1é"), max_size=6)
lower: Callable[[str], str] = str.lower


@many
@given(pattern=texts, stored=st.lists(texts, min_size=1, max_size=8))
async def test_like_is_sql_s_like_on_every_database(
    session: Session, pattern: str, stored: list[str]
) -> None:
    await session.delete(Values).all_rows()
    await session.insert.rows(*(Values(text=text) for text in stored))
    matching = session.select(Values).where(docs.text.like(pattern)).columns("text")
    ascii_only = session.alias == "sqlite"
    fold = lower if ascii_only else str
    assert sorted(await matching.scalars()) == sorted(
        text for text in stored if is_like(fold(pattern), fold(text))
    )
    any_case = session.select(Values).where(docs.text.ilike(pattern)).columns("text")
    assert sorted(await any_case.scalars()) == sorted(
        text for text in stored if is_like(lower(pattern), lower(text))
    )
