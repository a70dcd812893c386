"""What runs Django's own way, each for a reason with a name; the result is the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connections
from django.db.models import Count, F, Model, QuerySet, Value, signals
from django.db.models.functions import Lower
from django.db.models.sql.compiler import SQLCompiler
from django.test import override_settings
from django.test.utils import isolate_apps

from django_asyncsession import Session, databases, table
from django_asyncsession.orm import loading, snapshots
from django_asyncsession.plans import cache
from django_asyncsession.plans.builders import check_model
from django_asyncsession.plans.fallback import REASONS, Fallback
from django_asyncsession.plans.plan import Compiled, Ending, make_plan
from tests.models import Author, Book, Line, Shelf, Slug, Tag, User, Values, Wrapped

users, values = table(User), table(Values)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test learns its own plans."""
    cache.clear_all()
    yield
    cache.clear_all()


Query = Callable[[Session], Any]

#: Queries of which the shape, or a value, has no plan.
QUERIES: dict[str, Query] = {
    "source": lambda s: s.select(User.objects.filter(level=1)),
    "manager": lambda s: s.select(Slug).where(title="x"),
    "step": lambda s: s.select(User).annotate(n=Count("tags")),
    "expression": lambda s: s.select(User).where(level__gt=F("xp")),
    "value_type": lambda s: s.select(User).where(level="1"),
    "out_of_range": lambda s: s.select(User).where(level=2**70),
    "not_finite": lambda s: s.select(Values).where(number=float("inf")),
    "naive": lambda s: s.select(Values).where(time=datetime(1, 1, 1, tzinfo=UTC).timetz()),
    "list": lambda s: s.select(User).where(level__in=[]),
    "lookup": lambda s: s.select(Values).where(moment__year=2024),
    "field": lambda s: s.select(Wrapped).where(opaque="x"),
    "relation": lambda s: s.select(Shelf).where(notes__text="x"),
    "composite": lambda s: s.select(Line).values("pk"),
    "empty": lambda s: s.select(User).limit(0),
    "columns": lambda s: s.select(Tag).order_by("owner__name").distinct().values("name"),
}
# More of a reason, of which one is above.
MORE: list[tuple[str, Query]] = [
    ("source", lambda s: s.select(User.objects)),
    ("source", lambda s: s.select(s.select(User))),
    ("step", lambda s: s.select(User).prefetch("tags")),
    ("step", lambda s: s.select(User).for_update()),
    ("step", lambda s: s.select(Book).prefetch("author").related("author")),
    (
        "step",
        lambda s: (
            s.select(User).distinct("name") if s.alias == "default" else s.select(User).annotate()
        ),
    ),
    ("step", lambda s: s.select(User).union(s.select(User))),
    ("step", lambda s: s.select(Book).group_by("title")),
    ("expression", lambda s: s.select(User).order_by(Lower("name"))),
    ("expression", lambda s: s.select(User).where(users.level + 1 == 2)),
    ("expression", lambda s: s.select(User).columns(Lower("name"))),
    ("expression", lambda s: s.select(User).where(level=Value(1))),
    ("expression", lambda s: s.select(User).where(level__in=s.select(User).values("xp"))),
    ("value_type", lambda s: s.select(Values).where(decimal=5)),
    ("value_type", lambda s: s.select(User).where(level__contains="1")),
    ("lookup", lambda s: s.select(Values).where(data__a=1)),
    ("lookup", lambda s: s.select(Values).where(values.text.like("a%"))),
]


@pytest.mark.parametrize("reason", QUERIES)
async def test_a_query_falls_back_by_name(session: Session, reason: str) -> None:
    await falls_back(session, QUERIES[reason], reason)


@pytest.mark.parametrize("reason, query", MORE)
async def test_so_do_others(session: Session, reason: str, query: Query) -> None:
    await falls_back(session, query, reason)


async def falls_back(session: Session, query: Query, reason: str) -> None:
    """Assert that a query runs Django's way for this reason, and finds what that finds."""
    cached = cache.of(session.alias)
    before, hits = cached.fallbacks[reason], cached.hits
    runs = 0 if reason in NOT_RUN else 3
    for _ in range(runs):
        expected = await session.run_sync(lambda: list(query(session).queryset))
        assert len(await query(session)) == len(expected)
    assert cached.fallbacks[reason] >= before + runs - 1 and cached.hits == hits
    assert query(session).why() == f"Runs Django's way ({reason}): {REASONS[reason]}."
    if runs:
        stats = databases[session.alias].stats()
        assert stats[f"plan_fallbacks_{reason}"] == cached.fallbacks[reason]


#: Some databases refuse such values.
NOT_RUN = {"naive", "not_finite"}


# Those that are about more than the query


async def why(session: Session) -> str:
    """The name of the reason of a query that would run on a plan."""
    for _ in range(4):
        assert [user.level for user in await session.select(User).where(name="ann")] == [1]
    said = session.select(User).where(name="ann").why()
    return said.partition("(")[2].partition(")")[0] or said


@pytest.fixture
async def ann(session: Session) -> Session:
    await session.insert.rows(User(name="ann", level=1))
    return session


async def is_off(session: Session) -> str:
    with override_settings(ASYNC_SESSION={"PLANS": False}):
        return await why(session)


async def is_patched(session: Session) -> str:
    real = SQLCompiler.execute_sql
    seen = []

    def execute_sql(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SQLCompiler, "execute_sql", execute_sql)
        reason = await why(session)
    assert len(seen) == 4
    return reason


