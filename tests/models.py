"""Models that the tests share."""

from __future__ import annotations

import uuid

from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.postgres.fields import ArrayField, DateRangeField, IntegerRangeField
from django.core.files.storage import InMemoryStorage
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


class Profile(models.Model):
    user = models.OneToOneField(User, models.CASCADE, related_name="profile")
    bio = models.TextField(default="")


class Place(models.Model):
    name = models.CharField(max_length=50)
    city = models.CharField(max_length=50, default="Ghent")


class Restaurant(Place):
    """Of two tables."""

    stars = models.IntegerField(default=0)
    updated = models.DateTimeField(auto_now=True)


class Hero(User):
    """Another class of the same table."""

    class Meta:
        proxy = True


class Line(models.Model):
    """With a primary key of two columns."""

    pk = models.CompositePrimaryKey("order", "number")
    order = models.IntegerField()
    number = models.IntegerField()
    text = models.CharField(max_length=50, default="")


class Box(models.Model):
    """With columns that the database computes."""

    width = models.IntegerField()
    height = models.IntegerField(db_default=7)
    area = models.GeneratedField(
        expression=models.F("width") * models.F("height"),
        output_field=models.IntegerField(),
        db_persist=True,
    )
    made = models.DateTimeField(auto_now_add=True)


class Member(models.Model):
    """With unique constraints of every kind, and field names that tables have too."""

    email = models.CharField(max_length=50)
    club = models.CharField(max_length=50)
    active = models.BooleanField(default=True)
    name = models.CharField(max_length=50, default="", db_column="full_name")
    columns = models.IntegerField(default=0)

    class Meta:
        constraints = (models.UniqueConstraint(fields=["email", "club"], name="one_per_club"),)


class Account(models.Model):
    """With a unique index on a part of its rows only."""

    owner = models.CharField(max_length=50)
    closed = models.BooleanField(default=False)
    balance = models.IntegerField(default=0)

    class Meta:
        required_db_features = ("supports_partial_indexes",)
        constraints = (
            models.UniqueConstraint(
                fields=["owner"], condition=models.Q(closed=False), name="one_open"
            ),
        )


class Slug(models.Model):
    """Whose `save()` computes a field, and which may only be read in part by default."""

    class Visible(models.Manager["Slug"]):
        def get_queryset(self) -> models.QuerySet[Slug]:
            return super().get_queryset().filter(hidden=False)

    title = models.CharField(max_length=50)
    slug = models.CharField(max_length=50, default="")
    hidden = models.BooleanField(default=False)

    objects = Visible()

    def save(self, *args: object, **kwargs: object) -> None:
        self.slug = self.title.lower()
        super().save(*args, **kwargs)  # type: ignore[arg-type]


class Note(models.Model):
    """About a row of any table."""

    text = models.CharField(max_length=50)
    # Tables without migrations are made before those of contenttypes.
    kind = models.ForeignKey("contenttypes.ContentType", models.CASCADE, db_constraint=False)
    number = models.BigIntegerField()
    about = GenericForeignKey("kind", "number")


class Shelf(models.Model):
    name = models.CharField(max_length=50)
    parent = models.ForeignKey("self", models.CASCADE, null=True, related_name="children")
    notes = GenericRelation(Note, content_type_field="kind", object_id_field="number")


class Upload(models.Model):
    file = models.FileField(storage=InMemoryStorage(), null=True)


class Ranges(models.Model):
    """Types that only PostgreSQL has; other databases have no such table."""

    numbers = ArrayField(models.IntegerField(), null=True)
    names = ArrayField(models.CharField(max_length=20), default=list)
    span = IntegerRangeField(null=True)
    days = DateRangeField(null=True)

    class Meta:
        required_db_vendor = "postgresql"
