"""The middleware: one session per request, ended before the response leaves, whatever happens.

With real commits where the moment of the commit, requests at the same time, or clients that leave
are the point.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import django
import pytest
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import got_request_exception
from django.db import DatabaseError, IntegrityError
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path

from django_asyncsession import Session, SyncContextError, databases
from django_asyncsession.asgi import ThreadlessHandler
from django_asyncsession.interface import DatabaseInterface
from tests.models import User
from tests.sessions import slow as slow_sql

MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware"]


async def add(request: HttpRequest) -> HttpResponse:
    await request.db_session.add(User(name="added"))
    return HttpResponse("ok")


async def idle(request: HttpRequest) -> HttpResponse:
    return HttpResponse(repr(request.db_session.bind.stats()["requests_num"]))


def failing(error: BaseException) -> Callable[[HttpRequest], Awaitable[HttpResponse]]:
    async def view(request: HttpRequest) -> HttpResponse:
        await request.db_session.add(User(name="half"))
        raise error

    return view


async def breaks_while_rendering(request: HttpRequest) -> HttpResponse:
    await request.db_session.add(User(name="half"))
    return TemplateResponse(request, "no-such-template.html")


async def swallows(request: HttpRequest) -> HttpResponse:
    await request.db_session.add(User(name="lost"))
    with suppress(DatabaseError):
        await request.db_session.execute("SELECT * FROM no_such_table")
    return HttpResponse("saved")


async def breaks_at_commit(request: HttpRequest) -> HttpResponse:
    sql = "INSERT INTO tests_tag (name, owner_id) VALUES ('orphan', 4711)"
    await request.db_session.execute(sql)
    return HttpResponse("saved")


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.db_session.alias)


def sync_view_without_session(request: HttpRequest) -> HttpResponse:
    return HttpResponse("fine")


# The numbers from 1 on, one in a row.
NUMBERS = {
    "postgresql": "SELECT generate_series(1, {})",
    "mysql": "SELECT seq FROM seq_1_to_{}",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    "SELECT i FROM n",
}


class Stream:
    """What the streaming views do, and what became of them."""

    rows = 5
    error_at: int | None = None
    started = asyncio.Event()
    ended: Session | None = None


async def streaming(request: HttpRequest) -> StreamingHttpResponse:
    session = Stream.ended = request.db_session
    await session.add(User(name="before the body"))

    async def body() -> AsyncIterator[str]:
        async for row in session.stream(NUMBERS[session.bind.vendor].format(Stream.rows)):
            if row[0] == Stream.error_at:
                raise ValueError("broken body")
            yield f"{row[0]}\n"
            Stream.started.set()

    return StreamingHttpResponse(body())


async def slow(request: HttpRequest) -> HttpResponse:
    await request.db_session.add(User(name="slow"))
    Stream.started.set()
    await request.db_session.fetch(slow_sql(request.db_session.bind, 30))
    return HttpResponse("never")


urlpatterns = [
    path("add/", add),
    path("idle/", idle),
    path("value-error/", failing(ValueError("no"))),
    path("404/", failing(Http404("no"))),
    path("403/", failing(PermissionDenied("no"))),
    path("400/", failing(SuspiciousOperation("no"))),
    path("render/", breaks_while_rendering),
    path("swallows/", swallows),
    path("commit/", breaks_at_commit),
    path("sync/", sync_view),
    path("sync-without/", sync_view_without_session),
    path("stream/", streaming),
    path("slow/", slow),
]


@pytest.fixture(autouse=True)
def site(alias: str) -> Iterator[None]:
    """The views above; each database in turn is that of the middleware."""
    Stream.rows, Stream.error_at = 5, None
    Stream.started, Stream.ended = asyncio.Event(), None
    with override_settings(
        ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE, ASYNC_SESSION={"ALIAS": alias}
    ):
        yield


@pytest.fixture
async def real_database(real_database: DatabaseInterface) -> AsyncIterator[DatabaseInterface]:
    """As everywhere, and after the test its pool is whole."""
    yield real_database
    await wait_until_clean(real_database)


# How many statements each server runs for long; SQLite has no server.
BUSY = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity "
    "WHERE query LIKE 'SELECT pg_sleep(30)%' AND state <> 'idle'",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE info LIKE '%sleep(30%'"
    " AND info NOT LIKE '%processlist%'",
    "sqlite": "SELECT 0",
}


async def busy(db: DatabaseInterface) -> int:
    """How many of the slow view's statements still run."""
    async with db.get_session(autocommit=True) as session:
        return int(await session.fetch_value(BUSY[db.vendor]))


