"""Queries: every method, on every database."""

from __future__ import annotations

import pickle
from datetime import date
from typing import Any

import pytest
from django.db import DataError, NotSupportedError, connections
from django.db.models import (
    Avg,
    Count,
    F,
    FilteredRelation,
    Max,
    OuterRef,
    Prefetch,
    Q,
    Subquery,
    Value,
    Window,
)
from django.db.models.functions import ExtractYear, Length, Rank, Upper

from django_asyncsession import DatabaseInterface, Row, Session, UnboundedQueryError, table
from django_asyncsession.testing import async_assert_num_queries, capture_queries
from tests.models import Author, Book, Hero, Member, Slug, Tag, User
from tests.sessions import sent

users, books, authors = table(User), table(Book), table(Author)


@pytest.fixture
async def people(session: Session) -> Session:
    rows = [("ada", 1, 10), ("bob", 1, None), ("cid", 2, 30), ("dan", 2, 40), ("eve", 3, None)]
    await session.insert.rows(*(User(name=n, level=v, xp=x) for n, v, x in rows))
    return session


@pytest.fixture
async def library(session: Session) -> Session:
    ann, bea = await session.insert.rows(
        Author(name="Ann", born=date(1990, 1, 2)), Author(name="Bea")
    )
    one, two, _ = await session.insert.rows(
        Book(title="one", author=ann, editor=bea, price=5),
        Book(title="two", author=bea, price=7),
        Book(title="three", author=bea, price=9),
    )
    red, blue = await session.insert.rows(Tag(name="red"), Tag(name="blue"))
    await session.related(one).tags.set([red, blue])
    await session.related(two).tags.add(red)
    return session


def names(rows: Any) -> list[str]:
    return [row.name for row in rows]


async def test_the_ways_to_begin(people: Session) -> None:
    for query in (
        people.select(User),
        people.select(users),
        people.select.from_(User),
        people.select(User.objects),
        people.select(User.objects.all()),
        people.select(people.select(User)),
        people.select.set_table(users),
    ):
        assert await query.count() == 5
    with pytest.raises(TypeError, match="has no table yet"):
        await people.select.where(users.id == 1)
    with pytest.raises(TypeError, match="neither a Django model nor a row table"):
        people.select("User")  # type: ignore[arg-type]


async def test_a_queryset_of_the_user_s_own_is_taken_as_it_is(people: Session) -> None:
    mine = User.objects.filter(level=2).order_by("-name")
    assert names(await people.select(mine).where(xp__gt=0)) == ["dan", "cid"]
    assert people.select(mine).queryset.db == people.alias
    assert names(await people.run_sync(list, people.select(mine).queryset)) == ["dan", "cid"]
    assert names(await people.select(mine[:1])) == ["dan"]
    assert await people.select(User.objects.none()) == []


async def test_reads_and_writes_see_what_the_default_manager_sees(session: Session) -> None:
    await session.insert.rows(Slug(title="a"), Slug(title="b", hidden=True))
    assert await session.select(Slug).count() == 1
    assert await session.update(Slug).all_rows().set(title="c") == 1
    assert await session.delete(Slug).all_rows() == 1
    assert await session.fetch_all("SELECT title FROM tests_slug") == [("b",)]


async def test_a_query_asks_anew_each_time_it_is_awaited(session: Session) -> None:
    query = session.select(User)
    assert await query == []
    await session.add(User(name="a"))
    assert len(await query) == len(await query.all()) == 1


async def test_where_takes_conditions_and_lookups(people: Session) -> None:
    query = people.select(User).where(users.level == 1, name__startswith="a")
    assert names(await query) == ["ada"]
    assert names(await people.select(User).where(Q(level=3)).where(users.name == "eve")) == ["eve"]
    assert names(await people.select(User).exclude(users.level < 3)) == ["eve"]
    assert names(await people.select(User).add_condition(users.level == 3)) == ["eve"]
    with pytest.raises(TypeError, match="is not a condition"):
        people.select(User).where("name")


async def test_queries_are_never_changed(people: Session) -> None:
    base = people.select(User).order_by("name")
    assert names(await base.where(users.level == 1)) == ["ada", "bob"]
    assert names(await base.limit(1)) == ["ada"]
    assert names(await base.where(users.level == 2).limit(1).offset(1)) == ["dan"]
    assert len(await base) == 5
    update = people.update(User).where(users.level == 9)
    assert await update.set(xp=1) == 0
    with pytest.raises(ValueError, match="sets nothing"):
        await update
    inserted = people.insert.rows(User(name="x"))
    inserted.rows(User(name="y"))
    assert len(inserted.rows_to_insert) == 1


