"""Native mode in requests: the middleware's session serves Django's own async methods, and ends
with those of other aliases.

With real commits where their order, or what the pool keeps, is the point.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import alogin
from django.contrib.auth.decorators import permission_required
from django.contrib.auth.models import User as Account
from django.db import IntegrityError, connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from django_asyncsession import Session, databases, inject_session, native
from django_asyncsession.scope import RequestScope
from tests.models import Author, Book, Tag, User
from tests.threads import sent_to_threads

MIDDLEWARE = [
    "django_asyncsession.middleware.AsyncSessionMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
# In one transaction on each.
two_databases = pytest.mark.django_db(databases=["default", "sqlite"])
committed: list[Any] = []
# Parts of Django's middleware and of its handler, which have a setting of their own.
NOT_COUNTED = {
    "process_request",
    "process_response",
    "process_exception_by_middleware",
    "response_for_exception",
}


async def add(request: HttpRequest) -> HttpResponse:
    ada = await Author.objects.acreate(name="Ada")
    await ada.books.acreate(title="Notes")
    count = await request.db_session.fetch_value("SELECT COUNT(*) FROM tests_book")
    return HttpResponse(str(count))


async def fail(request: HttpRequest) -> HttpResponse:
    await User.objects.acreate(name="half")
    await User.objects.using("sqlite").acreate(name="half")
    raise ValueError("after the insert")


async def both(request: HttpRequest) -> HttpResponse:
    await User.objects.using("sqlite").acreate(name="there")
    await User.objects.acreate(name="here")
    transaction.on_commit(note)
    return HttpResponse("ok")


async def note() -> None:
    """It sees what is committed, and what it does itself is saved too."""
    committed.append(await User.objects.using("sqlite").acount())


async def orphan_here(request: HttpRequest) -> HttpResponse:
    await User.objects.using("sqlite").acreate(name="there")
    await Tag.objects.acreate(name="orphan", owner_id=4711)
    return HttpResponse("not saved")


async def orphan_there(request: HttpRequest) -> HttpResponse:
    await User.objects.acreate(name="here")
    await Tag.objects.using("sqlite").acreate(name="orphan", owner_id=4711)
    return HttpResponse("not saved")


async def parallel(request: HttpRequest) -> HttpResponse:
    await User.objects.acreate(name="Ada")
    counts = await asyncio.gather(User.objects.acount(), Author.objects.acount(), aged())
    return HttpResponse(repr(counts))


async def aged() -> int:
    return await Book.objects.acount()


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    await User.objects.abulk_create([User(name=f"{i}") for i in range(7)])

    async def body() -> AsyncIterator[str]:
        async for user in User.objects.order_by("name").aiterator(chunk_size=2):
            yield user.name

    return StreamingHttpResponse(body())


async def log_in(request: HttpRequest) -> HttpResponse:
    user = await Account.objects.acreate_user("ada")
    await alogin(request, user)
    await request.session.aset("color", "red")
    return HttpResponse("ok")


async def who(request: HttpRequest) -> HttpResponse:
    user = await request.auser()
    allowed = await user.ahas_perm("tests.add_book")
    return HttpResponse(f"{user.username} {await request.session.aget('color')} {allowed}")


@permission_required("tests.add_book", raise_exception=True)
async def protected(request: HttpRequest) -> HttpResponse:
    return HttpResponse("never")


@inject_session(alias="sqlite")
async def injected(request: HttpRequest, session: Any) -> HttpResponse:
    await User.objects.using("sqlite").acreate(name="injected")
    return HttpResponse(str(await session.fetch_value("SELECT COUNT(*) FROM tests_user")))


outlived: list[asyncio.Task[Any]] = []
finished: list[asyncio.Event] = []


async def background(request: HttpRequest) -> HttpResponse:
    finished[:] = [asyncio.Event()]
    outlived.append(asyncio.create_task(later(finished[0])))
    await User.objects.acreate(name="Ada")
    return HttpResponse("ok")


async def later(event: asyncio.Event) -> Any:
    await event.wait()
    return native.current()


views = (add, fail, both, orphan_here, orphan_there, parallel, stream, log_in, who, protected)
urlpatterns = [path(f"{v.__name__}/", v) for v in (*views, injected, background)]


@pytest.fixture(autouse=True, params=[True, False], ids=["atomic", "autocommit"])
async def native_mode(request: Any) -> AsyncIterator[None]:
    committed.clear()
    outlived.clear()
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=MIDDLEWARE,
        ASYNC_SESSION={"NATIVE_ORM": True, "ATOMIC_REQUESTS": request.param},
    ):
        yield
        await databases.close_all()


only_atomic = pytest.mark.parametrize("native_mode", [True], ids=["atomic"], indirect=True)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions, other than parts of middleware, that went to a thread inside a
    request."""
    return sent_to_threads(
        monkeypatch,
        lambda fn: native.current() is not None and fn.__name__ not in NOT_COUNTED,
    )


