"""Tortoise's models of the tables."""

from __future__ import annotations

from typing import Any

from tortoise import fields
from tortoise.models import Model


class Author(Model):
    """Who wrote a hundred books."""

    id = fields.BigIntField(primary_key=True)
    name = fields.CharField(max_length=100)
    born = fields.IntField(null=True)
    books: Any

    class Meta:
        table = "benchmarks_author"


class Book(Model):
    """What is read."""

    id = fields.BigIntField(primary_key=True)
    title = fields.CharField(max_length=200)
    author: Any = fields.ForeignKeyField("models.Author", related_name="books")
    pages = fields.IntField()
    price = fields.DecimalField(max_digits=8, decimal_places=2)
    published = fields.DateField()

    class Meta:
        table = "benchmarks_book"


class Draft(Model):
    """What is written."""

    id = fields.BigIntField(primary_key=True)
    title = fields.CharField(max_length=200)
    pages = fields.IntField()
    price = fields.DecimalField(max_digits=8, decimal_places=2)
    published = fields.DateField()

    class Meta:
        table = "benchmarks_draft"
