"""Our ASGI handler: what Django's answers, it answers the same way, and without a thread where none
is needed; and the life of the server, with real pools."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import io
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.cache import cache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import RequestDataTooBig
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.dispatch import Signal
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect
from django.template import engines
from django.template.response import TemplateResponse
from django.test import override_settings
from django.urls import get_script_prefix, get_urlconf, path, set_urlconf
from django.utils.deprecation import MiddlewareMixin

from django_asyncsession import ConfigurationError, DatabaseInterface, asgi, databases
from django_asyncsession.asgi import ThreadlessHandler, get_asgi_application
from tests.sessions import soon
from tests.threads import sent_to_threads

SESSION = "django_asyncsession.middleware.AsyncSessionMiddleware"


class Seen:
    """What the views and the receivers of one test have noted."""

    events: list[Any] = []
    started = asyncio.Event()
    release = asyncio.Event()


def note(event: Any) -> None:
    Seen.events.append(event)


async def plain(request: HttpRequest) -> HttpResponse:
    response = HttpResponse(f"{request.method} {get_script_prefix()} {get_urlconf()}")
    response.set_cookie("seen", "yes", max_age=60)
    return response


async def echo(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.body, content_type="application/octet-stream")


async def form(request: HttpRequest) -> HttpResponse:
    files = {name: file.read().decode() for name, file in request.FILES.items()}
    return HttpResponse(repr([dict(request.POST), files]))


async def large(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"x" * 200_000)


async def elsewhere(request: HttpRequest) -> HttpResponse:
    return redirect("/plain/")


async def broken(request: HttpRequest) -> HttpResponse:
    raise ValueError("broken view")


async def template(request: HttpRequest) -> TemplateResponse:
    return TemplateResponse(request, engines["django"].from_string("{{ n }}"), {"n": 7})  # type: ignore[arg-type]


async def file(request: HttpRequest) -> FileResponse:
    return FileResponse(Path(__file__).open("rb"))


async def parts(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        try:
            yield "one"
            Seen.started.set()
            if "wait" in request.GET:
                await asyncio.Event().wait()
            yield "two"
        finally:
            note("body ended")

    return StreamingHttpResponse(body())


async def generator(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(str(n) for n in range(3))


async def wait(request: HttpRequest) -> HttpResponse:
    Seen.started.set()
    try:
        await Seen.release.wait()
    except asyncio.CancelledError:
        note("cancelled")
        if "stay" not in request.GET:
            raise
    return HttpResponse("waited")


async def closers(request: HttpRequest) -> HttpResponse:
    response = HttpResponse("closers")

    def fail() -> None:
        note("first closer")
        raise OSError("ignored")

    response._resource_closers.extend([fail, lambda: note("second closer")])  # type: ignore[attr-defined]
    return response


class OwnClose(HttpResponse):
    def close(self) -> None:
        note("own close")
        super().close()


async def own_close(request: HttpRequest) -> HttpResponse:
    return OwnClose("own")


async def uses_cache(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(cache.get("key", "nothing")))


async def uses_thread(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await sync_to_async(threading.get_ident)() == threading.get_ident()))


def sync(request: HttpRequest) -> HttpResponse:
    return HttpResponse("sync")


async def database(request: Any) -> HttpResponse:
    return HttpResponse(str(await request.db_session.fetch_value("SELECT 7")))


async def rows(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        yield str(await request.db_session.fetch_value("SELECT 7"))

    return StreamingHttpResponse(body())


VIEWS = (
    *(plain, echo, form, large, elsewhere, broken, template, file, parts, generator, wait),
    *(closers, own_close, uses_cache, uses_thread, sync, database, rows),
)
urlpatterns = [path(f"{view.__name__}/", view) for view in VIEWS]  # type: ignore[arg-type]


class ClosedCache(LocMemCache):
    def close(self, **kwargs: Any) -> None:
        note("cache closed")


def sync_only(get_response: Any) -> Any:
    return lambda request: get_response(request)


class Parts(MiddlewareMixin):
    def process_request(self, request: HttpRequest) -> None:
        note("process_request")


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    Seen.events, Seen.started, Seen.release = [], asyncio.Event(), asyncio.Event()
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"]):
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return sent_to_threads(monkeypatch)


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Why requests took Django's way since the last call, in the words of the log."""
    caplog.set_level(logging.DEBUG, asgi.logger.name)

    def told() -> list[str]:
        found = [record.message for record in caplog.records if record.name == asgi.logger.name]
        caplog.clear()
        return found

    return told


HANDLERS: list[type[ASGIHandler]] = [ASGIHandler, ThreadlessHandler]


@pytest.fixture(params=HANDLERS, ids=["django", "ours"])
def handler(request: pytest.FixtureRequest) -> Any:
    """Django's handler, and ours: what both do."""
    return request.param


class Exchange:
    """One request: what the server has sent for it, and got, and the task that answers it.

    Args:
        application: the handler.
        url: its path and query.
        body: what the client sends, in messages.
        more: what of the scope is different.
    """

    def __init__(
        self, application: Any, url: str, body: tuple[bytes, ...] = (b"",), **more: Any
    ) -> None:
        place, _, query = url.partition("?")
        self.scope = {
            **{"type": "http", "http_version": "1.1", "method": "GET", "path": place},
            **{"query_string": query.encode(), "headers": [(b"host", b"x")], **more},
        }
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        for number, part in enumerate(body, start=1):
            self.say("http.request", body=part, more_body=number < len(body))
        self.sent: list[Any] = []
        self.received = 0
        self.task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            application(self.scope, self.receive, self.send), context=contextvars.Context()
        )

    def say(self, kind: str, **more: Any) -> None:
        self.incoming.put_nowait({"type": kind, **more})

    def leave(self) -> None:
        self.say("http.disconnect")

    async def receive(self) -> Any:
        self.received += 1
        return await self.incoming.get()

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def end(self) -> list[Any]:
        async with asyncio.timeout(10):
            await self.task
        return self.sent