def names(alias: str = "default") -> list[str]:
    """What is committed, seen from a connection of the test's own."""
    try:
        users = User.objects.using(alias).values_list("name", flat=True)
        return [*users, *Tag.objects.using(alias).values_list("name", flat=True)]
    finally:
        connections[alias].close()


saved: Callable[..., Any] = sync_to_async(names)


@pytest.fixture
def quiet() -> AsyncClient:
    """A client that gets the error response, as a browser does, instead of the exception."""
    return AsyncClient(raise_request_exception=False)


@two_databases
async def test_a_view_that_knows_nothing_of_sessions_uses_the_requests(threads: list[str]) -> None:
    assert (await AsyncClient().get("/add/")).content == b"1"
    assert threads == []


@two_databases
@only_atomic
async def test_all_aliases_are_rolled_back_when_the_view_raises(quiet: AsyncClient) -> None:
    assert (await quiet.get("/fail/")).status_code == 500
    assert await saved() == await saved("sqlite") == []


@pytest.mark.usefixtures("empty_tables")
@only_atomic
async def test_all_aliases_are_committed_before_the_response_leaves(threads: list[str]) -> None:
    """For real, with the callbacks that wait for it."""
    assert (await AsyncClient().get("/both/")).status_code == 200
    assert (await saved(), await saved("sqlite")) == (["here"], ["there"])
    assert committed == [1]
    assert threads == []


@two_databases
@only_atomic
async def test_a_failed_last_commit_is_reported_with_both_names(
    quiet: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The alias of the middleware is committed last, so that only others can be saved alone."""
    with caplog.at_level(logging.ERROR, "django_asyncsession"):
        assert (await quiet.get("/orphan_here/")).status_code == 500
    assert (await saved(), await saved("sqlite")) == ([], ["there"])
    text = "the commit on 'default' failed after 'sqlite' was committed"
    assert text in caplog.text
    with pytest.raises(IntegrityError) as caught:
        await AsyncClient().get("/orphan_here/")
    assert text in caught.value.__notes__[0]


@two_databases
@only_atomic
async def test_a_failed_first_commit_leaves_nothing_anywhere(quiet: AsyncClient) -> None:
    assert (await quiet.get("/orphan_there/")).status_code == 500
    assert await saved() == await saved("sqlite") == []


@two_databases
async def test_tasks_of_a_view_share_its_session(threads: list[str]) -> None:
    assert (await AsyncClient().get("/parallel/")).content == b"[1, 0, 0]"
    assert threads == []


@two_databases
async def test_a_streaming_body_uses_the_requests_session(threads: list[str]) -> None:
    response: Any = await AsyncClient().get("/stream/")
    assert b"".join([part async for part in response]) == b"0123456"
    assert threads == []


@two_databases
async def test_users_and_sessions_are_the_requests(threads: list[str]) -> None:
    client = AsyncClient()
    await client.get("/log_in/")
    assert (await client.get("/who/")).content == b"ada red False"
    assert (await client.get("/protected/")).status_code == 403
    assert threads == []


@two_databases
@pytest.mark.parametrize("engine", ["db", "cached_db", "cache", "file", "signed_cookies"])
async def test_visitors_sessions_are_kept_in_every_place(engine: str) -> None:
    with override_settings(SESSION_ENGINE=f"django.contrib.sessions.backends.{engine}"):
        client = AsyncClient()
        await client.get("/log_in/")
        assert (await client.get("/who/")).content == b"ada red False"


@two_databases
async def test_an_injected_session_is_current_in_its_function(threads: list[str]) -> None:
    assert (await AsyncClient().get("/injected/")).content == b"1"
    assert await saved("sqlite") == ["injected"]
    assert threads == []


@two_databases
async def test_a_task_that_outlives_the_request_has_no_session_any_more() -> None:
    await AsyncClient().get("/background/")
    finished[0].set()
    assert await outlived[0] is None


@pytest.mark.usefixtures("empty_tables")
async def test_a_session_is_freed_without_the_garbage_collector() -> None:
    """With connections of the pools, which keep nothing of it."""

    async def use() -> weakref.ref[Session]:
        session = databases["default"].get_session(begin_on_use=True)
        async with RequestScope(session):
            await User.objects.acreate(name="Ada")
            await User.objects.using("sqlite").acreate(name="Ada")
            with suppress(User.DoesNotExist):
                await User.objects.aget(name="Bob")
        return weakref.ref(session)

    gc.disable()
    try:
        assert (await use())() is None
    finally:
        gc.enable()


@two_databases
async def test_with_native_mode_off_a_view_gets_the_same_result() -> None:
    with override_settings(ASYNC_SESSION={}):
        client = AsyncClient()
        await client.get("/log_in/")
        assert (await client.get("/who/")).content == b"ada red False"
        assert (await client.get("/parallel/")).content == b"[1, 0, 0]"
        response: Any = await client.get("/stream/")
        assert b"".join([part async for part in response]) == b"0123456Ada"
        assert (await client.get("/protected/")).status_code == 403
