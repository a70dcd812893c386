"""The plans of an alias are bounded, and forgotten when what they rest on has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.db.models import CharField, Exists, Model
from django.db.models.lookups import Exact
from django.test import override_settings
from django.test.utils import isolate_apps, register_lookup

from django_asyncsession import Session, databases
from django_asyncsession.orm import planned
from django_asyncsession.plans import cache
from django_asyncsession.plans.cache import Cache
from django_asyncsession.plans.plan import COUNT, Ending
from django_asyncsession.testing import capture_queries
from tests.models import User
from tests.sessions import sent


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test learns its own plans."""
    cache.clear_all()
    yield
    cache.clear_all()


def learn(plans: Cache, ending: Ending, **lookups: Any) -> None:
    """Make the plan of a query on users."""
    recording = planned.Recording(User, plans, plans.begin(User)).then("filter", (), lookups)
    recording.learn(ending)


def nodes(plans: Cache) -> int:
    """How many shapes there are."""

    def below(shape: Any) -> int:
        return 1 + sum(map(below, shape.children.values()))

    return below(plans.begin(User))


def test_ten_thousand_shapes_stay_bounded() -> None:
    plans = Cache("sqlite", bound=100)
    for at in range(10_000):
        learn(plans, Ending(COUNT, 0, at), **{f"{'id' if at % 2 else 'level'}__in": [1]})
    assert len(plans) == 100
    assert sum(len(s.ends) for s in plans.begin(User).children.values()) == 100
    for at in range(300):
        learn(plans, Ending(), **{"level": at, "xp__in": list(range(1, 2 + at % 200))})
        learn(plans, Ending(stop=at), level=at)
    assert len(plans) == 100 and nodes(plans) < 150


def test_the_least_recently_used_goes() -> None:
    plans = Cache("sqlite", bound=2)
    learn(plans, Ending(), level=1)
    learn(plans, Ending(), xp=1)
    known = planned.Recording(User, plans, plans.begin(User)).then("filter", (), {"level": 5})
    assert known.find(Ending()) is not None and plans.hits == 1
    learn(plans, Ending(), name="x")
    assert known.is_known and known.find(Ending()) is not None
    gone = planned.Recording(User, plans, plans.begin(User)).then("filter", (), {"xp": 5})
    assert gone.find(Ending()) is None and plans.misses == 1


async def found(session: Session, name: str) -> list[int]:
    return [user.level for user in await session.select(User).where(name=name)]


async def warm(session: Session) -> None:
    """A plan, used."""
    await session.insert.rows(User(name="ann", level=1), User(name="bea", level=2))
    for _ in range(4):
        assert await found(session, "ann") == [1]
    assert session.select(User).where(name="bea").why() == "Runs on a plan."


async def test_a_plan_sends_what_django_sends(session: Session) -> None:
    with capture_queries(session.alias) as queries:
        for _ in range(5):
            await found(session, "ann")
    assert len(queries) == 5 and len(set(sent(queries))) == 1
    assert session.select(User).where(name="x").why() == "Runs on a plan."


async def test_a_changed_setting_forgets_all_plans(session: Session) -> None:
    await warm(session)
    held = session.select(User).where(name="ann")
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        assert len(cache.of(session.alias)) == 0
        assert held.why().startswith("Runs Django's way this time")
        assert [user.level for user in await held] == [1]
    assert await found(session, "bea") == [2]


async def test_a_new_model_forgets_all_plans(session: Session) -> None:
    await warm(session)
    with isolate_apps("tests"):

        class Passing(Model):
            class Meta:
                app_label = "tests"

    assert len(cache.of(session.alias)) == 0


async def test_a_lookup_that_takes_the_place_of_another_one_is_seen(session: Session) -> None:
    class Backwards(Exact):
        def get_prep_lookup(self) -> Any:
            return super().get_prep_lookup()[::-1]

    await warm(session)
    with register_lookup(CharField, Backwards):
        for _ in range(3):
            assert await found(session, "nna") == [1]
    assert await found(session, "ann") == [1]


async def test_a_changed_table_is_no_matter_of_plans(session: Session) -> None:
    await warm(session)
    async with session.begin_nested() as savepoint:
        await session.delete(User).all_rows()
        assert await found(session, "ann") == []
        await savepoint.rollback()
    assert await found(session, "ann") == [1]


async def test_a_plan_that_differs_is_thrown_out_and_logged(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    await session.insert.rows(User(name="ann", level=1), User(name="bea", level=2))
    query = session.select(User).where(name="ann")
    assert [user.level for user in await query] == [1]
    (entry,) = cache.of(session.alias)._entries
    assert entry.plan is not None
    entry.plan.params = lambda values, connection: ("bea",)
    with caplog.at_level(logging.ERROR, "django_asyncsession.plans"):
        assert [user.level for user in await query] == [1]
    assert "because its statement differs" in caplog.text and "bea" not in caplog.text
    assert "differs" in query.why()
    before = databases[session.alias].stats().get("plan_fallbacks_differs", 0)
    for _ in range(3):
        assert await found(session, "bea") == [2]
    assert databases[session.alias].stats()["plan_fallbacks_differs"] == before + 3


async def test_rows_that_differ_are_django_s(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    await session.insert.rows(User(name="ann", level=1))
    await found(session, "ann")
    (entry,) = cache.of(session.alias)._entries
    assert entry.plan is not None
    real = entry.plan.build
    entry.plan.build = lambda rows, alias: [*real(rows, alias), *real(rows, alias)]
    with caplog.at_level(logging.ERROR, "django_asyncsession.plans"):
        assert await found(session, "ann") == [1]
    assert "because what it gives differs" in caplog.text


async def test_compared_a_difference_is_an_error(session: Session) -> None:
    with override_settings(ASYNC_SESSION={"PLANS": "compare"}):
        await found(session, "ann")
        (entry,) = cache.of(session.alias)._entries
        assert entry.plan is not None
        for _ in range(4):
            await found(session, "ann")
        entry.plan.sql += " "
        with pytest.raises(AssertionError, match="a plan differs from Django: Django's text is"):
            await found(session, "ann")


async def test_what_is_counted_is_in_the_stats(session: Session) -> None:
    before = databases[session.alias].stats()
    for _ in range(3):
        await found(session, "ann")
    await session.select(User).where(Exists(User.objects.all()))
    after = databases[session.alias].stats()
    changed = {name: n - before.get(name, 0) for name, n in after.items() if "plan_" in name}
    assert changed["plan_misses"] == 1 and changed["plan_hits"] == 2
    assert changed["plan_fallbacks"] == changed["plan_fallbacks_expression"] == 1


def test_no_database_has_numbers_before_it_was_asked() -> None:
    stats = Cache("none").stats()
    assert stats == {"plans": 0, "plan_hits": 0, "plan_misses": 0, "plan_fallbacks": 0}
