"""django-ninja: async endpoints in the request's session, with sessions and natively.

With real commits: what an endpoint did is saved, or rolled back, with its request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from django.db import transaction
from django.http import HttpRequest
from django.shortcuts import aget_list_or_404, aget_object_or_404
from django.test import AsyncClient, override_settings
from django.urls import path
from ninja import ModelSchema, NinjaAPI, Schema
from ninja.errors import HttpError
from ninja.pagination import LimitOffsetPagination, paginate
from ninja.security import HttpBearer

from django_asyncsession import Session, databases, inject_session, rollback_request
from tests.models import Author, Book, User
from tests.sessions import names, whole
from tests.threads import sent_to_threads

MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware"]
pytestmark = pytest.mark.usefixtures("empty_tables")
NATIVE = {"NATIVE_ORM": True, "NATIVE_MIDDLEWARE": True}
# Django logs errors in a thread, and its test client closes responses in one.
NOT_COUNTED = {"log_response", "HttpResponseBase.close"}
committed: list[str] = []


class API(NinjaAPI):
    """As the page on native mode has it: what ninja makes a response of is rolled back."""

    def on_exception(self, request: HttpRequest, exc: Any) -> Any:
        rollback_request(request)
        return super().on_exception(request, exc)


class Token(HttpBearer):
    async def authenticate(self, request: HttpRequest, token: str) -> Any:
        return await User.objects.filter(name=token).afirst()


class AuthorIn(Schema):
    name: str


class AuthorOut(ModelSchema):
    class Meta:
        model = Author
        fields = ("id", "name")


class BookOut(ModelSchema):
    author: AuthorOut

    class Meta:
        model = Book
        fields = ("id", "title")


class TaggedOut(ModelSchema):
    class Meta:
        model = Book
        fields = ("title", "tags")


api = API(urls_namespace="tests")


@api.post("/authors", response=AuthorOut)
@inject_session
async def add_author(request: HttpRequest, data: AuthorIn, session: Session) -> Author:
    return await session.add(Author(name=data.name))


@api.post("/authors/natively", response=AuthorOut)
async def add_natively(request: HttpRequest, data: AuthorIn) -> Author:
    author = await Author.objects.acreate(**data.dict())
    await author.books.acreate(title=f"By {author.name}")
    transaction.on_commit(lambda: committed.append(author.name))
    assert await request.db_session.fetch_value("SELECT COUNT(*) FROM tests_book") == 1  # type: ignore[attr-defined]
    return author


@api.get("/authors/{pk}", response=AuthorOut)
async def get_author(request: HttpRequest, pk: int) -> Author:
    return await aget_object_or_404(Author, pk=pk)


@api.get("/books/awaited", response=list[BookOut])
async def awaited(request: HttpRequest) -> list[Book]:
    return [book async for book in Book.objects.select_related("author").order_by("title")]


@api.get("/books/by-session", response=list[BookOut])
@inject_session
async def by_session(request: HttpRequest, session: Session) -> list[Book]:
    return await session.select(Book).related("author").order_by("title")


@api.get("/books/run", response=list[BookOut])
async def run(request: HttpRequest) -> Any:
    books = Book.objects.select_related("author").order_by("title")
    return await request.db_session.run_sync(list, books)  # type: ignore[attr-defined]


@api.get("/books/or-404", response=list[BookOut])
async def or_404(request: HttpRequest, title: str) -> Any:
    return await aget_list_or_404(Book.objects.select_related("author"), title=title)


@api.get("/books/tagged", response=list[TaggedOut])
async def tagged(request: HttpRequest) -> Any:
    return [book async for book in Book.objects.prefetch_related("tags")]


@api.get("/books/paged", response=list[BookOut])
@paginate(LimitOffsetPagination)
async def paged(request: HttpRequest) -> Any:
    return Book.objects.select_related("author").order_by("title")


@api.get("/books/lazy", response=list[BookOut])
async def lazy(request: HttpRequest) -> Any:
    return Book.objects.select_related("author")


@api.get("/books/unloaded", response=list[BookOut])
async def unloaded(request: HttpRequest) -> Any:
    return [book async for book in Book.objects.all()]


@api.get("/me", auth=Token())
async def me(request: HttpRequest) -> str:
    return request.auth.name  # type: ignore[attr-defined]


@api.post("/fail/{how}")
async def fail(request: HttpRequest, how: str) -> None:
    await request.db_session.add(User(name="half"))  # type: ignore[attr-defined]
    if how == "refused":
        raise HttpError(409, "no more users")
    raise ValueError("after the insert")


plain = NinjaAPI(urls_namespace="plain")
plain.post("/fail/{how}")(fail)

urlpatterns = [path("api/", api.urls), path("plain/", plain.urls)]


@pytest.fixture(autouse=True, params=[{}, NATIVE], ids=["", "native"])
async def mode(request: Any) -> AsyncIterator[dict[str, Any]]:
    committed.clear()
    with override_settings(
        ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE, ASYNC_SESSION=request.param
    ):
        yield request.param
        await databases.close_all()


in_native_mode = pytest.mark.parametrize("mode", [NATIVE], ids=["native"], indirect=True)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that went to a thread."""
    return sent_to_threads(monkeypatch, lambda fn: fn.__qualname__ not in NOT_COUNTED)