async def test_order(people: Session) -> None:
    query = people.select(User)
    assert names(await query.order_by(users.name.desc()))[0] == "eve"
    assert names(await query.order_by(users.level.desc(), users.name.asc())) == [
        "eve", "cid", "dan", "ada", "bob"
    ]  # fmt: skip
    assert names(await query.order_by(users.level, users.name, sort_order="desc")) == [
        "eve", "dan", "cid", "bob", "ada"
    ]  # fmt: skip
    assert names(await query.order_by("-level", "name", sort_order="desc"))[0] == "bob"
    nulls_last = query.order_by(users.xp.desc(nulls_last=True), users.name)
    assert names(await nulls_last) == ["dan", "cid", "ada", "bob", "eve"]
    nulls_first = query.order_by(users.xp.asc(nulls_first=True), users.name)
    assert names(await nulls_first) == ["bob", "eve", "ada", "cid", "dan"]
    assert names(await query.order_by(Upper("name").desc()))[0] == "eve"
    with pytest.raises(ValueError, match="sort_order cannot be 'up'"):
        query.order_by(users.name, sort_order="up")


async def test_slices(people: Session) -> None:
    query = people.select(User).order_by("name")
    assert names(await query[1:3]) == ["bob", "cid"]
    assert names(await query[3:]) == ["dan", "eve"]
    assert names(await query[1:4][1:]) == ["cid", "dan"]
    assert names(await query.limit(2).where(users.level > 1)) == ["cid", "dan"]
    assert names(await query.offset(3)) == ["dan", "eve"]
    assert await query[1:3].count() == 2
    assert names(await query.limit(2)[1:9]) == ["bob"]
    assert await query.limit(0) == []
    for bad in (-1, True, "1"):
        with pytest.raises(ValueError, match="it is a whole number of rows"):
            query.limit(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"for one row use first\(\)"):
        query[3]  # type: ignore[index]


async def test_ends_that_give_rows(people: Session) -> None:
    query = people.select(User).order_by("name")
    assert names(await query) == names(await query.all()) == names(await query.run())
    assert [row.name async for row in query] == names(await query)
    assert [row.name async for row in await query.all()] == names(await query)
    assert names(await (await query.all()).flatten()) == names(await query)
    result = await query.where(users.level == 3).all()
    assert [(await result.next()).name, await result.next()] == ["eve", None]  # type: ignore[union-attr]
    assert (await query.where(users.level == 2).first()).name == "cid"  # type: ignore[union-attr]
    assert await query.where(users.level == 9).first() is None
    assert (await people.select(User).first()).name == "ada"  # type: ignore[union-attr]
    assert (await query.where(users.level == 3).one()).name == "eve"
    assert await query.where(users.level == 9).one_or_none() is None
    with pytest.raises(User.DoesNotExist, match="no User row matches"):
        await query.where(users.level == 9).one()
    with pytest.raises(User.MultipleObjectsReturned, match="more than one User row"):
        await query.where(users.level == 1).one()
    with pytest.raises(User.MultipleObjectsReturned):
        await query.where(users.level == 1).one_or_none()


async def test_first_and_one_fetch_no_more_than_they_need(people: Session) -> None:
    with capture_queries(people.alias) as queries:
        await people.select(User).first()
        await people.select(User).where(users.level == 3).one()
        await people.select(User).limit(1).one()
    assert [text.rsplit("LIMIT", 1)[1].strip() for text in sent(queries)] == ["1", "2", "1"]


async def test_ends_that_give_values(people: Session) -> None:
    query = people.select(User).order_by("name")
    assert await query.count() == 5
    assert await query.where(users.level == 9).exists() is False
    assert await query.exists() is True
    assert await query.columns(users.name).scalar() == "ada"
    assert await query.columns(users.xp).scalars() == [10, None, 30, 40, None]
    assert await query.where(users.level == 9).scalar() is None
    assert (await query.scalars())[0].name == "ada"
    assert await query.values("level", "name").scalar() == 1
    assert await query.values_list("name", flat=True).scalars() == await query.values_list(
        "name", flat=True
    )
    assert await query.aggregate(Max("xp"), mean=Avg(users.level)) == {"xp__max": 40, "mean": 1.8}
    ids = await query.columns("id").scalars()
    assert names((await people.select(User).in_bulk(ids[:2])).values()) == ["ada", "bob"]
    assert len(await people.select(User).in_bulk()) == 5
    by_name = await people.select(Author).in_bulk(["x"], field_name=authors.name)
    assert by_name == {}


