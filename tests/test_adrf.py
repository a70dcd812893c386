"""adrf: async views, viewsets and serializers of Django REST framework, in the request's session.

With real commits: what a thread on Django's own connection does not see is the point.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from adrf import generics, viewsets
from adrf.serializers import ModelSerializer
from adrf.views import APIView
from asgiref.sync import SyncToAsync
from django.http import HttpRequest
from django.test import AsyncClient, override_settings
from django.urls import path
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import APIException
from rest_framework.pagination import LimitOffsetPagination
from rest_framework.permissions import BasePermission
from rest_framework.response import Response

from django_asyncsession import Session, databases, inject_session, keep_thread, native
from tests.models import Author, Book, Tag, User
from tests.sessions import names, whole
from tests.threads import sent_to_threads

MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware"]
NATIVE = {"NATIVE_ORM": True}
WITHOUT_THREADS = {"NATIVE_ORM": True, "NATIVE_MIDDLEWARE": True}
# Django logs errors in a thread, and its test client closes responses in one.
NOT_COUNTED = {"log_response", "HttpResponseBase.close"}
pytestmark = pytest.mark.usefixtures("empty_tables")


class AuthorSerializer(ModelSerializer):
    class Meta:
        model = Author
        fields = ("id", "name")


class BookSerializer(ModelSerializer):
    class Meta:
        model = Book
        fields = ("title", "author", "tags")


class Page(LimitOffsetPagination):
    default_limit = 2


class Authors(viewsets.ModelViewSet):
    """Nothing here knows of sessions."""

    queryset = Author.objects.order_by("name")
    serializer_class = AuthorSerializer
    pagination_class = Page


class Books(generics.ListCreateAPIView):
    queryset = Book.objects.order_by("title")
    serializer_class = BookSerializer


class ByName(BaseAuthentication):
    """Sync, as most are."""

    def authenticate(self, request: HttpRequest) -> Any:
        user = User.objects.filter(name=request.headers.get("X-Name")).first()
        return user and (user, None)


class IsHigh(BasePermission):
    def has_permission(self, request: HttpRequest, view: Any) -> bool:
        return getattr(request.user, "level", 0) > 1 and User.objects.exists()


class Guarded(APIView):
    authentication_classes = (ByName,)
    permission_classes = (IsHigh,)

    async def get(self, request: HttpRequest) -> Response:
        return Response(request.user.name)


@keep_thread
class InThread(Guarded):
    """Whose authentication waits for another server, say."""


class Registration(APIView):
    @inject_session
    async def post(self, request: Any, session: Session) -> Response:
        user = await session.add(User(name=request.data["name"]))
        assert request.db_session is session
        if request.data["name"] == "refused":
            refused = APIException("no more users")
            refused.status_code = 409
            raise refused
        if request.data["name"] == "failed":
            raise ValueError("after the insert")
        return Response({"id": user.pk}, status=201)


urlpatterns = [
    path("authors/", Authors.as_view({"get": "alist", "post": "acreate"})),
    path(
        "authors/<int:pk>/",
        Authors.as_view({"get": "aretrieve", "put": "aupdate", "delete": "adestroy"}),
    ),
    path("books/", Books.as_view()),
    path("guarded/", Guarded.as_view()),
    path("in-thread/", InThread.as_view()),
    path("users/", Registration.as_view()),
]

ALL = [{}, NATIVE, WITHOUT_THREADS]


@pytest.fixture(autouse=True, params=ALL, ids=["", "native", "without threads"])
async def mode(request: Any) -> AsyncIterator[dict[str, Any]]:
    with override_settings(
        ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE, ASYNC_SESSION=request.param
    ):
        yield request.param
        await databases.close_all()


in_native_mode = pytest.mark.parametrize("mode", ALL[1:], ids=["orm", "all"], indirect=True)
without_threads = pytest.mark.parametrize("mode", ALL[2:], ids=["all"], indirect=True)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that went to a thread."""
    return sent_to_threads(monkeypatch, lambda fn: fn.__qualname__ not in NOT_COUNTED)