async def wait_until_clean(db: DatabaseInterface) -> None:
    """Every connection is back in its pool, which takes two seconds at the most."""
    pool = db.pool()
    async with asyncio.timeout(3):
        while pool.stats()["pool_available"] != pool.stats()["pool_size"]:
            await asyncio.sleep(0.01)


@pytest.fixture
def quiet() -> Iterator[AsyncClient]:
    """A client that gets the error response, as a browser does, instead of the exception."""
    yield AsyncClient(raise_request_exception=False)


@pytest.fixture
def saved(alias: str) -> Callable[[], Awaitable[list[str]]]:
    """What is committed, as another session sees it."""

    async def names() -> list[str]:
        async with databases[alias].get_session(autocommit=True) as session:
            sql = "SELECT name FROM tests_user UNION ALL SELECT name FROM tests_tag"
            return [row[0] for row in await session.fetch_all(sql)]

    return names


@pytest.mark.usefixtures("real_database")
async def test_commits_before_the_response_leaves(saved: Any) -> None:
    response = await AsyncClient().get("/add/")
    assert response.status_code == 200
    assert await saved() == ["added"]


async def test_takes_no_connection_when_the_session_is_not_used(
    real_database: DatabaseInterface,
) -> None:
    assert (await AsyncClient().get("/idle/")).content == b"0"
    assert real_database.stats()["pool_size"] == 0


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("url", "status"),
    [("value-error", 500), ("404", 404), ("403", 403), ("400", 400), ("render", 500)],
)
async def test_rolls_back_when_the_view_raises(
    url: str, status: int, quiet: AsyncClient, saved: Any
) -> None:
    assert (await quiet.get(f"/{url}/")).status_code == status
    assert await saved() == []


class AnswersExceptions:
    """An inner middleware that turns every exception of a view into a page."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Any) -> None:
        from asgiref.sync import markcoroutinefunction

        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> Any:
        return await self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse:
        return HttpResponse("all is well")


@pytest.mark.usefixtures("database")
async def test_rolls_back_although_another_middleware_answers_the_exception(saved: Any) -> None:
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.AnswersExceptions"]):
        response = await AsyncClient().get("/value-error/")
    assert (response.status_code, response.content) == (200, b"all is well")
    assert await saved() == []


class RaisesAfterTheView(AnswersExceptions):
    async def __call__(self, request: HttpRequest) -> Any:
        await self.get_response(request)
        raise RuntimeError("inner middleware")


@pytest.mark.usefixtures("database")
async def test_rolls_back_when_an_inner_middleware_raises(quiet: AsyncClient, saved: Any) -> None:
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.RaisesAfterTheView"]):
        assert (await quiet.get("/add/")).status_code == 500
    assert await saved() == []


@pytest.mark.usefixtures("database")
async def test_a_tool_may_wrap_how_django_loads_middleware(
    quiet: AsyncClient, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = BaseHandler.load_middleware

    def wrapped(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)

    monkeypatch.setattr(BaseHandler, "load_middleware", wrapped)
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.AnswersExceptions"]):
        assert (await quiet.get("/add/")).status_code == 200
        assert (await quiet.get("/value-error/")).status_code == 200
    assert await saved() == ["added"]


def sync_only(get_response: Any) -> Any:
    return lambda request: get_response(request)


@pytest.mark.usefixtures("database")
async def test_works_around_sync_only_middleware(saved: Any) -> None:
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.sync_only"]):
        assert (await AsyncClient().get("/add/")).status_code == 200
    assert await saved() == ["added"]


@pytest.mark.usefixtures("database")
async def test_a_swallowed_database_error_is_a_500_and_not_a_200_with_nothing_saved(
    quiet: AsyncClient, saved: Any
) -> None:
    assert (await quiet.get("/swallows/")).status_code == 500
    assert await saved() == []


@pytest.mark.usefixtures("database")
async def test_a_constraint_that_fails_at_commit_is_a_500(quiet: AsyncClient, saved: Any) -> None:
    assert (await quiet.get("/commit/")).status_code == 500
    with pytest.raises(IntegrityError):
        await AsyncClient().get("/commit/")
    assert await saved() == []


@pytest.mark.usefixtures("database")
async def test_a_sync_view_is_told_what_to_do(saved: Any) -> None:
    with pytest.raises(SyncContextError, match="make the view `async def`"):
        await AsyncClient().get("/sync/")
    assert (await AsyncClient().get("/sync-without/")).content == b"fine"


@pytest.mark.usefixtures("database")
@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
def test_wsgi_is_told_what_to_do() -> None:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE):
        assert Client().get("/sync-without/").content == b"fine"
        with pytest.raises(SyncContextError):
            Client().get("/sync/")
        with pytest.raises(SyncContextError, match=r"await self\.async_client\.get"):
            Client().get("/add/")
        assert "serve the project's ASGI application" in said_under_wsgi("/add/")


def said_under_wsgi(url: str) -> str:
    """What a request is told that a server sends, and not Django's test client."""
    errors: list[BaseException] = []

    def note(sender: Any, request: Any, **kwargs: Any) -> None:
        errors.append(sys.exception())  # type: ignore[arg-type]

    got_request_exception.connect(note)
    try:
        WSGIHandler()(RequestFactory().get(url).environ, lambda status, headers: None)
    finally:
        got_request_exception.disconnect(note)
    return str(errors[0])