async def answer(application: Any, url: str, body: tuple[bytes, ...] = (b"",), **more: Any) -> Any:
    """The messages of a whole answer."""
    return await Exchange(application, url, body, **more).end()


def text(messages: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


# The same answer

MULTIPART = [
    (b"host", b"x"),
    (b"content-type", b"multipart/form-data; boundary=b"),
]
UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.txt"\r\n\r\nfile\r\n--b--\r\n'
)
FORM = [(b"host", b"x"), (b"content-type", b"application/x-www-form-urlencoded")]
# Whether a thread is used by ours, and the request.
REQUESTS: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "plain": (False, "/plain/?a=1", {}),
    "HEAD": (False, "/plain/", {"method": "HEAD"}),
    "below a prefix": (False, "/app/plain/", {"root_path": "/app"}),
    "large": (False, "/large/", {}),
    "redirect": (False, "/elsewhere/", {}),
    "async body": (False, "/parts/", {}),
    "small body": (False, "/echo/", {"method": "POST", "body": (b"small",)}),
    "no body": (False, "/echo/", {"method": "POST"}),
    "form": (False, "/form/", {"method": "POST", "body": (b"a=1&b=2",), "headers": FORM}),
    "chunked body": (False, "/echo/", {"method": "POST", "body": (b"a", b"b", b"c")}),
    "huge body": (False, "/echo/", {"method": "POST", "body": (b"x" * 3_000_000,)}),
    "upload": (True, "/form/", {"method": "POST", "body": (UPLOAD,), "headers": MULTIPART}),
    "not found": (True, "/nowhere/", {}),
    "broken": (True, "/broken/", {}),
    "template": (True, "/template/", {}),
    "not decodable": (False, "/plain/", {"query_string": b"\xff"}),
    "closers": (True, "/closers/", {}),
    "own close": (True, "/own_close/", {}),
    "sync view": (True, "/sync/", {}),
    "thread": (True, "/uses_thread/", {}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_same_request_has_the_same_answer(name: str, threads: list[str]) -> None:
    needs_thread, url, more = REQUESTS[name]
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=None):
        messages = await answer(ASGIHandler(), url, **more)
        events, Seen.events = Seen.events, []
        assert threads
        threads.clear()
        assert await answer(ThreadlessHandler(), url, **more) == messages
    assert messages[0]["type"] == "http.response.start" and not messages[-1].get("more_body")
    assert Seen.events == events
    assert bool(threads) is needs_thread


@pytest.mark.parametrize("url", ["/generator/", "/file/"])
async def test_sync_bodies_are_read_in_a_thread_with_the_same_warning(
    url: str, handler: Any
) -> None:
    with pytest.warns(Warning, match="must consume synchronous iterators"):
        messages = await answer(handler(), url)
    wanted = b"012" if url == "/generator/" else Path(__file__).read_bytes()
    assert text(messages) == wanted and messages[0]["status"] == 200
    if url == "/file/":
        assert len(messages) == 3 + len(wanted) // handler.chunk_size


async def test_a_request_that_is_refused_for_its_size_is_a_413(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooBig(ASGIRequest):
        def __init__(self, *args: Any) -> None:
            raise RequestDataTooBig

    monkeypatch.setattr(handler, "request_class", TooBig)
    messages = await answer(handler(), "/plain/")
    assert messages[0]["status"] == 413 and text(messages) == b"413 Payload too large"


@pytest.mark.parametrize("kind", ["websocket", "other"])
async def test_another_kind_of_connection_is_refused_with_djangos_words(
    kind: str, handler: Any
) -> None:
    with pytest.raises(ValueError, match=f"Django can only handle ASGI/HTTP.* not {kind}"):
        await answer(handler(), "/plain/", type=kind)


# No thread


async def test_a_request_with_a_session_has_no_thread(
    real_database: DatabaseInterface, threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    settings = {"ALIAS": real_database.alias}
    with override_settings(MIDDLEWARE=[SESSION], ASYNC_SESSION=settings):
        application = ThreadlessHandler()
        for url in ("/database/", "/rows/"):
            assert text(await answer(application, url)) == b"7"
        assert (threads, reasons()) == ([], [])
        assert text(await answer(ASGIHandler(), "/database/")) == b"7"
        assert threads == ["Signal.asend.<locals>.sync_send", "HttpResponseBase.close"]


async def test_a_body_in_memory_is_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Any] = []
    create = ThreadlessHandler.create_request

    def noted(self: Any, scope: Any, body_file: Any) -> Any:
        files.append(body_file)
        return create(self, scope, body_file)

    monkeypatch.setattr(ThreadlessHandler, "create_request", noted)
    application = ThreadlessHandler()
    with override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=4):
        for body in (b"1234", b"12345"):
            assert text(await answer(application, "/echo/", (body,))) == body
    with override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=0):
        await answer(application, "/echo/", (b"12345",))
    assert [isinstance(file, io.BytesIO) for file in files] == [True, False, True]
    assert all(file.closed for file in files)


async def test_2000_requests_leave_nothing_behind() -> None:
    application = ThreadlessHandler()
    requests = [REQUESTS[name] for name in ("plain", "large", "async body", "small body", "form")]

    async def ask(times: int) -> None:
        for _ in range(times):
            for _, url, more in requests:
                await answer(application, url, **more)
        Seen.events.clear()
        gc.collect()

    await ask(40)
    before = len(gc.get_objects()), threading.active_count()
    await ask(400)
    after = len(gc.get_objects()), threading.active_count()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert after[0] - before[0] < 100 and after[1] == before[1]
