"""Piccolo's tables."""

from __future__ import annotations

from piccolo.columns import (
    BigSerial,
    Date,
    ForeignKey,
    Integer,
    Numeric,
    Varchar,
)
from piccolo.table import Table


class Author(Table, tablename="benchmarks_author"):
    """Who wrote a hundred books."""

    id = BigSerial(primary_key=True)
    name = Varchar(length=100)
    born = Integer(null=True, default=None)


class Book(Table, tablename="benchmarks_book"):
    """What is read."""

    id = BigSerial(primary_key=True)
    title = Varchar(length=200)
    author = ForeignKey(Author, db_column_name="author_id")
    pages = Integer()
    price = Numeric(digits=(8, 2))
    published = Date()


class Draft(Table, tablename="benchmarks_draft"):
    """What is written."""

    id = BigSerial(primary_key=True)
    title = Varchar(length=200)
    pages = Integer()
    price = Numeric(digits=(8, 2))
    published = Date()
