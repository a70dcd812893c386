"""`@inject_session`: the request's session, or one of the function's own.

With real commits where the end of a response, or what BEGIN says, is the point.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path
from django.views import View

from django_asyncsession import Session, SyncContextError, databases, inject_session
from tests.models import User
from tests.sessions import names

MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware"]


@inject_session
async def same(request: HttpRequest, session: Session) -> HttpResponse:
    own = session is not getattr(request, "db_session", None)
    return HttpResponse("own" if own else "the request's")


@inject_session(name="db", read_only=True)
async def with_options(request: HttpRequest, pk: int, db: Session) -> HttpResponse:
    own = db is not getattr(request, "db_session", None)
    read_only = await db.fetch_value("SHOW transaction_read_only")
    return HttpResponse(f"{pk} {own} {read_only}")


class Users(View):
    @inject_session
    async def get(self, request: HttpRequest, session: Session) -> HttpResponse:
        return await same(request)

    @inject_session
    async def post(self, request: HttpRequest, session: Session) -> HttpResponse:
        await session.add(User(name="posted"))
        raise ValueError("after the insert")


@inject_session
async def streaming(request: HttpRequest, session: Session) -> StreamingHttpResponse:
    await session.add(User(name="streamed"))

    async def body() -> AsyncIterator[str]:
        async for row in session.stream("SELECT generate_series(1, 3) AS n"):
            yield str(row.n)

    return StreamingHttpResponse(body())


urlpatterns = [
    path("same/", same),
    path("options/<int:pk>/", with_options),
    path("users/", Users.as_view()),
    path("stream/", streaming),
]


@pytest.fixture(autouse=True)
def urls() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE):
        yield


async def saved() -> list[str]:
    """Names of the users, in another session."""
    return await names(databases["default"])


@pytest.mark.django_db
@pytest.mark.parametrize("url", ["/same/", "/users/"])
async def test_a_view_gets_the_session_of_the_request(url: str) -> None:
    assert (await AsyncClient().get(url)).content == b"the request's"


@pytest.mark.django_db
@pytest.mark.parametrize("url", ["/same/", "/users/"])
async def test_without_the_middleware_a_view_gets_a_session_of_its_own(url: str) -> None:
    with override_settings(MIDDLEWARE=[]):
        assert (await AsyncClient().get(url)).content == b"own"


async def test_options_ask_for_a_session_of_its_own() -> None:
    """On a connection of the pool, as in a test's transaction it could not be read-only."""
    assert (await AsyncClient().get("/options/7/")).content == b"7 True on"
    await databases.close_all()


@pytest.mark.django_db
async def test_an_own_session_rolls_back_when_the_view_raises() -> None:
    with override_settings(MIDDLEWARE=[]), pytest.raises(ValueError, match="after the insert"):
        await AsyncClient().post("/users/")
    assert await saved() == []


@pytest.mark.usefixtures("empty_tables")
@pytest.mark.parametrize("middleware", [MIDDLEWARE, []])
async def test_a_streaming_body_keeps_the_session_and_commits_at_its_end(
    middleware: list[str],
) -> None:
    """As another connection sees it while the body is sent."""
    with override_settings(MIDDLEWARE=middleware):
        response = await AsyncClient().get("/stream/")
        assert await saved() == []
        assert b"".join([part async for part in response.streaming_content]) == b"123"
    assert await saved() == ["streamed"]
    await databases.close_all()


@pytest.mark.django_db
async def test_a_plain_coroutine_commits_at_its_end() -> None:
    @inject_session
    async def register(name: str, session: Session) -> str:
        await session.add(User(name=name))
        return name

    assert await register("plain") == "plain"
    assert await saved() == ["plain"]


@pytest.mark.django_db
async def test_a_caller_that_passes_a_session_is_left_alone() -> None:
    @inject_session
    async def register(name: str, session: Session) -> Session:
        await session.add(User(name=name))
        return session

    async with databases["default"].get_session() as outer:
        assert await register("inner", session=outer) is outer
        await outer.rollback()
    assert await saved() == []


@pytest.mark.django_db
async def test_a_channels_like_consumer_method_gets_a_session() -> None:
    class Consumer:
        @inject_session
        async def receive(self, text_data: str, session: Session) -> Any:
            return await session.fetch_value("SELECT %s::text", [text_data])

    assert await Consumer().receive("hello") == "hello"


@pytest.mark.parametrize("kind", ["function", "generator"])
def test_what_is_not_a_coroutine_function_is_refused(kind: str) -> None:
    def function(request: HttpRequest, session: Session) -> None: ...

    async def generator(session: Session) -> AsyncIterator[int]:
        yield 1

    with pytest.raises(SyncContextError, match="make it `async def`"):
        inject_session(function if kind == "function" else generator)


def test_the_session_is_not_in_the_signature_that_frameworks_read() -> None:
    assert list(inspect.signature(with_options).parameters) == ["request", "pk"]
    assert inspect.iscoroutinefunction(with_options)
