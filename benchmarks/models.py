"""Django's models of the tables that every competitor reads and writes."""

from __future__ import annotations

from django.db import models


class Author(models.Model):
    """Who wrote a hundred books."""

    name = models.CharField(max_length=100)
    born = models.IntegerField(null=True)

    class Meta:
        db_table = "benchmarks_author"

    def __str__(self) -> str:
        return self.name


class Book(models.Model):
    """What is read."""

    title = models.CharField(max_length=200)
    author = models.ForeignKey(Author, models.CASCADE, related_name="books")
    pages = models.IntegerField(db_index=True)
    price = models.DecimalField(max_digits=8, decimal_places=2)
    published = models.DateField()

    class Meta:
        db_table = "benchmarks_book"

    def __str__(self) -> str:
        return self.title


class Draft(models.Model):
    """What is written; emptied and filled again before each turn."""

    title = models.CharField(max_length=200)
    pages = models.IntegerField()
    price = models.DecimalField(max_digits=8, decimal_places=2)
    published = models.DateField()

    class Meta:
        db_table = "benchmarks_draft"

    def __str__(self) -> str:
        return self.title
