"""Parameters travel as parameters: no text in any place of a value changes what a query is.

On real connections of the pools: the driver that quotes must be the one that sessions have in
production, which on MySQL the connection of a test does not have.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.core.exceptions import FieldDoesNotExist, FieldError
from django.db import DatabaseError, NotSupportedError
from django.db.models import Count, Value
from django.db.models.functions import Concat
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from django_asyncsession import Session, excluded, table
from tests.models import Account, Member, User, Values

users, docs, members, accounts = table(User), table(Values), table(Member), table(Account)

FRAGMENTS = [
    "'", '"', "`", "%", "%s", "%(name)s", "%%", "\\", "\\'", "\\\\", ";", "--", "/*", "*/", "#",
    "?", ":1", "$1", "{0}", "x' OR '1'='1", '"; DROP TABLE tests_user; --', "');",
    "\n", "\t", "\u2028", "ünïcødé", "\U0001f600", "NULL", "_", "",
]  # fmt: skip
nasty = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    max_size=4,
).map(lambda parts: "".join(parts)[:20])

many = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def world(real_session: Session) -> Session:
    await real_session.insert.rows(User(name="one"), User(name="two"))
    return real_session


async def assert_untouched(session: Session) -> None:
    """The two rows that no test here changes are there, and are all that there is."""
    names = session.select(User).order_by("id").columns("name")
    assert await names.scalars() == ["one", "two"]


@many
@given(text=nasty)
@example(text="%s' OR 1=1 --")
async def test_every_place_of_a_value_in_where(world: Session, text: str) -> None:
    select = world.select(User)
    for condition in (
        users.name == text + "#",
        users.name.in_([text + "#", "#"]),
        users.name.between(text + "zzz", text + "zzz"),
        users.name.contains(text + "#"),
        users.name.startswith(text + "#"),
        users.name.endswith("#" + text),
        users.name.icontains("#" + text),
        users.name.like("#" + text),
        users.name.ilike("#" + text),
        users.name == Concat(Value(text), Value("#")),
    ):
        assert await select.where(condition).count() == 0
        assert await world.update(User).where(condition).set(users.name, text) == 0
        assert await world.delete(User).where(condition) == 0
    assert await select.where(users.name != text + "#").count() == 2
    await assert_untouched(world)


@many
@given(text=nasty)
async def test_every_place_of_a_value_that_is_written(world: Session, text: str) -> None:
    row = await world.add(users(name=text))
    first, second = await world.insert.rows(users(name=text), Values(text=text, data={text: text}))
    assert await world.update(User).where(users.id == row.pk).set(users.name, text + "!") == 1
    for loaded, expected in ((row, text + "!"), (first, text)):
        await world.refresh(loaded)
        assert loaded.name == expected
    await world.merge(users(id=row.pk, name=text))
    await world.refresh(row)
    await world.refresh(second)
    assert (row.name, second.text, second.data) == (text, text, {text: text})
    assert await world.select(User).where(users.name == text, id=row.pk).count() == 1
    assert await world.delete(User).where(users.id.in_([row.pk, first.pk])) == 2
    await world.delete(Values).where(docs.id == second.pk)
    await assert_untouched(world)


@many
@given(text=nasty)
async def test_every_place_of_a_value_in_an_upsert(world: Session, text: str) -> None:
    await world.delete(Member).all_rows()
    for _ in range(2):
        insert = world.insert.rows(members(email="e" + text, club="c", name=text))
        upsert = insert.on_conflict(members.email, members.club)
        await upsert.update(members.name)
        await (
            world.insert.rows(members(email="e" + text, club="c"))
            .on_conflict("email", "club")
            .set(members.name, Concat(excluded(members.email), Value(text)))
        )
    (row,) = await world.select(Member)
    assert (row.email, row.name) == ("e" + text, "e" + text + text)
    await assert_untouched(world)


@many
@given(text=nasty)
@pytest.mark.parametrize("alias", ["default", "sqlite"])
async def test_the_values_of_conflict_conditions(world: Session, text: str) -> None:
    """The condition of a partial index is written into the text, quoted as Django quotes it."""
    await world.delete(Account).all_rows()
    await world.insert.rows(accounts(owner="o", balance=1))
    upsert = world.insert.rows(accounts(owner="o", balance=2)).on_conflict(
        accounts.owner,
        where=accounts.closed == False,  # noqa: E712
    )
    await upsert.update(accounts.balance, where=accounts.owner == text + "#")
    assert await world.select(Account).columns("balance").scalars() == [1]
    never = (accounts.closed == False) & (accounts.owner != text + "#")  # noqa: E712
    async with world.begin_nested() as savepoint:
        try:
            again = world.insert.rows(accounts(owner="p", balance=3))
            await again.on_conflict(accounts.owner, where=never).nothing()
        except DatabaseError as exc:
            # There is no index with such a condition, which the database has understood.
            assert "constraint" in str(exc)
            await savepoint.rollback()
    await assert_untouched(world)


@many
@given(key=nasty, text=nasty)
async def test_keys_and_values_in_json(world: Session, key: str, text: str) -> None:
    select = world.select(Values)
    async with world.begin_nested() as savepoint:
        await world.insert.rows(Values(text="json", data={"key": text}))
        assert await select.where(docs.data["key"] == text).count() == 1
        assert await select.where(docs.data["key"] == text + "#").count() == 0
        await savepoint.rollback()
    for condition in (docs.data[key] == text, docs.data["a"][key].is_null(False)):
        async with world.begin_nested() as savepoint:
            try:
                assert await select.where(condition).count() == 0
            except DatabaseError as exc:
                # Not every key can be written as a path of every database.
                assert "path" in str(exc).lower(), exc
                await savepoint.rollback()
    await assert_untouched(world)


# A name without these, odd as it may be, is quoted.
ENDS_NAME = re.compile(r"[\s'\"`;]|--|/\*|\*/|#")
# What is raised without a word to the database.
REFUSALS = ValueError, TypeError, AttributeError, FieldError, FieldDoesNotExist, NotSupportedError
# Of a percent sign beside what ends a name, Django's newest version warns before it refuses the
# rest; a warning is an error in tests.
REFUSALS += DeprecationWarning, PendingDeprecationWarning


def calls(world: Session, name: str) -> dict[str, Any]:
    """Everything that takes the name of a field, a relation, a column or a format as text."""
    select, row = world.select(User), User(id=1, name="one")
    insert = world.insert.rows(members(email="e", club="c", name="n"))
    return {
        "order_by": lambda: select.order_by(name),
        "descending": lambda: select.order_by("-" + name),
        "columns": lambda: select.columns(name),
        "alias": lambda: select.columns(**{name: users.id}),
        "annotate": lambda: select.annotate(**{name: users.id}),
        "values": lambda: select.values(name),
        "values_list": lambda: select.values_list(name, flat=True),
        "only": lambda: select.only(name),
        "defer": lambda: select.defer(name),
        "distinct": lambda: select.distinct(name),
        "group_by": lambda: select.group_by(name),
        "related": lambda: select.related(name),
        "prefetch": lambda: select.prefetch(name),
        "where": lambda: select.where(**{name: 1}),
        "exclude": lambda: select.exclude(**{name + "__in": [1]}),
        "for_update": lambda: select.for_update(of=(name,)),
        "in_bulk": lambda: select.in_bulk([1], field_name=name),
        "aggregate": lambda: select.aggregate(**{name: Count("id")}),
        "explain": lambda: select.explain(format=name),
        "explain option": lambda: select.explain(**{name: True}),
        "set": lambda: world.update(User).all_rows().set(**{name: 1}),
        "returning": lambda: world.insert.rows(users(name="x")).returning(name),
        "on_conflict": lambda: insert.on_conflict(name).nothing(),
        "upsert": lambda: insert.on_conflict("email", "club").update(name),
        "upsert set": lambda: insert.on_conflict("email", "club").set(name, 1),
        "merge": lambda: world.merge(row, fields=[name]),
        "refresh": lambda: world.refresh(row, fields=[name]),
        "load": lambda: world.load(row, name),
    }


@settings(many, max_examples=15)
@given(name=nasty)
@example(name="a b")
@example(name="a--b")
@example(name='"name"; DELETE FROM tests_user; --')
@example(name="`name`; DELETE FROM tests_user; -- ")
@example(name="json) DELETE FROM tests_user; --")
@example(name="name) FROM tests_user; DELETE FROM tests_user; --")
async def test_no_name_of_a_query_is_sql(world: Session, name: str) -> None:
    """What could end its quotes, or begin something else, is refused before the database hears of
    it."""
    assume(ENDS_NAME.search(name))
    for place in calls(world, name):
        if place == "for_update" and world.bind.vendor == "sqlite":
            # Django's SQLite has no such clause, and leaves it out.
            continue
        async with world.begin_nested() as savepoint:
            with pytest.raises(REFUSALS):
                await calls(world, name)[place]()
            await savepoint.rollback()
    await assert_untouched(world)