class Client(AsyncClient):
    """Speaks JSON, and gets the error response, as a browser does."""

    def __init__(self) -> None:
        super().__init__(raise_request_exception=False)

    async def send(self, method: str, url: str, **data: Any) -> Any:
        send = getattr(self, method)
        return await send(url, data, content_type="application/json")


@without_threads
async def test_a_viewset_that_knows_nothing_of_sessions_uses_the_requests_and_no_thread(
    threads: list[str],
) -> None:
    client = Client()
    made = [await client.send("post", "/authors/", name=name) for name in ("Cy", "Ada", "Bob")]
    assert [response.status_code for response in made] == [201, 201, 201]
    pk = made[0].json()["id"]
    page = (await client.get("/authors/")).json()
    assert ([author["name"] for author in page["results"]], page["count"]) == (["Ada", "Bob"], 3)
    assert (await client.get(f"/authors/{pk}/")).json() == {"id": pk, "name": "Cy"}
    assert (await client.send("put", f"/authors/{pk}/", name="Dee")).json()["name"] == "Dee"
    assert (await client.delete(f"/authors/{pk}/")).status_code == 204
    assert (await client.get(f"/authors/{pk}/")).status_code == 404
    assert threads == []


@in_native_mode
async def test_what_is_not_unique_is_refused_with_and_without_threads() -> None:
    client = Client()
    made = await client.send("post", "/authors/", name="Ada")
    assert made.status_code == 201
    again = await client.send("post", "/authors/", name="Ada")
    assert (again.status_code, list(again.json())) == (400, ["name"])
    assert (await client.get("/authors/")).json()["count"] == 1


@in_native_mode
async def test_what_the_request_has_made_is_in_its_answer(threads: list[str]) -> None:
    """The relations are read in the transaction that has not been committed yet."""
    author = await Author.objects.acreate(name="Ada")
    tags = [(await Tag.objects.acreate(name=name)).pk for name in ("red", "blue")]
    threads.clear()
    data = {"title": "Notes", "author": author.pk, "tags": tags}
    made = await Client().send("post", "/books/", **data)
    assert (made.status_code, made.json()) == (201, data)
    assert (await Client().get("/books/")).json() == [data]


@without_threads
async def test_sync_authentication_and_permissions_are_in_the_session(threads: list[str]) -> None:
    await User.objects.acreate(name="ada", level=2)
    await User.objects.acreate(name="bob", level=1)
    threads.clear()
    client = Client()
    assert (await client.get("/guarded/", headers={"X-Name": "ada"})).json() == "ada"
    assert (await client.get("/guarded/", headers={"X-Name": "bob"})).status_code == 403
    assert threads == []


@without_threads
async def test_a_view_may_keep_its_thread(threads: list[str]) -> None:
    await Client().get("/in-thread/", headers={"X-Name": "ada"})
    assert threads == ["APIView.initial"]


async def test_a_view_takes_the_session_of_its_request() -> None:
    response = await Client().send("post", "/users/", name="Ada")
    assert response.status_code == 201
    assert await names(databases["default"]) == ["Ada"]


@pytest.mark.parametrize(("name", "status"), [("refused", 409), ("failed", 500)])
async def test_an_error_rolls_back_also_when_it_is_answered(name: str, status: int) -> None:
    db = databases["default"]
    assert (await Client().send("post", "/users/", name=name)).status_code == status
    assert await names(db) == []
    await whole(db)


@in_native_mode
async def test_uninstalling_gives_adrf_its_threads_back() -> None:
    from adrf import mixins

    assert mixins.sync_to_async is not SyncToAsync
    routed = mixins.sync_to_async
    native.uninstall()
    try:
        assert mixins.sync_to_async is not routed
        assert mixins.sync_to_async.__module__ == "asgiref.sync"
    finally:
        native.install()