async def test_columns_give_rows_by_name_and_index(library: Session) -> None:
    query = library.select(Book).order_by("title")
    rows = await query.columns(
        books.title, books.author.name, long=Length("title"), cost=F("price")
    )
    assert isinstance(rows[0], Row)
    assert rows[0].items() == [("title", "one"), ("author__name", "Ann"), ("long", 3), ("cost", 5)]
    assert (rows[0].title, rows[0][1], rows[0]["long"]) == ("one", "Ann", 3)
    (row,) = await query.limit(1).columns(Max("price"))
    assert row.price__max == 5


async def test_values_are_django_s(library: Session) -> None:
    query = library.select(Book).order_by("title")
    assert await query.values(books.title)[:1] == [{"title": "one"}]
    assert await query.values_list("title", books.author.name)[:1] == [("one", "Ann")]
    assert await query.values_list("title", flat=True)[:1] == ["one"]
    assert (await query.values_list("title", named=True).first()).title == "one"


async def test_only_and_defer(people: Session) -> None:
    row = await people.select(User).only(users.name).first()
    assert row is not None and row.get_deferred_fields() == {"level", "xp"}
    row = await people.select(User).defer("name", users.xp).first()
    assert row is not None and row.get_deferred_fields() == {"name", "xp"}


async def test_distinct(people: Session) -> None:
    levels = people.select(User).order_by("level").columns("level").distinct()
    assert await levels.scalars() == [1, 2, 3]
    first_of_each = people.select(User).order_by("level", "name").distinct(users.level)
    if connections[people.alias].features.can_distinct_on_fields:
        assert names(await first_of_each) == ["ada", "cid", "eve"]
        assert (await first_of_each.first()).name == "ada"  # type: ignore[union-attr]
    else:
        with pytest.raises(NotSupportedError):
            await first_of_each


async def test_related_and_prefetched_rows_come_with_the_row(library: Session) -> None:
    async with async_assert_num_queries(3, using=library.alias):
        found = await (
            library.select(Book)
            .related(books.author, "editor")
            .prefetch(
                books.tags, Prefetch("author__books", Book.objects.order_by("-title"), "all_books")
            )
            .order_by("title")
        )
    assert [b.author.name for b in found] == ["Ann", "Bea", "Bea"]
    assert [sorted(t.name for t in b.tags.all()) for b in found] == [["blue", "red"], [], ["red"]]
    assert [b.title for b in found[1].author.all_books] == ["two", "three"]


async def test_a_query_in_a_prefetch(library: Session) -> None:
    red = library.select(Tag).where(table(Tag).name == "red")
    (first, *_) = await library.select(Book).prefetch(Prefetch("tags", red)).order_by("title")
    assert [t.name for t in first.tags.all()] == ["red"]
    other = await library.get_one(Book, first.pk)
    await library.load(other, Prefetch("tags", red, "reds"))
    assert [t.name for t in other.reds] == ["red"]  # type: ignore[attr-defined]


async def test_results_are_lists_that_can_be_cached(people: Session) -> None:
    found = await people.select(User).order_by("name")
    await found.next()
    assert pickle.loads(pickle.dumps(found)) == list(found) and found[1:] == list(found)[1:]


async def test_a_filtered_relation(library: Session) -> None:
    dear = FilteredRelation("books", condition=authors.books.price > 6)
    query = library.select(Author).annotate(dear=dear).where(dear__isnull=False).distinct()
    assert names(await query) == ["Bea"]
    members = table(Member)
    condition = members.active & (members.email != "x")
    assert await library.select(Member).where(condition).count() == 0
    assert members.active.name == "active"


