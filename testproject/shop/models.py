"""The shop's tables."""

from __future__ import annotations

from decimal import Decimal

from django.core.validators import MinValueValidator, RegexValidator
from django.db import models
from django.utils import timezone


class Author(models.Model):
    """Who wrote a book."""

    name = models.CharField(max_length=100, unique=True)
    born = models.PositiveSmallIntegerField(null=True, blank=True)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Book(models.Model):
    """A title that the shop sells."""

    title = models.CharField(max_length=200, db_index=True)
    author = models.ForeignKey(Author, models.PROTECT, related_name="books")
    isbn = models.CharField(
        "ISBN",
        max_length=13,
        unique=True,
        validators=[
            RegexValidator(r"^97[89][0-9]{10}\Z", "An ISBN has 13 digits, from 978 or 979 on.")
        ],
    )
    price = models.DecimalField(
        max_digits=7, decimal_places=2, validators=[MinValueValidator(Decimal("0.01"))]
    )
    published = models.DateField()
    about = models.TextField(blank=True)

    class Meta:
        ordering = ("title", "id")

    def __str__(self) -> str:
        return self.title


class Stock(models.Model):
    """How many copies of a book are in one place."""

    class Place(models.TextChoices):
        """Where copies are kept; orders are served from the shop."""

        SHOP = "shop"
        WAREHOUSE = "warehouse"

    book = models.ForeignKey(Book, models.CASCADE, related_name="stock")
    place = models.CharField(max_length=10, choices=Place.choices)
    quantity = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = (models.UniqueConstraint(fields=["book", "place"], name="stock_per_place"),)

    def __str__(self) -> str:
        return f"{self.quantity} in {self.place}"


class Customer(models.Model):
    """Who orders."""

    name = models.CharField(max_length=100)
    email = models.EmailField(unique=True)
    joined = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    """What one customer ordered at one time."""

    customer = models.ForeignKey(Customer, models.PROTECT, related_name="orders")
    placed = models.DateTimeField(default=timezone.now, db_index=True)
    note = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ("-placed", "-id")

    def __str__(self) -> str:
        return f"order {self.pk}"


class OrderLine(models.Model):
    """Copies of one book in an order, at the price of that day."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="lines")
    book = models.ForeignKey(Book, models.PROTECT, related_name="order_lines")
    quantity = models.PositiveIntegerField(validators=[MinValueValidator(1)])
    price = models.DecimalField(max_digits=7, decimal_places=2)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.quantity} of book {self.book_id}"

    @property
    def total(self) -> Decimal:
        """Price of all copies of this line."""
        return self.price * self.quantity
