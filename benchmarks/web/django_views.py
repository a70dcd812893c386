"""The views of Django's contestants, and their application: with a session, and as Django has
them."""

from __future__ import annotations

import os
from typing import Any

import django
from django.http import HttpRequest, JsonResponse
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.web.settings")
django.setup()

from django.core.handlers.asgi import ASGIHandler  # noqa: E402

from benchmarks.models import Book  # noqa: E402
from benchmarks.web.bodies import body  # noqa: E402


async def get_in_session(request: Any, key: int) -> JsonResponse:
    """A book, in the request's session."""
    return JsonResponse(body(await request.db_session.get_one(Book, key)))


async def list_in_session(request: Any, key: int) -> JsonResponse:
    """The books of an author, in the request's session."""
    found = request.db_session.select(Book).where(author_id=key).order_by("id")
    return JsonResponse({"books": [body(book) for book in await found]})


async def get(request: HttpRequest, key: int) -> JsonResponse:
    """A book, by Django's own async method."""
    return JsonResponse(body(await Book.objects.aget(pk=key)))


async def list_all(request: HttpRequest, key: int) -> JsonResponse:
    """The books of an author, by Django's own async methods."""
    found = Book.objects.filter(author_id=key).order_by("id")
    return JsonResponse({"books": [body(book) async for book in found]})


_is_session = os.environ["BENCHMARKS_SERVED"].startswith("session")
urlpatterns = [
    path("books/<int:key>", get_in_session if _is_session else get),
    path("authors/<int:key>/books", list_in_session if _is_session else list_all),
]
application = ASGIHandler()
