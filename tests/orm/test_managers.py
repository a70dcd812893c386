"""Which rows a session sees and writes: those of the models' managers, by their own methods."""

from __future__ import annotations

import uuid
from datetime import date
from typing import Any

import pytest
from django.db import NotSupportedError
from django.db.models import F
from django.db.models.signals import pre_save
from django.utils.functional import lazystr

from django_asyncsession import Session, UnboundedQueryError, table
from django_asyncsession.testing import async_assert_num_queries
from tests.models import (
    Careless,
    Dish,
    Node,
    Opaque,
    Patched,
    Shape,
    Slug,
    Soft,
    Square,
    Tag,
    User,
    Wrapped,
)

softs = table(Soft)
COLUMNS = "SELECT name, stamp, gone FROM tests_soft ORDER BY name"


@pytest.fixture
async def three(session: Session) -> Session:
    """Two rows that the default manager shows, and one of another tenant."""
    await session.run_sync(
        Soft.everything.db_manager(session.alias).bulk_create,
        [Soft(name="a"), Soft(name="b"), Soft(name="c", tenant=2)],
    )
    return session


async def stored(session: Session) -> list[tuple[Any, ...]]:
    return [(n, s, bool(g)) for n, s, g in await session.fetch_all(COLUMNS)]


# What is seen


async def test_update_and_delete_are_those_of_the_queryset(three: Session) -> None:
    """A soft-deleted row stays, and another tenant's is not touched."""
    assert await three.update(Soft).where(name__in=["a", "c"]).set(tenant=1) == 1
    assert await three.delete(Soft).where(name__in=["b", "c"]) == 1
    assert await stored(three) == [("a", "updated", False), ("b", "", True), ("c", "", False)]
    assert [row.name for row in await three.select(Soft)] == ["a"]
    assert await three.get(Soft, 0) is None


async def test_a_given_manager_or_queryset_is_taken_as_it_is(three: Session) -> None:
    assert await three.select(Soft.everything).count() == 3
    assert await three.delete(Soft.everything.filter(name="c")) == 1
    assert await three.delete(Soft.everything).where(name="b") == 1
    assert await stored(three) == [("a", "", False)]


async def test_what_the_manager_sets_is_no_condition_of_the_query(three: Session) -> None:
    for write in (three.delete(Soft), three.delete(Soft.objects), three.update(Soft).set(tenant=1)):
        with pytest.raises(UnboundedQueryError):
            await write
    assert await three.delete(Soft.objects.all()) == 2
    user = await three.add(User(name="u"))
    assert await three.delete(user.tags) == 0


async def test_what_a_manager_puts_on_its_queryset_survives(session: Session) -> None:
    await session.insert.rows(Patched(amount=7, currency="USD"), Patched(amount=8, currency="EUR"))
    for source in (Patched, Patched.objects, table(Patched)):
        query = session.select(source).where(amount__gt=6)
        assert [price.currency for price in await query] == ["EUR"]
    assert await session.update(Patched).where(amount__gt=6).set(amount=1) == 1
    assert await session.delete(Patched).where(amount__gt=0) == 1


async def test_related_rows_are_read_anew_although_they_were_prefetched(session: Session) -> None:
    user = await session.add(User(name="u"))
    await session.load(user, "tags")
    await session.insert.rows(Tag(name="t", owner=user))
    assert len(await session.related(user).tags.all()) == len(await session.select(user.tags)) == 1


async def test_a_manager_that_forgets_its_database_is_reminded(session: Session) -> None:
    await session.insert.rows(Careless(name="a"))
    assert [row.name for row in await session.select(Careless)] == ["a"]
    assert await session.delete(Careless).where(name="a") == 1


async def test_rows_that_are_hidden_can_be_used(session: Session) -> None:
    """Refreshed, updated and their fields loaded, as Django does with rows that are there."""
    (row,) = await session.insert.rows(Slug(title="a", hidden=True))
    row.title = "b"
    assert await session.update.rows(row) == 1
    await session.refresh(row)
    partly = await session.select(Slug._base_manager).only("hidden").one()
    await session.load(partly, "title")
    assert row.title == partly.title == "b"
    assert await session.get(Slug, row.pk) is None


# By their own methods


async def test_rows_are_inserted_by_the_managers_own_bulk_create(session: Session) -> None:
    a, b = await session.insert.rows(Soft(name="a"), Soft(name="b", tenant=2))
    assert a.pk and b.pk and a.stamp == "inserted"
    await session.insert.rows(Soft(name="a"), Soft(name="c")).on_conflict("name").nothing()
    found = session.insert.rows(Soft(name="c", gone=True)).on_conflict("name").update(softs.gone)
    await found
    assert await stored(session) == [
        ("a", "inserted", False),
        ("b", "inserted", False),
        ("c", "inserted", True),
    ]


async def test_what_is_inserted_so_is_returned(session: Session) -> None:
    insert = session.insert.rows(Soft(name="a")).returning("name", "stamp")
    if session.alias == "default" or session.alias == "sqlite":
        upsert = session.insert.rows(Soft(name="a", gone=True)).on_conflict("name")
        assert await insert == [("a", "inserted")]
        assert await upsert.update("gone").returning("stamp", "gone") == [("inserted", True)]
    else:
        assert [tuple(row) for row in await insert] == [("a", "inserted")]