@pytest.mark.usefixtures("real_database")
async def test_each_request_has_its_own_session(saved: Any) -> None:
    client = AsyncClient()
    await asyncio.gather(*[client.get("/add/") for _ in range(20)])
    assert await saved() == ["added"] * 20


@pytest.mark.usefixtures("database")
async def test_without_atomic_requests_the_session_is_in_autocommit_mode(
    alias: str, quiet: AsyncClient, saved: Any
) -> None:
    with override_settings(ASYNC_SESSION={"ALIAS": alias, "ATOMIC_REQUESTS": False}):
        await quiet.get("/value-error/")
    assert await saved() == ["half"]


@pytest.mark.usefixtures("database")
async def test_the_session_is_under_the_name_that_is_set(alias: str) -> None:
    with (
        override_settings(ASYNC_SESSION={"ALIAS": alias, "REQUEST_ATTRIBUTE": "other"}),
        pytest.raises(AttributeError, match="db_session"),
    ):
        await AsyncClient().get("/add/")


# Streaming


@pytest.mark.usefixtures("real_database")
async def test_a_streaming_body_has_the_session_until_its_end_and_then_it_commits(
    saved: Any,
) -> None:
    response = await AsyncClient().get("/stream/")
    assert await saved() == []
    parts = [part async for part in response.streaming_content]
    assert b"".join(parts) == b"1\n2\n3\n4\n5\n"
    assert await saved() == ["before the body"]
    assert Stream.ended is not None and Stream.ended.closed


async def test_a_streaming_body_passes_a_sync_middleware_around_the_session(
    real_database: DatabaseInterface, saved: Any
) -> None:
    with override_settings(MIDDLEWARE=[f"{__name__}.sync_only", *MIDDLEWARE]):
        connection = Connection("/stream/")
        await connection.run()
    assert connection.body == b"1\n2\n3\n4\n5\n"
    assert await saved() == ["before the body"]
    assert Stream.ended is not None and Stream.ended.closed


async def test_a_client_that_leaves_a_stream_around_which_is_a_sync_middleware_rolls_back(
    real_database: DatabaseInterface, saved: Any
) -> None:
    Stream.rows = 100_000
    with override_settings(MIDDLEWARE=[f"{__name__}.sync_only", *MIDDLEWARE]):
        await Connection("/stream/", leave_after=2).run()
    await wait_until_clean(real_database)
    assert Stream.ended is not None and Stream.ended.closed
    assert await saved() == []


@pytest.mark.usefixtures("database")
async def test_a_body_that_raises_rolls_back(saved: Any) -> None:
    Stream.error_at = 3
    response = await AsyncClient().get("/stream/")
    with pytest.raises(ValueError, match="broken body"):
        [part async for part in response.streaming_content]
    assert Stream.ended is not None and Stream.ended.closed
    assert await saved() == []


