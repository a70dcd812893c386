"""What the types of tables, rows and queries promise to a caller."""

from __future__ import annotations

from typing import Any, assert_type

from django.db.models import Count, Q

from django_asyncsession import (
    Column,
    Condition,
    DeleteQuery,
    RowTable,
    SelectQuery,
    Session,
    UpdateQuery,
    table,
)
from django_asyncsession.results import Row
from testproject.shop.models import Author, Book

books = table(Book)


def tables() -> None:
    """Tables know their model, and calling one makes a row of it."""
    assert_type(books, RowTable[Book])
    assert_type(books.model, type[Book])
    assert_type(books(title="x"), Book)
    assert_type(table(table(Author)), RowTable[Author])


def conditions() -> None:
    """Comparing columns makes conditions, whatever they are combined with."""
    price: Column = books.get_column("price")
    assert_type(price == 1, Condition)
    assert_type(price != None, Condition)  # noqa: E711
    assert_type(price >= 1, Condition)
    assert_type((price > 1) & Q(title="x"), Condition)
    assert_type(~price.in_([1, 2]), Condition)
    assert_type(price + 1 > 5, Condition)
    assert_type(price.like("x%"), Condition)


async def rows(session: Session) -> None:
    """Rows come as the model that was asked for."""
    assert_type(await session.get(Book, 1), Book | None)
    assert_type(await session.get(books, 1), Book | None)
    assert_type(await session.get_one(Book, 1), Book)
    assert_type(await session.add(Book(title="x")), Book)
    assert_type(await session.add_all([Book(title="x")]), list[Book])
    assert_type(await session.merge(books(pk=1)), Book)
    assert_type(await session.refresh(Book()), Book)


async def selects(session: Session) -> None:
    """A query keeps its model through every step, until columns are asked for."""
    query = session.select(Book)
    assert_type(query, SelectQuery[Book])
    assert_type(session.select(books), SelectQuery[Book])
    assert_type(session.select(Book.objects.all()), SelectQuery[Book])
    assert_type(session.select(Book.objects), SelectQuery[Book])
    assert_type(session.select.from_(Book), SelectQuery[Book])
    narrowed = query.where(books.price == 1, title="x").order_by(books.title.desc()).limit(3)
    assert_type(narrowed, SelectQuery[Book])
    assert_type(narrowed[1:2].related("author").prefetch("tags").distinct(), SelectQuery[Book])
    assert_type(narrowed.only("title").for_update().union(query), SelectQuery[Book])
    assert_type(query.annotate(n=Count("id")).having(n__gt=1), SelectQuery[Book])
    assert_type(query.columns(books.title), SelectQuery[Row])
    assert_type(query.group_by(books.author), SelectQuery[Row])
    assert_type(query.values("title"), SelectQuery[dict[str, Any]])


async def results(session: Session) -> None:
    """What the ends of a query give."""
    query = session.select(Book)
    assert_type(await query.first(), Book | None)
    assert_type(await query.one(), Book)
    assert_type(await query.one_or_none(), Book | None)
    assert_type((await query)[0], Book)
    assert_type((await query.all())[0], Book)
    assert_type(await query.count(), int)
    assert_type(await query.exists(), bool)
    assert_type(await query.in_bulk(), dict[Any, Book])
    assert_type(await query.columns("title").first(), Row | None)
    assert_type(query.sql(), tuple[str, tuple[Any, ...]])
    async for book in query:
        assert_type(book, Book)
    async for book in query.stream():
        assert_type(book, Book)


def writes(session: Session) -> None:
    """Writes stay what they are through every step."""
    assert_type(session.update(Book).where(books.price == 1).set(books.price, 2), UpdateQuery)
    assert_type(session.delete(books).where(books.price == 1).returning(), DeleteQuery)


def mistakes(session: Session) -> None:
    """Each of these is an error that a checker finds: mypy says when one is not."""
    session.select(5)  # type: ignore[arg-type]
    session.select(Book).limit("3")  # type: ignore[arg-type]
    session.select(Book)[1]  # type: ignore[index]
    table(5)  # type: ignore[arg-type]
