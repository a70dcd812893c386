"""Rows: what is written, what is remembered, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.contenttypes.models import ContentType
from django.core.files.base import ContentFile
from django.db import IntegrityError
from django.db.models import F, Model, Prefetch
from django.db.models.signals import post_save, pre_save
from django.forms.models import model_to_dict, modelform_factory

from django_asyncsession import DatabaseInterface, NotLoadedError, RowNotFound, Session, table
from django_asyncsession.testing import async_assert_num_queries, capture_queries
from tests.models import (
    Author,
    Book,
    Box,
    Hero,
    Line,
    Note,
    Place,
    Profile,
    Ranges,
    Restaurant,
    Shelf,
    Slug,
    Tag,
    Upload,
    User,
    Values,
)
from tests.sessions import sent

users, books, authors = table(User), table(Book), table(Author)


async def reread(session: Session, row: Model) -> Any:
    """The row as it is in the database."""
    return await session.get_one(type(row), row.pk)


async def test_add_inserts_a_new_row_and_fills_it_in(session: Session) -> None:
    for row in (User(name="a"), users(name="b")):
        assert await session.add(row) is row
        assert row.pk and row.level == 1 and row.xp is None
        assert (row._state.adding, row._state.db) == (False, session.alias)
        assert await reread(session, row) == row
    with pytest.raises(IntegrityError):
        async with session.atomic():
            await session.add(users(id=row.pk, name="again"))


async def test_what_the_database_makes_is_filled_in(session: Session) -> None:
    boxes = table(Box)
    one = await session.add(boxes(width=3))
    two, three = await session.insert.rows(boxes(width=4), Box(width=5, height=2))
    for row, expected in ((one, (3, 7, 21)), (two, (4, 7, 28)), (three, (5, 2, 10))):
        assert (row.width, row.height, row.area) == expected
        assert row.made is not None
    one.width = 10
    await session.add(one)
    assert one.area == 70
    two.width = F("width") * 2
    await session.add(two)
    assert (two.width, two.area) == (8, 56)
    await session.add(two)
    assert (await reread(session, two)).width == 8


async def test_add_writes_only_what_changed(session: Session) -> None:
    await session.add(User(name="a", level=3))
    row = await session.select(User).one()
    row.name = "b"
    with capture_queries(session.alias) as queries:
        await session.add(row)
    updates = [text for text in sent(queries) if text.startswith("UPDATE")]
    assert len(updates) == 1
    assert "name" in updates[0] and "level" not in updates[0] and "xp" not in updates[0]


async def test_add_of_an_unchanged_row_sends_nothing(session: Session) -> None:
    made = await session.add(User(name="a", xp=5))
    got = await session.get_one(User, made.pk)
    selected = await session.select(User).related("profile").one()
    await session.refresh(got)
    got.xp = 5
    async with async_assert_num_queries(0, using=session.alias):
        for row in (made, got, selected):
            await session.add(row)


async def test_what_came_with_a_row_is_remembered_too(session: Session) -> None:
    author = await session.add(Author(name="a"))
    tag = await session.add(Tag(name="t"))
    book = await session.add(Book(title="b", author=author))
    await session.related(book).tags.add(tag)
    prefetch = Prefetch("tags", to_attr="all_tags")
    query = session.select(Book).related("author").prefetch("author__books", "tags", prefetch)
    (book,) = await query
    (same,) = [row async for row in query.stream(10)]
    assert same == book
    async with async_assert_num_queries(0, using=session.alias):
        rows = [book.author, *book.tags.all(), *book.author.books.all(), *book.all_tags]  # type: ignore[attr-defined]
        assert len(rows) == 4
        await session.add_all(rows)


async def test_auto_now_moves_when_something_is_written(session: Session) -> None:
    author = await session.add(Author(name="a"))
    book = await session.add(Book(title="b", author=author))
    before = book.updated
    await session.add(book)
    assert book.updated == before
    book.title = "c"
    await session.add(book)
    assert book.updated > before
    stored = await reread(session, book)
    assert abs(stored.updated - book.updated) < timedelta(seconds=1) and stored.updated > before
    moved = await session.merge(books(id=book.pk, title="d"), fields=["title"])
    assert (await reread(session, book)).title == "d" and moved.pk == book.pk


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ({"a": [1]}, lambda data: data["a"].append(2), {"a": [1, 2]}),
        ({"a": 1}, lambda data: data.update(a=True), {"a": True}),
        ([1, 2], lambda data: data.clear(), []),
    ],
)
async def test_json_changed_in_place_is_written(
    session: Session, before: Any, change: Any, after: Any
) -> None:
    row = await session.add(Values(data=before))
    for loaded in (row, await session.get_one(Values, row.pk)):
        await session.update(Values).all_rows().set(data=before)
        await session.refresh(loaded)
        change(loaded.data)
        await session.add(loaded)
        assert repr((await reread(session, row)).data) == repr(after)


@pytest.mark.parametrize("alias", ["default"], ids=["postgresql"])
async def test_arrays_changed_in_place_are_written(session: Session) -> None:
    row = await session.add(Ranges(names=["a"]))
    row.names.append("b")
    await session.add(row)
    stored = await reread(session, row)
    assert stored.names == ["a", "b"]
    async with async_assert_num_queries(0, using=session.alias):
        await session.add(stored)


async def test_a_new_file_is_written(session: Session) -> None:
    row = await session.add(Upload(file=ContentFile(b"one", "a.txt")))
    name = row.file.name
    row = await reread(session, row)
    async with async_assert_num_queries(0, using=session.alias):
        await session.add(row)
        assert row.file.read() == b"one"
        await session.add(row)
    row.file = ContentFile(b"two", name)
    await session.add(row)
    stored = await reread(session, row)
    assert stored.file.read() == b"two" and stored.file.name != name
    row.file.delete(save=False)
    await session.add(row)
    assert not (await reread(session, row)).file


async def test_many_rows_are_updated_at_once(session: Session) -> None:
    rows = await session.insert.rows(*(users(name=n, xp=1) for n in "abc"), Author(name="x"))
    for row in rows[:2]:
        row.name = row.name.upper()
    rows[1].xp = F("xp") + 5
    rows[3].name = "y"
    query = session.update.rows(*rows[:2]).add_row(rows[2]).rows(rows[3])
    with capture_queries(session.alias) as queries:
        assert await query == 4
    assert sum(text.startswith("UPDATE") for text in sent(queries)) == 2
    stored = await session.select(User).order_by("name").columns("name", "xp")
    assert [tuple(row) for row in stored] == [("A", 1), ("B", 6), ("c", 1)]
    assert rows[1].xp == 6
    with capture_queries(session.alias) as queries:
        assert await query == 0
    assert len(queries) == 0


async def test_the_snapshot_stays_out_of_sight(session: Session) -> None:
    await session.add(User(name="a", xp=1))
    row, plain = await session.select(User).one(), User(id=1, name="a", level=1, xp=1)
    assert row == User(id=row.pk) and hash(row) == hash(User(id=row.pk))
    assert model_to_dict(row).keys() == model_to_dict(plain).keys()
    assert set(row.__dict__) == set(plain.__dict__)
    form = modelform_factory(User, fields=["name"])({"name": "b"}, instance=row)
    assert form.is_valid()
    for twin in (copy.copy(row), copy.deepcopy(row)):
        twin.name = "b"
        with capture_queries(session.alias) as queries:
            await session.add(twin)
        assert "xp" not in queries[0]["sql"].split("SET")[1]
    again = pickle.loads(pickle.dumps(row))
    assert again == row and again.name == row.name
    again.level = 5
    await session.add(again)
    assert (await reread(session, row)).level == 5


async def test_rows_from_elsewhere_are_saved_whole(session: Session) -> None:
    await session.add(User(name="a", xp=1))
    row = await session.run_sync(User.objects.using(session.alias).get)
    with capture_queries(session.alias) as queries:
        await session.add(row)
    assert sum("UPDATE" in text and "xp" in text for text in sent(queries)) == 1
    async with async_assert_num_queries(0, using=session.alias):
        await session.add(row)


async def test_a_copy_is_made_by_taking_the_key_away(session: Session) -> None:
    await session.add(User(name="a"))
    row = await session.select(User).one()
    first = row.pk
    row.pk = None
    await session.add(row)
    assert row.pk not in (None, first)
    row.pk = first
    row.name = "moved"
    await session.add(row)
    assert await session.select(User).order_by("id").columns("name").scalars() == ["moved", "a"]


async def test_a_changed_row_that_is_gone_is_not_found(session: Session) -> None:
    row = await session.add(User(name="a"))
    await session.delete(User).all_rows()
    row.name = "b"
    with pytest.raises(RowNotFound, match=r"User\(pk=\d+\) is not in the database"):
        await session.add(row)
    with pytest.raises(RowNotFound):
        await session.refresh(row)


async def test_models_with_their_own_save_and_receivers_count(session: Session) -> None:
    """Fields that `save()` and `pre_save` change are written with those that the caller changed."""

    def shout(sender: Any, instance: Any, **kwargs: Any) -> None:
        saved.append(instance.title)
        instance.title = instance.title.upper()

    saved: list[str] = []
    row = await session.add(table(Slug)(title="One"))
    assert (row.slug, row.hidden) == ("one", False)
    row.title = "Two"
    with connected(pre_save, shout, Slug):
        await session.add(row)
    stored = await reread(session, row)
    assert (saved, stored.title, stored.slug) == (["Two"], "TWO", "two")


@contextmanager
def connected(signal: Any, receiver: Any, sender: Any) -> Iterator[None]:
    signal.connect(receiver, sender=sender)
    try:
        yield
    finally:
        signal.disconnect(receiver, sender=sender)


async def test_signals_tell_new_from_old(session: Session) -> None:
    told: list[bool] = []

    def note(sender: Any, created: bool, **kwargs: Any) -> None:
        told.append(created)

    with connected(post_save, note, User):
        row = await session.add(users(name="a"))
        row.name = "b"
        await session.add(row)
        await session.add(row)
        await session.merge(users(id=row.pk, name="c"))
    assert told == [True, False, False, False]


async def test_merge_writes_what_was_set(session: Session) -> None:
    row = await session.add(User(name="a", level=4, xp=7))
    with capture_queries(session.alias) as queries:
        merged = await session.merge(users(id=row.pk, name="b"))
    assert len(queries) == 1 and "level" not in queries[0]["sql"] and "xp" not in queries[0]["sql"]
    stored = await reread(session, row)
    assert (stored.name, stored.level, stored.xp) == ("b", 4, 7)
    await session.load(merged, "level")
    assert merged.level == 4
    late = users(id=row.pk)
    late.xp = None
    await session.merge(late)
    assert (await reread(session, row)).xp is None
    await session.merge(User(id=row.pk, name="c", level=9), fields=[users.level])
    stored = await reread(session, row)
    assert (stored.name, stored.level) == ("b", 9)
    stored.name = "d"
    async with async_assert_num_queries(1, using=session.alias):
        await session.update_now(stored)
        await session.merge(stored)


async def test_merge_of_a_missing_row_is_an_error(session: Session) -> None:
    for row in (users(id=987, name="x"), users(id=987), users(id=987, level=F("level") + 1)):
        with pytest.raises(RowNotFound, match=r"User\(pk=987\) is not in the database"):
            await session.merge(row)


async def test_merge_needs_to_know_what_was_set(session: Session) -> None:
    with pytest.raises(TypeError, match=r"name them with merge\(row, fields=\[...\]\)"):
        await session.merge(User(id=1, name="x"))
    with pytest.raises(ValueError, match="has no primary key; set it, or insert with add"):
        await session.merge(users(name="x"))
    row = await session.add(User(name="a"))
    await session.merge(users(id=row.pk))


async def test_insert_now_update_now_delete_now(session: Session) -> None:
    row = await session.insert_now(users(name="a"))
    row.name = "b"
    await session.update_now(row)
    assert (await reread(session, row)).name == "b"
    assert await session.delete_now(row) == 1
    assert await session.get(User, row.pk or 0) is None


async def test_remove_follows_on_delete(session: Session) -> None:
    author = await session.add(Author(name="a"))
    await session.add(Book(title="b", author=author))
    assert await session.remove(author) == 2
    assert author.pk is None
    with pytest.raises(ValueError, match="id attribute is set to None"):
        await session.remove(author)
    made = await session.add(User(name="x"))
    assert await session.remove(users(id=made.pk)) == 1


async def test_get(session: Session) -> None:
    row = await session.add(User(name="a"))
    assert await session.get(User, row.pk) == row
    assert await session.get(users, 999) is None
    assert await session.get_one(users, row.pk) == row
    with pytest.raises(User.DoesNotExist):
        await session.get_one(User, 999)


async def test_refresh(session: Session) -> None:
    row = await session.add(User(name="a", xp=1))
    await session.update(User).all_rows().set(name="b", xp=2)
    await session.refresh(row, ["xp"])
    assert (row.name, row.xp) == ("a", 2)
    await session.refresh(row, [users.name])
    assert row.name == "b"
    made = await session.refresh(users(id=row.pk))
    assert (made.name, made.level, made.xp) == ("b", 1, 2)


async def test_add_all_is_all_or_none(session: Session) -> None:
    rows = await session.add_all(users(name=n) for n in "ab")
    assert [row.name for row in rows] == ["a", "b"]
    with pytest.raises(IntegrityError):
        async with session.begin_nested():
            await session.add_all([Author(name="same"), Author(name="same")])
    assert await session.select(Author).count() == 0


async def test_tables_of_every_kind(session: Session) -> None:
    place = await session.add(table(Restaurant)(name="r", stars=2))
    assert (place.pk, place.city, place.stars) == (place.place_ptr_id, "Ghent", 2)
    found = await session.select(Restaurant).where(table(Restaurant).name == "r").one()
    before = found.updated
    found.city = "Bruges"
    with capture_queries(session.alias) as queries:
        await session.add(found)
    assert sum("UPDATE" in text for text in sent(queries)) == 2 and found.updated > before
    assert (await session.select(Place).one()).city == "Bruges"
    await session.merge(table(Restaurant)(pk=place.pk, stars=3))
    assert (await reread(session, place)).stars == 3
    one, two = await session.insert.rows(Restaurant(name="s"), Restaurant(name="t", stars=1))
    assert one.pk and two.pk and await session.select(Place).count() == 3

    hero = await session.add(table(Hero)(name="h"))
    assert type(await session.select(Hero).one()) is Hero
    assert (await session.get_one(User, hero.pk)).name == "h"

    line = await session.add(table(Line)(order=1, number=2))
    line.text = "x"
    await session.add(line)
    assert (await session.get_one(Line, (1, 2))).text == "x"
    await session.merge(table(Line)(order=1, number=2, text="y"))
    assert await session.select(Line).columns("text").scalars() == ["y"]
    await session.remove(line)
    assert await session.select(Line).count() == 0


async def test_load_takes_one_query_for_each_step_and_all_rows(session: Session) -> None:
    owner = await session.add(User(name="o"))
    author = await session.add(Author(name="a"))
    tags = await session.insert.rows(Tag(name="s", owner=owner), Tag(name="t"))
    for title in "xyz":
        book = await session.add(Book(title=title, author=author))
        await session.related(book).tags.set(tags)
    found = await session.select(Book).only("title").order_by("title")
    async with async_assert_num_queries(5, using=session.alias):
        await session.load(found, books.author, "tags__owner", "price")
    assert {b.author.name for b in found} == {"a"}
    assert {t.owner.name for b in found for t in b.tags.all() if t.owner} == {"o"}
    assert {b.price for b in found} == {0}
    async with async_assert_num_queries(0, using=session.alias):
        await session.add_all(found)
        await session.load(found, "author")
        await session.load([], "author")
    await session.load(found[0], Prefetch("tags", Tag.objects.filter(name="s"), "s_tags"))
    assert [t.name for t in found[0].s_tags] == ["s"]  # type: ignore[attr-defined]
    by_hand = books(id=found[0].pk, author_id=author.pk)
    await session.load(by_hand, "author", "title")
    assert (by_hand.author, by_hand.title) == (author, "x")
    with pytest.raises(AttributeError, match="nothing"):
        await session.load(found, "nothing")


async def test_relationships_of_a_row(session: Session) -> None:
    author, other = await session.insert.rows(Author(name="a"), Author(name="b"))
    book = await session.add(Book(title="x", author=author))
    red, blue = await session.insert.rows(Tag(name="red"), Tag(name="blue"))
    tags = session.related(book).tags
    await tags.add(red, blue)
    assert await tags.count() == 2
    assert {t.name for t in await tags} == {t.name for t in await tags.all()} == {"red", "blue"}
    assert {t.name async for t in tags} == {"red", "blue"}
    await tags.remove(red)
    assert [t.name for t in await tags.select().order_by("name")] == ["blue"]
    await tags.set([red])
    assert await tags.first() == red
    await tags.clear()
    assert await tags.count() == 0
    assert (await tags.create(name="green")).pk
    (again,) = await session.select(Book).prefetch("tags")
    await session.related(again).tags.clear()
    assert await session.related(again).tags == []

    assert await session.related(book).author == author
    await session.related(book).author.set(other)
    assert await session.related(author).books.count() == 0
    await session.related(author).books.add(book)
    assert await session.related(author).books == [book]
    assert (await reread(session, book)).author_id == author.pk
    assert await session.related(book).editor is None
    with pytest.raises(TypeError, match="is one row; await it"):
        await session.related(book).author.add(other)
    with pytest.raises(AttributeError, match="'Book' has no relation 'nothing'; it has author, "):
        _ = session.related(book).nothing


async def test_relationships_of_every_kind(session: Session) -> None:
    user = await session.add(User(name="u"))
    assert await session.related(user).profile is None
    await session.related(user).profile.set(Profile(bio="b"))
    fresh = await session.get_one(User, user.pk)
    assert (await session.related(fresh).profile).bio == "b"
    top = await session.add(Shelf(name="top"))
    await session.insert.rows(Shelf(name="low", parent=top))
    assert [s.name for s in await session.related(top).children] == ["low"]
    await session.run_sync(ContentType.objects.db_manager(session.alias).get_for_model, Shelf)
    note = await session.related(top).notes.create(text="n")
    found = await session.get_one(Note, note.pk)
    assert await session.related(found).about == top
    loaded = await session.select(Note).prefetch("about").one()
    assert loaded.about == top


# A row that was only made has no database, so it is the default one that would be asked.
@pytest.mark.django_db(databases="__all__")
async def test_an_unloaded_relation_names_the_fix(session: Session) -> None:
    author = await session.add(Author(name="a"))
    await session.add(Book(title="x", author=author))
    book = await session.select(Book).only("title", "author").one()
    fix = 'is not loaded .* use `await session.load\\(book, "{}"\\)` first'
    for name in ("author", "price"):
        with pytest.raises(NotLoadedError, match=fix.format(name)):
            getattr(book, name)
    user = await session.add(User(name="u"))
    with pytest.raises(NotLoadedError, match=r"'profile' of User\(pk=\d+\) is not loaded"):
        _ = user.profile
    with pytest.raises(NotLoadedError, match='load\\(book, "tags"\\)'):
        list(book.tags.all())
    with pytest.raises(NotLoadedError, match='load\\(author, "edited"\\)'):
        list(author.edited.all())
    note = await session.insert.rows(Note(text="n", kind_id=1, number=1))
    with pytest.raises(NotLoadedError, match="'about' of Note"):
        _ = note[0].about
    merged = users(id=user.pk)
    with pytest.raises(NotLoadedError, match="'level'"):
        _ = merged.level
    await session.load(book, "author", "price", "tags")
    assert (book.author.name, book.price, list(book.tags.all())) == ("a", 0, [])


async def test_in_the_bridge_django_loads_as_always(session: Session) -> None:
    author = await session.add(Author(name="a"))
    await session.add(Book(title="x", author=author))
    book = await session.select(Book).only("title").one()

    def view() -> tuple[Any, ...]:
        return book.author.name, book.price, list(book.tags.all())

    assert await session.run_sync(view) == ("a", 0, [])
    assert book.author.name == "a"


async def test_rows_outlive_the_session(session: Session) -> None:
    author = await session.add(Author(name="a"))
    await session.add(Book(title="x", author=author))
    book = await session.select(Book).related("author").one()
    await session.rollback()
    assert (book.title, book.author.name) == ("x", "a")
    with pytest.raises(NotLoadedError):
        _ = book.author.books.all()[0]


async def names_of(database: DatabaseInterface) -> list[str]:
    """Names of all users, as another session sees them."""
    async with database.get_session() as other:
        found = await other.select(User).order_by("name").columns("name").scalars()
    return list(found)


async def test_rows_of_a_rolled_back_transaction_are_written_again(
    database: DatabaseInterface,
) -> None:
    """What a session believes of a row ends with the transaction that made it true."""
    one, two, three = users(name="one"), User(name="two"), users(name="three")
    old = User(name="old")
    async with database.get_session() as session:
        await session.add(old)

    async def attempt() -> None:
        async with database.get_session() as session:
            await session.add(one)
            await session.add_all([two])
            await session.insert.rows(three)
            await session.add(one)
            await session.refresh(one)
            old.name = "new"
            await session.add(old)
            if not failed:
                failed.append(True)
                raise ZeroDivisionError

    failed: list[bool] = []
    with pytest.raises(ZeroDivisionError):
        await attempt()
    assert await names_of(database) == ["old"]
    await attempt()
    assert await names_of(database) == ["new", "one", "three", "two"]
    async with database.get_session() as session, async_assert_num_queries(0, database.alias):
        await session.add_all([one, two, three, old])


async def test_rows_of_a_rolled_back_savepoint_are_written_again(session: Session) -> None:
    kept = await session.add(users(name="kept"))
    lost = users(name="lost")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                kept.name = "changed"
                await session.add_all([kept, lost])
                raise ZeroDivisionError
    assert await session.select(User).columns("name").scalars() == ["kept"]
    await session.add_all([kept, lost])
    assert await session.select(User).order_by("id").columns("name").scalars() == [
        "changed",
        "lost",
    ]
    async with session.begin_nested():
        kept.name = "again"
        await session.add(kept)
    kept.xp = 1
    await session.add(kept)
    assert (await reread(session, kept)).name == "again"
    with pytest.raises(RowNotFound):
        await session.merge(users(id=12345, name="x"))


async def test_rows_of_a_failed_call_are_written_again_in_autocommit_mode(
    database: DatabaseInterface,
) -> None:
    good, bad = Author(name="same"), Author(name="same")
    async with database.get_session(autocommit=True) as session:
        with pytest.raises(IntegrityError):
            await session.add_all([good, bad])
        await session.add(good)
        assert await session.select(Author).columns("name").scalars() == ["same"]
        await session.add(good)
        assert await session.select(Author).count() == 1