async def test_a_body_that_never_starts_ends_its_session_when_the_response_is_closed(
    real_database: DatabaseInterface, saved: Any
) -> None:
    response = await AsyncClient().get("/stream/")
    await asyncio.to_thread(response.close)
    await wait_until_clean(real_database)
    assert Stream.ended is not None and Stream.ended.closed
    assert await saved() == []


class DropsTheResponse(AnswersExceptions):
    async def __call__(self, request: HttpRequest) -> Any:
        await self.get_response(request)
        return HttpResponse("another one")


async def test_a_response_that_is_dropped_ends_its_session_without_the_garbage_collector(
    real_database: DatabaseInterface, saved: Any
) -> None:
    gc.disable()
    try:
        with override_settings(MIDDLEWARE=[f"{__name__}.DropsTheResponse", *MIDDLEWARE]):
            connection = Connection("/stream/")
            await connection.run()
        assert connection.body == b"another one"
        await wait_until_clean(real_database)
    finally:
        gc.enable()
    assert Stream.ended is not None and Stream.ended.closed
    assert await saved() == []


# The client goes away


class Connection:
    """An ASGI server's side of one request, whose client can go away."""

    handler: type[ASGIHandler] = ASGIHandler

    def __init__(self, path: str, leave_after: int | None = None, *, says_so: bool = True) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._received = False
        self._leave_after, self._says_so = leave_after, says_so
        self._scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [],
            "query_string": b"",
            "server": ("testserver", 80),
        }

    async def run(self) -> None:
        async with asyncio.timeout(10):
            await self.handler()(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if self._leave_after is not None and len(self.sent) > self._leave_after:
            if self._says_so:
                self.gone.set()
            await asyncio.sleep(30)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@pytest.fixture(params=[ASGIHandler, ThreadlessHandler], ids=["Django's handler", "ours"])
def each_handler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "handler", request.param)


@pytest.mark.usefixtures("each_handler")
async def test_a_client_that_leaves_in_mid_query_rolls_back(
    real_database: DatabaseInterface, saved: Any
) -> None:
    connection = Connection("/slow/")
    task = asyncio.create_task(connection.run())
    await Stream.started.wait()
    connection.gone.set()
    try:
        await task
    except BaseException as exc:
        assert not isinstance(exc, AssertionError)
    await wait_until_clean(real_database)
    assert await saved() == []
    assert await busy(real_database) == 0


@pytest.mark.usefixtures("each_handler")
async def test_a_client_that_leaves_while_the_body_is_sent_leaves_it_committed(
    real_database: DatabaseInterface, saved: Any
) -> None:
    connection = Connection("/add/", leave_after=1)
    await connection.run()
    await wait_until_clean(real_database)
    assert await saved() == ["added"]


@pytest.mark.usefixtures("each_handler")
async def test_a_client_that_leaves_a_stream_rolls_back(
    real_database: DatabaseInterface, saved: Any
) -> None:
    Stream.rows = 100_000
    connection = Connection("/stream/", leave_after=3)
    await connection.run()
    await wait_until_clean(real_database)
    assert b"1\n" in connection.body
    assert Stream.ended is not None and Stream.ended.closed
    assert await saved() == []


VIEW_RUNS_ON = pytest.mark.skipif(
    django.VERSION < (6, 1),
    reason="Django before 6.1 lets the view run on when the server cancels its task",
)


@pytest.mark.parametrize(
    "handler", [pytest.param(ASGIHandler, marks=VIEW_RUNS_ON), ThreadlessHandler]
)
@pytest.mark.parametrize("url", ["/slow/", "/stream/"])
async def test_a_server_that_cancels_the_request_leaves_nothing_behind(
    real_database: DatabaseInterface,
    handler: type[ASGIHandler],
    url: str,
    saved: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "handler", handler)
    Stream.rows = 100_000
    connection = Connection(url, leave_after=3, says_so=False)
    task = asyncio.create_task(connection.run())
    await Stream.started.wait()
    task.cancel()
    await asyncio.wait([task])
    await wait_until_clean(real_database)
    del task, connection
    gc.collect()
    assert await saved() == []
