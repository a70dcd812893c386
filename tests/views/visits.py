"""Visits to the views, and what is in the database after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth.models import Permission
from django.contrib.auth.models import User as Account
from django.test import AsyncClient

from tests.models import Author, Book


async def read(fn: Callable[[], Any]) -> Any:
    """Look into the database through Django's own connection."""
    return await sync_to_async(fn)()


async def text(client: AsyncClient, url: str, status: int = 200) -> str:
    """The body of a page, which has this status."""
    response = await client.get(url)
    assert response.status_code == status, response.content
    return str(response.content.decode())


async def user(client: AsyncClient, *permissions: str, **fields: Any) -> Account:
    """A user who is logged in."""
    account = await read(lambda: Account.objects.create_user("ada", **fields))
    found = Permission.objects.filter(codename__in=permissions)
    await read(lambda: account.user_permissions.set(found))
    await client.aforce_login(account)
    return account


def titles() -> list[str]:
    return list(Book.objects.order_by("pk").values_list("title", flat=True))


def numbers() -> tuple[int, int, int]:
    """Primary keys of the first book, its author, and the author without books."""
    book = Book.objects.order_by("pk").first()
    assert book is not None
    return book.pk, book.author_id, Author.objects.get(name="Ivo Sato").pk
