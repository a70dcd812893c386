"""What a competitor is: it opens a pool, and gives each task a client that does the works."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from benchmarks import rows


class NotOffered(Exception):
    """A library has no way to do a work; the message says so in the output."""


class Client:
    """What one task works with: one method for each work, which is given the operation's number.

    Results are the library's own rows. They are read by `plain`, `with_author` and `with_books`,
    after the time was taken, so a row must have been loaded completely.
    """

    # How the library's rows have the key of the author, where that has another name.
    author_id: ClassVar[str] = "author_id"

    async def get(self, number: int) -> Any:
        """The book `rows.book_key(number)`."""
        raise NotOffered

    async def raw(self, number: int) -> Any:
        """The same with SQL of one's own, as whatever row the library gives for that."""
        raise NotOffered

    async def count(self, number: int) -> Any:
        """How many books the author `rows.author_key(number)` has."""
        raise NotOffered

    async def filter(self, number: int) -> Any:
        """The 100 books of the author `rows.author_key(number)`, by key."""
        raise NotOffered

    async def related(self, number: int) -> Any:
        """The 100 books with `rows.author_key(number)` pages, each with its author, by key."""
        raise NotOffered

    async def prefetch(self, number: int) -> Any:
        """Ten authors from `rows.first_of_ten(number)` on, by key, with 100 books each."""
        raise NotOffered

    async def values(self, number: int) -> Any:
        """`rows.VALUES` of a thousand books from `rows.first_of_thousand(number)` on, by key."""
        raise NotOffered

    async def insert(self, number: int) -> Any:
        """Insert `rows.draft(number)`; returns the key."""
        raise NotOffered

    async def update(self, number: int) -> Any:
        """Set the pages of the draft `rows.draft_key(number)` to number + 1, without loading it;
        returns how many rows were changed."""
        raise NotOffered

    async def transaction(self, number: int) -> Any:
        """In one transaction: get a book, get its author, insert a draft, set its pages to
        number + 1, get the draft; returns book, author and draft."""
        raise NotOffered

    async def insert_many(self, number: int) -> Any:
        """Insert the drafts of `rows.draft_numbers(number)`."""
        raise NotOffered

    async def many(self, limit: int) -> Any:
        """A list of `limit` books, for the memory they take."""
        raise NotOffered

    def stream(self, limit: int) -> AsyncIterator[Any]:
        """`limit` drafts one by one, for the memory that reading them takes."""
        raise NotOffered

    def plain(self, row: Any, columns: Sequence[str]) -> tuple[Any, ...]:
        """The values of these columns: of a row with attributes, or of one by position."""
        if hasattr(row, "id"):
            names = [self.author_id if name == "author_id" else name for name in columns]
            return tuple([getattr(row, name) for name in names])
        return tuple(row)

    def with_author(self, row: Any) -> tuple[Any, ...]:
        """The values of a book and of its author."""
        if hasattr(row, "id"):
            return self.plain(row, rows.BOOK), self.plain(row.author, rows.AUTHOR)
        values = tuple(row)
        return values[: len(rows.BOOK)], values[len(rows.BOOK) :]

    def with_books(self, row: Any) -> tuple[Any, ...]:
        """The values of an author and of all books, by key."""
        author, books = self._books(row)
        found = [self.plain(book, rows.BOOK) for book in books]
        return self.plain(author, rows.AUTHOR), sorted(found)

    def _books(self, row: Any) -> tuple[Any, Any]:
        if isinstance(row, tuple):
            return row
        books = row.books
        return row, books.all() if hasattr(books, "all") else books


class Competitor:
    """A library, set up as its own documentation does.

    Attributes:
        name: as options and files name it.
        title: as tables show it.
        needs: the modules that must be importable.
        pool: competitors with the same pool take the connections of one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[Sequence[str]] = ()
    pool: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot take part here; None when it can."""
        absent = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    async def open(self) -> None:
        """Open the pool."""

    async def close(self) -> None:
        """Close it."""

    def enter(self) -> None:
        """Called before each turn, outside of the time that is taken."""

    def leave(self) -> None:
        """Called after each turn."""

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """What one task works with, for as long as the task lasts."""
        raise NotImplementedError
        yield
