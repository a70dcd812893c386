"""Models that the tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.postgres.fields import ArrayField, DateRangeField, IntegerRangeField
from django.core.files.storage import InMemoryStorage
from django.db import models
from django.db.models.query import ModelIterable


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


class SoftQuerySet(models.QuerySet["Soft"]):
    """Which deletes by marking, and stamps what it inserts and updates."""

    def delete(self) -> tuple[int, dict[str, int]]:
        count = models.QuerySet.update(self, gone=True)
        return count, {"tests.Soft": count}

    def update(self, **values: object) -> int:
        return super().update(stamp="updated", **values)

    def bulk_create(self, rows: object, *args: object, **options: object) -> list[Soft]:  # type: ignore[override]
        for row in rows:  # type: ignore[attr-defined]
            row.stamp = "inserted"
        return super().bulk_create(rows, *args, **options)  # type: ignore[arg-type]


class Soft(models.Model):
    """Of several tenants, of whom the default manager shows one, and not what is deleted."""

    class Visible(models.Manager.from_queryset(SoftQuerySet)):  # type: ignore[misc]
        def get_queryset(self) -> models.QuerySet[Soft]:
            found: models.QuerySet[Soft] = super().get_queryset().filter(tenant=1, gone=False)
            return found

    tenant = models.IntegerField(default=1)
    name = models.CharField(max_length=20, unique=True)
    stamp = models.CharField(max_length=20, default="")
    gone = models.BooleanField(default=False)

    objects = Visible()
    everything = models.Manager()


class Patched(models.Model):
    """Whose manager patches the QuerySet it makes, as packages do."""

    class Euro(models.Manager["Patched"]):
        def get_queryset(self) -> models.QuerySet[Patched]:
            queryset = super().get_queryset()
            plain = queryset.filter
            queryset.filter = lambda *args, **kw: plain(*args, **kw, currency="EUR")  # type: ignore[method-assign]
            return queryset

    amount = models.IntegerField()
    currency = models.CharField(max_length=3)

    objects = Euro()


class Node(models.Model):
    """Of a tree that is kept in paths: with a row go those below it."""

    class Tree(models.QuerySet["Node"]):
        def delete(self) -> None:  # type: ignore[override]
            for path in list(self.values_list("path", flat=True)):
                everything: models.QuerySet[Node] = models.QuerySet(self.model, using=self.db)
                everything.filter(path__startswith=path).delete()

    path = models.CharField(max_length=20)

    objects = Tree.as_manager()


class Shape(models.Model):
    """Whose rows come back as the class that they were made as."""

    class Kinds(models.QuerySet["Shape"]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            self._iterable_class = OfTheirKind

        def bulk_create(self, rows: object, *args: object, **options: object) -> list[Shape]:  # type: ignore[override]
            for row in rows:  # type: ignore[attr-defined]
                row.kind = type(row).__name__
            return super().bulk_create(rows, *args, **options)  # type: ignore[arg-type]

    kind = models.CharField(max_length=20, default="")
    side = models.IntegerField(unique=True)

    objects = Kinds.as_manager()

    def save(self, *args: object, **kwargs: object) -> None:
        self.kind = type(self).__name__
        super().save(*args, **kwargs)  # type: ignore[arg-type]


class Square(Shape):
    """One of them, in the same table."""

    class Meta:
        proxy = True


class OfTheirKind(ModelIterable):  # type: ignore[type-arg]
    """The rows of a query, each of its own class."""

    def __iter__(self) -> Iterator[Shape]:
        for row in super().__iter__():
            row.__class__ = {"Square": Square}.get(row.kind, Shape)
            yield row


class Careless(models.Model):
    """Whose manager forgets its database, and inserts by itself."""

    class Own(models.Manager["Careless"]):
        def get_queryset(self) -> models.QuerySet[Careless]:
            return models.QuerySet(self.model)

        def bulk_create(self, rows: object, *args: object, **options: object) -> list[Careless]:  # type: ignore[override]
            made: list[Careless] = list(rows)  # type: ignore[call-overload]
            for row in made:
                row.save(using=self._db, force_insert=True)
            return made

    name = models.CharField(max_length=20)

    objects = Own()


class Dish(models.Model):
    """Whose `save()` writes to another table too."""

    price = models.IntegerField(default=0)
    title = ""

    def save(self, *args: object, **kwargs: object) -> None:
        super().save(*args, **kwargs)  # type: ignore[arg-type]
        if self.title:
            Tag.objects.using(kwargs.get("using")).create(name=self.title)  # type: ignore[arg-type]


class Opaque:
    """A value that is equal to itself only."""

    def __init__(self, text: str) -> None:
        self.text = text


class OpaqueField(models.CharField):  # type: ignore[type-arg]
    def from_db_value(self, value: str | None, *args: object) -> Opaque | None:
        return None if value is None else Opaque(value)

    def get_prep_value(self, value: object) -> str | None:
        return value.text if isinstance(value, Opaque) else None


class Wrapped(models.Model):
    """With values that packages wrap."""

    opaque = OpaqueField(max_length=20, null=True)
    uid = models.UUIDField(null=True)
    number = models.IntegerField(null=True)
    day = models.DateField(null=True)
    ratio = models.FloatField(null=True)


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
