"""SQLAlchemy's declarative models of the tables."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

from sqlalchemy import BigInteger, Date, ForeignKey, Integer, Numeric, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """Of all models."""


class Author(Base):
    """Who wrote a hundred books."""

    __tablename__ = "benchmarks_author"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    born: Mapped[int | None] = mapped_column(Integer)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    """What is read."""

    __tablename__ = "benchmarks_book"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    author_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("benchmarks_author.id"))
    pages: Mapped[int] = mapped_column(Integer)
    price: Mapped[Decimal] = mapped_column(Numeric(8, 2))
    published: Mapped[date] = mapped_column(Date)
    author: Mapped[Author] = relationship(back_populates="books")


class Draft(Base):
    """What is written."""

    __tablename__ = "benchmarks_draft"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    pages: Mapped[int] = mapped_column(Integer)
    price: Mapped[Decimal] = mapped_column(Numeric(8, 2))
    published: Mapped[date] = mapped_column(Date)