@pytest.fixture
async def books() -> list[dict[str, Any]]:
    """Two books, and how the endpoints show them."""
    async with databases["default"].get_session() as session:
        author = await session.add(Author(name="Ada"))
        made = [await session.add(Book(title=t, author=author)) for t in ("First", "Second")]
    shown = {"id": author.pk, "name": "Ada"}
    return [{"id": book.pk, "title": book.title, "author": shown} for book in made]


def post(url: str, **data: Any) -> Any:
    return AsyncClient(raise_request_exception=False).post(
        url, data, content_type="application/json"
    )


async def test_an_endpoint_takes_the_session_of_its_request() -> None:
    response = await post("/api/authors", name="Ada")
    assert response.status_code == 200 and response.json()["name"] == "Ada"
    async with databases["default"].get_session() as session:
        assert await session.fetch_value("SELECT name FROM tests_author") == "Ada"


async def test_the_session_is_no_parameter_of_the_api() -> None:
    operation = api.get_openapi_schema()["paths"]["/api/authors"]["post"]
    assert operation.get("parameters") == []
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/AuthorIn"}


@in_native_mode
async def test_djangos_own_methods_are_in_the_session_and_in_no_thread(threads: list[str]) -> None:
    response = await post("/api/authors/natively", name="Ada")
    assert response.json()["name"] == "Ada"
    assert committed == ["Ada"]
    author = response.json()["id"]
    assert (await AsyncClient().get(f"/api/authors/{author}")).json()["name"] == "Ada"
    assert (await AsyncClient().get("/api/authors/4711")).status_code == 404
    assert threads == []


@pytest.mark.parametrize("url", ["by-session", "run"])
async def test_rows_that_the_session_loaded_are_serialized(
    url: str, books: list[dict[str, Any]]
) -> None:
    assert (await AsyncClient().get(f"/api/books/{url}")).json() == books


@in_native_mode
@pytest.mark.parametrize("url", ["awaited", "run", "paged"])
async def test_a_queryset_that_is_awaited_is_serialized_without_a_thread(
    url: str, books: list[dict[str, Any]], threads: list[str]
) -> None:
    found = (await AsyncClient().get(f"/api/books/{url}")).json()
    assert found == ({"items": books, "count": 2} if url == "paged" else books)
    assert threads == []


@in_native_mode
async def test_a_list_or_404(books: list[dict[str, Any]], threads: list[str]) -> None:
    assert (await AsyncClient().get("/api/books/or-404?title=First")).json() == books[:1]
    assert (await AsyncClient().get("/api/books/or-404?title=Third")).status_code == 404
    assert threads == []


@in_native_mode
async def test_relations_to_many_are_serialized_when_they_are_prefetched(
    books: list[dict[str, Any]], threads: list[str]
) -> None:
    found = (await AsyncClient().get("/api/books/tagged")).json()
    assert found == [{"title": "First", "tags": []}, {"title": "Second", "tags": []}]
    assert threads == []


@in_native_mode
@pytest.mark.parametrize("url", ["lazy", "unloaded"])
async def test_what_is_not_loaded_is_refused_with_the_remedy(
    url: str, books: list[dict[str, Any]]
) -> None:
    with pytest.raises(Exception) as caught:
        await AsyncClient().get(f"/api/books/{url}")
    print(repr(caught.value))


@in_native_mode
async def test_async_authentication_is_in_the_session(threads: list[str]) -> None:
    await User.objects.acreate(name="ada")
    threads.clear()
    client = AsyncClient()
    assert (await client.get("/api/me", headers={"Authorization": "Bearer ada"})).json() == "ada"
    refused = await client.get("/api/me", headers={"Authorization": "Bearer bob"})
    assert refused.status_code == 401
    assert threads == []


@pytest.mark.parametrize(("how", "status"), [("refused", 409), ("failed", 500)])
async def test_an_error_rolls_back(how: str, status: int) -> None:
    db = databases["default"]
    assert (await post(f"/api/fail/{how}")).status_code == status
    assert await names(db) == []
    await whole(db)


async def test_an_error_that_ninja_answers_in_debug_mode_rolls_back() -> None:
    with override_settings(DEBUG=True):
        assert (await post("/api/fail/failed")).status_code == 500
    assert await names(databases["default"]) == []


async def test_without_the_handler_an_error_with_an_answer_of_its_own_is_saved() -> None:
    """As with Django's own ATOMIC_REQUESTS: nobody but ninja knows that something was raised."""
    assert (await post("/plain/fail/refused")).status_code == 409
    assert await names(databases["default"]) == ["half"]
