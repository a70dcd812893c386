"""INSERT, upsert and RETURNING: statements beyond Django's."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, NotSupportedError, connections
from django.db.models import F, Q, Value
from django.db.models.functions import Upper

from django_asyncsession import Row, Session, UpsertQuery, excluded, table
from django_asyncsession.testing import async_assert_num_queries, capture_queries
from tests.models import Account, Author, Book, Box, Line, Member, Restaurant, User, Values

users, books, members, accounts = map(table, (User, Book, Member, Account))


async def feature(session: Session, name: str) -> bool:
    """Whether the database has a feature that Django knows of."""
    return bool(await session.run_sync(lambda: getattr(connections[session.alias].features, name)))


async def emails(session: Session) -> list[tuple[str, str]]:
    """Members as pairs of email and name."""
    rows = await session.select(Member).order_by("email", "club").columns("email", members.name)
    return [tuple(row) for row in rows]


async def test_many_rows_are_one_statement(session: Session) -> None:
    async with async_assert_num_queries(1, using=session.alias):
        rows = await session.insert.rows(*(users(name=str(i)) for i in range(20)))
    assert len({row.pk for row in rows}) == 20
    assert [row.level for row in rows] == [1] * 20
    assert all((r._state.adding, r._state.db) == (False, session.alias) for r in rows)
    assert await session.insert == []
    async with async_assert_num_queries(0, using=session.alias):
        await session.add_all(rows)


async def test_rows_are_batched_to_the_limit_of_parameters(session: Session) -> None:
    limit = await feature(session, "max_query_params") or 1000
    rows = [Values(text=str(i), number=i) for i in range(limit // 10)]
    with capture_queries(session.alias) as queries:
        await session.insert.rows(*rows)
    assert len(queries) < 20
    assert await session.select(Values).count() == len(rows) == len({row.pk for row in rows})


async def test_rows_with_and_without_keys_and_of_several_models(session: Session) -> None:
    given = users(name="a"), users(id=500, name="b"), Author(name="c"), users(name="d")
    rows = await session.insert.rows(*given)
    assert [type(row) for row in rows] == [User, User, Author, User]
    assert rows[1].pk == 500
    found = await session.select(User).in_bulk([rows[0].pk, 500, rows[3].pk])
    assert [found[row.pk].name for row in (rows[0], rows[1], rows[3])] == ["a", "b", "d"]


async def test_expressions_are_values_too(session: Session) -> None:
    made = users(name=Upper(Value("x")), level=Value(2) + 3)
    (row,) = await session.insert.rows(made)
    assert (row.name, row.level) == ("X", 5)
    one = members(email=Upper(Value("a")), club="c")
    (row,) = await session.insert.rows(one).on_conflict("email", "club").update("name")
    assert row.email == "A"
    other = await session.add(users(name=Upper(Value("y"))))
    assert other.name == "Y"


async def test_insert_of_related_rows(session: Session) -> None:
    author = Author(name="a")
    book = Book(title="x", author=author)
    with pytest.raises(ValueError, match="unsaved related object 'author'"):
        await session.insert.rows(book)
    await session.insert.rows(author)
    await session.insert.rows(book)
    assert await session.select(Book).where(books.author == author).count() == 1
    with pytest.raises(IntegrityError):
        async with session.begin_nested():
            await session.insert.rows(Author(name="a"))


async def test_on_conflict_update(session: Session) -> None:
    await session.insert.rows(members(email="a", club="x", name="old", columns=1))

    def upsert() -> UpsertQuery:
        new = members(email="a", club="x", name="new", columns=5)
        insert = session.insert.rows(new, members(email="b", club="x", name="b"))
        return insert.on_conflict(members.email, members.club)

    rows = await upsert().update(members.name)
    assert await emails(session) == [("a", "new"), ("b", "b")]
    if await feature(session, "can_return_rows_from_bulk_insert"):
        stored = await session.select(Member).order_by("email").columns("id").scalars()
        assert [row.pk for row in rows] == stored
    await upsert().update(members.name, members.get_column("columns"))
    counts = await session.select(Member).order_by("email").columns("columns").scalars()
    assert counts == [5, 0]


async def test_on_conflict_set(session: Session) -> None:
    await session.insert.rows(members(email="a", club="x", name="old", columns=1))

    def upsert() -> UpsertQuery:
        again = session.insert.rows(members(email="a", club="x", name="new", columns=5))
        return again.on_conflict("email", "club")

    total = members.get_column("columns") + excluded(members.get_column("columns"))
    await (
        upsert()
        .update(members.active)
        .set(members.get_column("columns"), total)
        .set(members.name, "it's 100%")
    )
    (row,) = await session.select(Member)
    assert (row.columns, row.name) == (6, "it's 100%")
    await upsert().set(members.get_column("columns").incr(1))
    assert await session.select(Member).columns("columns").scalars() == [7]


async def test_on_conflict_nothing(session: Session) -> None:
    await session.insert.rows(members(email="a", club="x", name="old"))
    upsert = session.insert.rows(
        members(email="a", club="x", name="new"), members(email="b", club="x", name="b")
    )
    await upsert.on_conflict(members.email, members.club).nothing()
    await upsert.on_conflict().nothing()
    await upsert.on_conflict(members.email, members.club).update(members.name).nothing()
    assert await emails(session) == [("a", "old"), ("b", "b")]


async def test_nothing_swallows_no_other_error(session: Session) -> None:
    upsert = session.insert.rows(members(email=None, club="x")).on_conflict(
        members.email, members.club
    )
    with pytest.raises(IntegrityError):
        async with session.begin_nested():
            await upsert.nothing()


async def test_an_upsert_has_to_say_what_happens(session: Session) -> None:
    upsert = session.insert.rows(members(email="a", club="x")).on_conflict(members.email)
    with pytest.raises(ValueError, match=r"call update\(\) or nothing\(\)"):
        await upsert
    with pytest.raises(TypeError, match="'nme' is no column of 'Member'"):
        await session.insert.rows(members(email="a", club="x")).on_conflict("nme").nothing()


async def test_a_conflict_with_another_constraint_is_an_error(session: Session) -> None:
    """Only the constraint named in `on_conflict` is covered; MySQL cannot tell, and says so."""
    row = await session.add(members(email="a", club="x"))
    same_key = members(id=row.pk, email="z", club="z")
    upsert = session.insert.rows(same_key).on_conflict(members.email, members.club)
    if await feature(session, "supports_update_conflicts_with_target"):
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await upsert.nothing()
        with pytest.raises(ValueError, match=r"name columns in on_conflict\(\)"):
            await session.insert.rows(same_key).on_conflict().update(members.name)
    else:
        with pytest.raises(NotSupportedError, match=r"cannot tell a conflict on .* from one on id"):
            await upsert.nothing()
        await session.insert.rows(same_key).on_conflict().update(members.name)


async def test_on_conflict_where_the_condition_holds(session: Session) -> None:
    await session.insert.rows(
        members(email="a", club="x", name="old"), members(email="b", club="x", active=False)
    )
    upsert = session.insert.rows(
        members(email="a", club="x", name="new%s"), members(email="b", club="x", name="new")
    ).on_conflict(members.email, members.club)
    conditional = upsert.update(members.name, where=members.active == True)  # noqa: E712
    if not await feature(session, "supports_update_conflicts_with_target"):
        with pytest.raises(NotSupportedError, match="has no condition on conflicts"):
            await conditional
        return
    await conditional
    assert await emails(session) == [("a", "new%s"), ("b", "")]
    newer = excluded(members.name) != members.name
    await upsert.update(members.name, where=newer & (members.email == "b"))
    assert await emails(session) == [("a", "new%s"), ("b", "new")]


@pytest.mark.parametrize("alias", ["default", "sqlite"])
async def test_on_conflict_with_a_partial_index(session: Session) -> None:
    await session.insert.rows(
        accounts(owner="a", balance=1), accounts(owner="a", closed=True, balance=9)
    )
    open_ones = Q(closed=False)
    upsert = session.insert.rows(accounts(owner="a", balance=5))
    await upsert.on_conflict(accounts.owner, where=open_ones).update(accounts.balance)
    found = await session.select(Account).order_by("balance").columns("balance").scalars()
    assert found == [5, 9]
    await upsert.on_conflict(accounts.owner, where=accounts.closed == False).nothing()  # noqa: E712
    assert await session.select(Account).count() == 2


async def test_insert_returning(session: Session) -> None:
    insert = session.insert.rows(users(name="a"), users(id=900, name="b"))
    if not await feature(session, "can_return_rows_from_bulk_insert"):
        with pytest.raises(NotSupportedError, match=r"has no INSERT \.\.\. RETURNING"):
            await insert.returning(users.id)
        return
    first, second = await insert.returning(users.id, "level", users.name)
    assert isinstance(first, Row)
    assert {first.name, second.name} == {"a", "b"} and (first.level, second.level) == (1, 1)
    assert 900 in (first.id, second.id)
    (row,) = await session.insert.rows(users(name="c")).returning()
    assert isinstance(row, User) and row.name == "c" and row.pk
    (box,) = await session.insert.rows(table(Box)(width=3)).returning("area", "made")
    assert box.area == 21 and box.made.tzinfo
    upsert = session.insert.rows(members(email="a", club="x", name="n"))
    (made,) = await upsert.on_conflict("email", "club").update("name").returning("email", "id")
    assert made.email == "a" and made.id


async def test_update_returning(session: Session) -> None:
    await session.insert.rows(users(name="a", xp=1), users(name="b", xp=2))
    update = session.update(User).where(users.name == "b").set(users.xp.incr(5))
    try:
        rows = await update.returning(users.name, users.xp)
    except NotSupportedError as exc:
        assert "has no UPDATE ... RETURNING; run the statement without" in str(exc)
        assert session.alias == "mysql"
        return
    assert [row.items() for row in rows] == [[("name", "b"), ("xp", 7)]]
    (row,) = await session.update(User).where(users.name == "a").set(xp=F("level")).returning()
    assert isinstance(row, User) and (row.name, row.xp) == ("a", 1)
    tagged = session.update(Book).where(books.author.name == "x").set(title="y")
    assert await tagged.returning("title") == []
    assert await session.update(User).where(id=-1).set(xp=1).returning("id") == []
    with pytest.raises(NotSupportedError, match="has parent tables"):
        await session.update(Restaurant).all_rows().set(city="x").returning("stars")


async def test_delete_returning(session: Session) -> None:
    author = await session.add(Author(name="a"))
    await session.insert.rows(Book(title="x", author=author), Book(title="y", author=author))
    delete = session.delete(Book).where(books.title == "x").returning(books.title, "author_id")
    if not await feature(session, "can_return_rows_from_bulk_insert"):
        with pytest.raises(NotSupportedError):
            await delete
        return
    assert [tuple(row) for row in await delete] == [("x", author.pk)]
    (gone,) = await session.delete(Author).where(name="a").returning()
    assert gone == author and gone.name == "a"
    assert await session.select(Book).count() == 0
    await session.insert.rows(users(name="u"))
    (row,) = await session.delete(User).where(users.name == "u").returning("name")
    assert row.name == "u"
    lines = table(Line)
    await session.insert.rows(lines(order=1, number=2, text="t"))
    (row,) = await session.delete(Line).where(lines.order == 1).returning("pk", "text")
    assert row.items() == [("order", 1), ("number", 2), ("text", "t")]


async def test_tables_with_parents_are_inserted_row_by_row(session: Session) -> None:
    one, two = await session.insert.rows(Restaurant(name="a"), Restaurant(name="b"))
    assert one.pk and two.pk
    with pytest.raises(NotSupportedError, match="has parent tables, so one INSERT cannot write it"):
        await session.insert.rows(Restaurant(name="c")).returning("stars")


async def test_asyncqlio_s_upsert_writes_the_right_values(session: Session) -> None:
    """There the parameters of the UPDATE were bound to the wrong places."""
    await session.insert.rows(members(id=1, email="a", club="x", name="old", columns=3))
    query: Any = session.insert.add_row(members(id=1, email="a", club="x", name="new", columns=4))
    conflict = query.on_conflict() if session.alias == "mysql" else query.on_conflict(members.id)
    await session.run_insert_query(conflict.update(members.name))
    (row,) = await session.select(Member)
    assert (row.id, row.name, row.columns) == (1, "new", 3)
