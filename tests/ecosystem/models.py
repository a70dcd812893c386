"""Models of packages whose managers and `save()` do more than Django's."""

from __future__ import annotations

from django.db import models
from djmoney.models.fields import MoneyField
from mptt.models import MPTTModel, TreeForeignKey
from polymorphic.models import PolymorphicModel
from safedelete.models import SOFT_DELETE_CASCADE, SafeDeleteModel
from treebeard.mp_tree import MP_Node


class Album(SafeDeleteModel):
    """Which is marked as deleted, with its tracks."""

    _safedelete_policy = SOFT_DELETE_CASCADE

    name = models.CharField(max_length=20, unique=True)


class Track(SafeDeleteModel):
    """Deleted with its album."""

    album = models.ForeignKey(Album, models.CASCADE, related_name="tracks")


class Animal(PolymorphicModel):
    """Whose rows are of the class they were made of."""

    name = models.CharField(max_length=20)


class Dog(Animal):
    """One of them, in a table of its own."""

    bark = models.CharField(max_length=20, default="woof")


class Category(MP_Node):
    """A tree in which a branch goes with its leaves."""

    name = models.CharField(max_length=20)


class Product(models.Model):
    """With a price in a currency."""

    price = MoneyField(
        max_digits=8,
        decimal_places=2,
        default_currency="EUR",
        currency_choices=[("EUR", "Euro"), ("USD", "Dollar")],
    )


class Area(MPTTModel):
    """A tree in numbers, whose class has a `threading.local`."""

    name = models.CharField(max_length=20)
    parent = TreeForeignKey("self", models.CASCADE, null=True, related_name="children")