async def test_a_bulk_create_that_does_not_end_in_djangos_says_so(session: Session) -> None:
    (row,) = await session.insert.rows(Careless(name="a"))
    assert row.pk
    for insert in (
        session.insert.rows(Careless(name="b")).on_conflict().nothing(),
        session.insert.rows(Careless(name="b")).returning("name"),
    ):
        async with session.begin_nested() as block:
            with pytest.raises(NotSupportedError, match=r"'Careless' has a bulk_create\(\) that"):
                await insert
            await block.rollback()
    assert await session.select(Careless).count() == 1


async def test_updated_and_deleted_rows_are_returned_through_their_own_methods(
    three: Session,
) -> None:
    if three.alias != "mysql":
        update = three.update(Soft).where(id__gt=0).set(tenant=1).returning("name", "stamp")
        assert sorted(map(tuple, await update)) == [("a", "updated"), ("b", "updated")]
    assert [*map(tuple, await three.delete(Soft).where(name="a").returning("name"))] == [("a",)]
    assert [(n, g) for n, _, g in await stored(three)] == [("a", True), ("b", False), ("c", False)]


async def test_with_a_row_of_a_tree_go_those_below_it(session: Session) -> None:
    await session.insert.rows(*(Node(path=path) for path in ("a", "aa", "aaa", "b")))
    # Its delete() does not tell how many.
    assert await session.delete(Node).where(path="a") == -1
    assert await session.select(Node).columns("path").scalars() == ["b"]


async def test_rows_come_back_as_the_class_that_they_were_made_as(session: Session) -> None:
    await session.insert.rows(Shape(side=1), Square(side=2))
    added = await session.add(Square(side=3))
    await session.insert.rows(Square(side=4), Square(side=2)).on_conflict("side").nothing()
    query = session.select(Shape).order_by("side")
    classes = [Shape, Square, Square, Square]
    assert [type(row) for row in await query] == classes
    assert [type(row) async for row in query.stream(chunk_size=1)] == classes
    assert type(await session.get_one(Shape, added.pk)) is Square
    assert await session.update(Shape).where(kind="Square", side__gt=2).set(side=F("side") + 5) == 2
    gone = await session.delete(Shape).where(side__gt=5).returning("kind", "side")
    assert sorted(map(tuple, gone)) == [("Square", 8), ("Square", 9)]
    assert [type(row) for row in await query] == [Shape, Square]


# save() that does more


async def texts(session: Session) -> list[Any]:
    return list(await session.select(Tag).order_by("id").columns("name").scalars())


async def test_a_save_of_the_models_own_is_called_although_nothing_changed(
    session: Session,
) -> None:
    dish = await session.get_one(Dish, (await session.add(Dish(price=1))).pk)
    dish.title = "soup"
    await session.add(dish)
    dish.title = "broth"
    await session.add_all([dish])
    dish.title = "stew"
    await session.merge(dish)
    dish.title = "stock"
    await session.merge(dish, fields=[])
    made = table(Dish)(id=dish.pk)
    made.title = "jus"
    await session.merge(made)
    assert await texts(session) == ["soup", "broth", "stew", "stock", "jus"]
    assert (await session.get_one(Dish, dish.pk)).price == 1


async def test_receivers_hear_of_a_row_that_did_not_change(session: Session) -> None:
    heard = []
    user = await session.add(User(name="a"))

    def hear(instance: Any, **kwargs: Any) -> None:
        heard.append(instance)
        instance.level += 1

    pre_save.connect(hear, sender=User)
    try:
        await session.add(user)
    finally:
        pre_save.disconnect(hear, sender=User)
    assert heard == [user] and (await session.get_one(User, user.pk)).level == 2
    async with async_assert_num_queries(0, session.alias):
        await session.add(user)


async def test_a_value_that_is_the_same_in_the_column_is_no_change(session: Session) -> None:
    uid, day = uuid.uuid4(), date(2001, 2, 3)
    given = {"opaque": Opaque("x"), "uid": uid, "number": 7, "day": day, "ratio": 1.5}
    row = await session.get_one(Wrapped, (await session.add(Wrapped(**given))).pk)
    user = await session.get_one(User, (await session.add(User(name="a"))).pk)
    async with async_assert_num_queries(0, session.alias):
        await session.add(row)
        row.opaque, row.uid, row.number, row.day = Opaque("x"), str(uid), "7", str(day)
        row.ratio = "1.5"
        await session.add(row)
        user.name = lazystr("a")
        await session.add(user)
    row.opaque.text = "changed in place"
    user.name = lazystr("b")
    await session.add_all([row, user])
    assert (await session.get_one(Wrapped, row.pk)).opaque.text == "changed in place"
    assert (await session.get_one(User, user.pk)).name == "b"


async def test_a_value_that_cannot_be_written_is_a_change(session: Session) -> None:
    row = await session.add(Wrapped(number=7))
    row.number = "seven"
    async with session.begin_nested() as block:
        with pytest.raises(ValueError, match="number"):
            await session.add(row)
        await block.rollback()
