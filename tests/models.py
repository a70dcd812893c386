"""Models that the tests share."""

from __future__ import annotations

import uuid

from django.db import models


class User(models.Model):
    name = models.CharField(max_length=100)
    level = models.IntegerField(default=1)
    xp = models.IntegerField(null=True)

    def __str__(self) -> str:
        return self.name


class Author(models.Model):
    name = models.CharField(max_length=100, unique=True)
    born = models.DateField(null=True)

    def __str__(self) -> str:
        return self.name


class Tag(models.Model):
    name = models.CharField(max_length=50)
    owner = models.ForeignKey(User, models.CASCADE, null=True, related_name="tags")

    def __str__(self) -> str:
        return self.name


class Book(models.Model):
    title = models.CharField(max_length=200)
    author = models.ForeignKey(Author, models.CASCADE, related_name="books")
    editor = models.ForeignKey(Author, models.SET_NULL, null=True, related_name="edited")
    tags = models.ManyToManyField(Tag, related_name="books")
    price = models.DecimalField(max_digits=8, decimal_places=2, default=0)
    updated = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return self.title


class Values(models.Model):
    """One nullable column of each kind of value that Django converts."""

    decimal = models.DecimalField(max_digits=20, decimal_places=6, null=True)
    date = models.DateField(null=True)
    time = models.TimeField(null=True)
    moment = models.DateTimeField(null=True)
    duration = models.DurationField(null=True)
    uid = models.UUIDField(null=True, default=uuid.uuid4)
    data = models.JSONField(null=True)
    binary = models.BinaryField(null=True)
    flag = models.BooleanField(null=True)
    number = models.FloatField(null=True)
    big = models.BigIntegerField(null=True)
    text = models.TextField(null=True)