async def test_annotations(library: Session) -> None:
    newest = Subquery(
        Book.objects.filter(author=OuterRef("pk")).order_by("-price").values("title")[:1]
    )
    query = library.select(Author).annotate(n=Count("books"), best=newest).order_by("name")
    assert [(a.name, a.n, a.best) for a in await query] == [("Ann", 1, "one"), ("Bea", 2, "three")]  # type: ignore[attr-defined]
    assert [a.name for a in await query.having(n__gt=1)] == ["Bea"]
    ranked = library.select(Book).annotate(
        rank=Window(Rank(), partition_by=F("author"), order_by=books.price.desc())
    )
    assert await ranked.order_by("title").columns("title", "rank") == [
        Row(("title", "rank"), v) for v in [("one", 1), ("three", 1), ("two", 2)]
    ]
    inner = library.select(Book).where(books.author == OuterRef("pk")).columns("title")
    counted = library.select(Author).annotate(any=Subquery(inner.order_by("title").limit(1)))
    assert await counted.order_by("name").columns("any").scalars() == ["one", "three"]


async def test_groups(library: Session) -> None:
    query = library.select(Book).order_by("author__name")
    for grouped in (
        query.group_by(books.author.name).annotate(n=Count("id"), top=Max(books.price)),
        query.annotate(n=Count("id"), top=Max(books.price)).group_by(books.author.name),
    ):
        found = await grouped
        assert [row.items() for row in found] == [
            [("author__name", "Ann"), ("n", 1), ("top", 5)],
            [("author__name", "Bea"), ("n", 2), ("top", 9)],
        ]
        assert [row.n for row in await grouped.having(n__gt=1)] == [2]
        assert (await grouped.first()).n == 1  # type: ignore[union-attr]
    by_year = library.select(Author).group_by(year=ExtractYear("born")).annotate(n=Count("id"))
    assert {(r.year, r.n) for r in await by_year} == {(1990, 1), (None, 1)}
    cheap = query.where(books.price < 8).annotate(n=Count("id")).group_by(books.author)
    assert [row.n for row in await cheap] == [1, 1]


async def test_unions_and_their_kin(people: Session) -> None:
    low = people.select(User).where(users.level == 1)
    rich = people.select(User).where(users.xp >= 10)
    assert set(names(await low.union(rich))) == {"ada", "bob", "cid", "dan"}
    assert len(await low.union(rich, all=True)) == 5
    assert names(await low.intersection(rich)) == ["ada"]
    assert names(await low.difference(rich)) == ["bob"]
    assert names(await low.union(rich).order_by("name").limit(2)) == ["ada", "bob"]
    assert names(await low.union(User.objects.filter(level=3)).order_by("-name")) == [
        "eve",
        "bob",
        "ada",
    ]
    assert (await low.union(rich).order_by("name").first()).name == "ada"  # type: ignore[union-attr]


async def test_for_update(people: Session) -> None:
    features = connections[people.alias].features
    query = people.select(User).where(users.level == 3).for_update()
    assert names(await query) == ["eve"]
    if not features.has_select_for_update:
        assert "FOR UPDATE" not in query.sql()[0]
        return
    text = await people.run_sync(query.sql)
    assert text[0].endswith("FOR UPDATE")
    nowait = people.select(User).for_update(nowait=True)
    assert (await people.run_sync(nowait.sql))[0].endswith("FOR UPDATE NOWAIT")
    if features.has_select_for_no_key_update:
        own = (
            people.select(Book)
            .related("author")
            .for_update(skip_locked=True, of=["self"], no_key=True)
        )
        text = await people.run_sync(own.sql)
        assert text[0].endswith('FOR NO KEY UPDATE OF "tests_book" SKIP LOCKED')


async def test_explain_shows_a_plan(people: Session) -> None:
    assert "user" in (await people.select(User).where(users.xp == 1).explain()).lower()


async def test_sql_shows_text_and_parameters_without_running(people: Session) -> None:
    query = people.select(User).where(users.name == "x'y", users.level.in_([1, 2])).limit(3)
    text, params = query.sql()
    assert "x'y" not in text and params == ("x'y", 1, 2)
    assert query.generate_sql() == query.sql()
    assert people.select(User).where(users.id.in_([])).sql()[0]


async def test_stream_gives_rows_with_bounded_memory(library: Session) -> None:
    await library.insert.rows(*(Tag(name=f"{i:03}") for i in range(50)))
    query = library.select(Tag).where(name__lt="1").order_by("name")
    with capture_queries(library.alias) as queries:
        found = [tag.name async for tag in query.stream(chunk_size=7)]
    assert found == [f"{i:03}" for i in range(50)]
    assert len(queries) == 1
    titles = library.select(Book).prefetch("tags").order_by("title")
    with capture_queries(library.alias) as queries:
        got = [(b.title, len(b.tags.all())) async for b in titles.stream(chunk_size=2)]
    assert got == [("one", 2), ("three", 0), ("two", 1)]
    assert len(queries) == 3
    assert [row.title async for row in titles.columns("title").stream(2)] == ["one", "three", "two"]