async def has_receivers(session: Session) -> str:
    made: list[Any] = []

    def receive(sender: Any, instance: Model, **kwargs: Any) -> None:
        made.append(instance)

    assert await why(session) == "Runs on a plan."
    signals.post_init.connect(receive, sender=User)
    try:
        reason = await why(session)
        assert (await session.get(User, made[0].pk)) is made[-1]
    finally:
        signals.post_init.disconnect(receive, sender=User)
    assert len(made) == 5
    return reason


async def is_of_another_database(session: Session) -> str:
    assert await why(session) == "Runs on a plan."
    (entry,) = cache.of(session.alias)._entries
    assert entry.plan is not None
    entry.plan.vendor = "oracle"
    before = cache.of(session.alias).fallbacks["database"]
    assert [user.level for user in await session.select(User).where(name="ann")] == [1]
    return "database" if cache.of(session.alias).fallbacks["database"] == before + 1 else ""


async def is_thrown_out(session: Session) -> str:
    await session.select(User).where(name="ann")
    (entry,) = cache.of(session.alias)._entries
    cache.of(session.alias).throw_out(entry, "a test")
    return await why(session)


async def could_not_be_made(session: Session) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "make_plan", lambda *args: 1 / 0)
        return await why(session)


async def counts_a_part(session: Session) -> str:
    query = session.select(User).order_by("id").limit(1)
    before = cache.of(session.alias).fallbacks["slice"]
    for _ in range(3):
        assert await query.count() == 1
        assert await session.select(User).distinct().count() == 1
    assert cache.of(session.alias).fallbacks["slice"] == before + 4
    return "slice"


async def has_half_a_character(session: Session) -> str:
    assert await why(session) == "Runs on a plan."
    said = session.select(User).where(name="a\0").why()
    return said.partition("(")[2].partition(")")[0]


ABOUT_MORE: dict[str, Callable[[Session], Awaitable[str]]] = {
    "off": is_off,
    "patched": is_patched,
    "signals": has_receivers,
    "database": is_of_another_database,
    "differs": is_thrown_out,
    "error": could_not_be_made,
    "slice": counts_a_part,
    "nul": has_half_a_character,
}


@pytest.mark.parametrize("reason", ABOUT_MORE)
async def test_what_is_about_more_than_the_query_falls_back_by_name(
    ann: Session, reason: str
) -> None:
    assert await ABOUT_MORE[reason](ann) == reason


# Those of making a plan, which no query of a session brings about by itself


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(Fallback) as caught:
        make()
    return caught.value.reason


def plan_of(*texts: tuple[str, tuple[Any, ...]], **lookups: Any) -> object:
    """The plan of a filter of users whose compiler writes these texts."""
    connection, left = connections["sqlite"], list(texts)

    def compile_with(given: Any) -> Compiled:
        queryset = User.objects.filter(**dict(zip(lookups, given, strict=True)))
        compiler = queryset.query.get_compiler(connection=connection)
        sql, params = compiler.as_sql()
        if left:
            sql, params = left.pop(0)
        return Compiled(compiler, sql, tuple(params), queryset)

    kinds = [(type(value), 1) for value in lookups.values()]
    return make_plan(compile_with, kinds, Ending(), connection, snapshots.MARKS)


@isolate_apps("tests")
def a_model_of_its_own() -> object:
    class OwnInit(Author):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        class Meta:
            app_label = "tests"
            proxy = True

    return check_model(OwnInit)


def several() -> object:
    asked: Any = object.__new__(loading.Asked)
    asked.plan = None
    return asked.row([(1,), (1,)])


def a_descriptor() -> object:
    class Watched:
        def __get__(self, instance: Any, owner: Any) -> Any:
            return self

        def __set__(self, instance: Any, value: Any) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(User, "level", Watched())
        return plan_of(level=1)


def no_text() -> object:
    return plan_of(level=1).encode([1])  # type: ignore[attr-defined]


def a_query_of_its_own() -> object:
    class Own(type(User.objects.all().query)):  # type: ignore[misc]
        pass

    queryset = User.objects.all()
    queryset.query.__class__ = Own
    from django_asyncsession.plans.plan import compiled

    return compiled(queryset, Ending("count"), connections["sqlite"])


MADE: dict[str, Callable[[], object]] = {
    "text": lambda: plan_of(("a", ()), ("b", ()), level=1),
    "parameters": lambda: plan_of(("%s", (7,)), ("%s", (8,)), level=1),
    "model": a_model_of_its_own,
    "descriptor": a_descriptor,
    "encoding": no_text,
    "several": several,
    "query": a_query_of_its_own,
}


@pytest.mark.parametrize("reason", MADE)
def test_what_cannot_be_shown_is_refused_by_name(reason: str) -> None:
    assert refusal(MADE[reason]) == reason


def test_every_reason_has_a_test() -> None:
    assert set(REASONS) == {*QUERIES, *ABOUT_MORE, *MADE}


# Managers


class Counting(QuerySet[Any]):
    """Which has a method more, and nothing of Django's in its own way."""

    def levels(self) -> list[int]:
        return [row.level for row in self]


async def test_a_manager_with_methods_of_its_own_is_django_s(ann: Session) -> None:
    manager: Any = User._default_manager
    with pytest.MonkeyPatch.context() as patch:
        own = type(manager).from_queryset(Counting)()
        own.model, own.name = User, "objects"
        patch.setitem(User._meta.__dict__, "default_manager", own)
        assert await why(ann) == "Runs on a plan."


async def test_a_row_that_is_got_falls_back_too(ann: Session) -> None:
    row = await ann.select(User).one()
    for key in (str(row.pk), True, None, 2**70, float(row.pk)):
        expected = (
            row
            if str(key) in (str(row.pk), str(float(row.pk))) or (key is True and row.pk == 1)
            else None
        )
        for _ in range(3):
            assert await ann.get(User, key) == expected
    assert cache.of(ann.alias).fallbacks["value_type"] > 0