async def test_a_stream_left_early_closes_its_cursor(people: Session) -> None:
    stream = people.stream(people.select(User).order_by("name"), chunk_size=1)
    async for row in stream:
        assert row.name == "ada"
        break
    await stream.aclose()
    assert await people.select(User).count() == 5


async def test_a_stream_in_autocommit_mode_keeps_its_connection(
    database: DatabaseInterface,
) -> None:
    async with database.get_session(autocommit=True) as session:
        await session.insert.rows(*(Tag(name=f"{i:02}") for i in range(10)))
        seen = []
        async for tag in session.stream(session.select(Tag).order_by("name"), chunk_size=3):
            seen.append(tag.name)
            assert await session.select(Tag).count() == 10
        assert seen == [f"{i:02}" for i in range(10)]


@pytest.mark.parametrize("alias", ["default"], ids=["postgresql"])
async def test_an_error_in_a_stream_is_what_the_caller_gets(people: Session) -> None:
    broken = people.select(User).annotate(bad=Value(1) / (users.level - users.level))
    with pytest.raises(DataError):
        async for _ in broken.stream(chunk_size=1):
            pass


async def test_update(people: Session) -> None:
    update = people.update(User).where(users.level == 1)
    assert await update.set(users.xp, users.level + 100).set(users.name, "same") == 2
    assert await people.select(User).where(name="same").columns("xp").scalars() == [101, 101]
    assert await update.set(users.xp, None) == 2
    assert await people.select(User).where(users.xp == None).count() == 3  # noqa: E711
    assert await update.set(users.level.incr(4)) == 2
    assert await people.update.table(User).where(level=5).set(users.level - 1) == 2
    assert await people.update(users).where(level=4).set_update(users.level.decr(1)) == 2
    assert await people.update(User).where(level=3).set(users.name.set("x")).set(level=8) == 3
    newest = Subquery(User.objects.order_by("-xp").values("xp")[:1])
    if await people.run_sync(lambda: connections[people.alias].features.update_can_self_select):
        assert await people.update(User).where(level=8).set(users.xp, newest) == 3
    assert await people.update(User).where(users.level == 77).set(xp=1) == 0


async def test_update_of_related_and_to_related(library: Session) -> None:
    ann = await library.select(Author).where(authors.name == "Ann").one()
    mine = library.update(Book).where(books.author.name == "Bea")
    assert await mine.set(books.author, ann) == 2
    assert await library.select(Book).where(books.author == ann).count() == 3
    assert await library.update(Book).where(title="one").set(books.author_id, ann.pk) == 1
    with pytest.raises(TypeError, match="'author__name' is no column of 'Book'"):
        await library.update(Book).all_rows().set(books.author.name, "x")
    with pytest.raises(TypeError, match="has no value; give one"):
        library.update(Book).set(books.title)


async def test_writes_without_where_are_refused(people: Session) -> None:
    with pytest.raises(UnboundedQueryError, match="update of 'User' has no where"):
        await people.update(User).set(xp=1)
    with pytest.raises(UnboundedQueryError, match=r"delete of 'User' .* or say all_rows\(\)"):
        await people.delete(User)
    with pytest.raises(UnboundedQueryError):
        await people.delete(User).where(Q())
    assert await people.update(User).all_rows().set(xp=1) == 5
    assert await people.delete(User).all_rows() == 5


async def test_delete_follows_on_delete(library: Session) -> None:
    assert await library.delete(Author).where(authors.name == "Bea") == 1
    assert await library.select(Book).columns("title", "editor").scalars() == ["one"]
    assert await library.delete(Book).where(books.title == "none") == 0
    assert await library.delete.from_(Tag).where(name="red") == 1
    await library.insert.rows(Hero(name="h"), Hero(name="i"))
    assert await library.delete(Hero).where(name="h") == 1
    assert await library.delete(User).where(name="i") == 1


async def test_the_names_of_asyncqlio(people: Session) -> None:
    assert len(await people.run_select_query(people.select.from_(User))) == 5
    (row,) = await people.run_insert_query(people.insert.add_row(users(name="fay")))
    assert row.pk
    await people.run_update_query(
        people.update.table(users).where(users.name == "fay").set(users.xp, 3)
    )
    assert await people.run_delete_query(people.delete.table(users).where(users.xp == 3)) == 1
