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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.cache import cache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import RequestAborted, RequestDataTooBig
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
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

    events: list[Any]
    started: asyncio.Event
    release: asyncio.Event


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
        # How often the application receives at the moment, and did when it returned.
        self.receiving, self.left = 0, 0
        self.task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            self.run(application), context=contextvars.Context()
        )

    async def run(self, application: Any) -> None:
        try:
            await application(self.scope, self.receive, self.send)
        finally:
            self.left = self.receiving

    def say(self, kind: str, **more: Any) -> None:
        self.incoming.put_nowait({"type": kind, **more})

    def leave(self) -> None:
        self.say("http.disconnect")

    async def receive(self) -> Any:
        self.received += 1
        self.receiving += 1
        try:
            return await self.incoming.get()
        finally:
            self.receiving -= 1

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

UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.txt"\r\n\r\nfile\r\n--b--\r\n'
)
MULTIPART = [
    *[(b"host", b"x"), (b"content-length", str(len(UPLOAD)).encode())],
    (b"content-type", b"multipart/form-data; boundary=b"),
]
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
    gone = Exchange(application, "/wait/")
    await Seen.started.wait()
    gone.leave()
    await gone.end()
    assert [isinstance(file, io.BytesIO) for file in files] == [True, False, True, True]
    assert all(file.closed for file in files)


async def test_2000_requests_leave_nothing_behind() -> None:
    application = ThreadlessHandler()
    requests = [REQUESTS[name] for name in ("plain", "large", "async body", "small body", "form")]

    async def ask(times: int) -> None:
        for _ in range(times):
            for _, url, more in requests:
                await answer(application, url, **more)
        leaving = Exchange(application, "/wait/")
        await Seen.started.wait()
        leaving.leave()
        assert await leaving.end() == []
        Seen.events.clear()
        gc.collect()

    await ask(40)
    before = len(gc.get_objects()), threading.active_count()
    await ask(400)
    after = len(gc.get_objects()), threading.active_count()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert after[0] - before[0] < 100 and after[1] == before[1]


# When the thread comes back, and the name of it


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/sync/", "(thread): used by sync view tests.test_asgi.sync"),
        ("/uses_thread/", "(thread): used by sync_to_async() in its code or a receiver"),
        ("/closers/", "(closer): tests.test_asgi.closers.<locals>.fail is called"),
        ("/own_close/", "(response): tests.test_asgi.OwnClose has a close() of its own"),
    ],
)
async def test_what_a_view_needs_a_thread_for_is_named(
    url: str, reason: str, reasons: Callable[[], list[str]]
) -> None:
    await answer(ThreadlessHandler(), url)
    assert reasons() == [f"GET {url} takes Django's way {reason}"]


async def test_bodies_and_files_are_named(reasons: Callable[[], list[str]]) -> None:
    application = ThreadlessHandler()
    await answer(application, "/echo/", (b"a", b"b"), method="POST")
    told = "it is in several messages, or too large to be kept in memory"
    assert reasons() == [f"POST /echo/ takes Django's way (body): {told}"]
    messages = await answer(application, "/form/", (UPLOAD,), method="POST", headers=MULTIPART)
    assert text(messages) == b"[{'a': ['1']}, {'f': 'file'}]"
    assert reasons() == ["POST /form/ takes Django's way (files): uploaded files are closed"]


@pytest.mark.parametrize(
    ("middleware", "reason"),
    [("sync_only", "sync middleware"), ("Parts", "sync parts of middleware")],
)
async def test_sync_middleware_brings_the_thread_back_by_its_name(
    middleware: str, reason: str, threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    name = f"{__name__}.{middleware}"
    with override_settings(MIDDLEWARE=[name]):
        messages = await answer(ThreadlessHandler(), "/plain/")
        assert messages == await answer(ASGIHandler(), "/plain/")
    assert threads.count("HttpResponseBase.close") == 2
    assert reasons() == [f"GET /plain/ takes Django's way (thread): used by {reason} {name}"]


async def test_a_cache_that_has_something_to_close_is_closed(
    threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    backends = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    with override_settings(CACHES=backends):
        await answer(ThreadlessHandler(), "/uses_cache/")
        assert (Seen.events, threads, reasons()) == ([], [], [])
    backends = {"default": {"BACKEND": f"{__name__}.ClosedCache"}}
    with override_settings(CACHES=backends):
        await answer(ThreadlessHandler(), "/plain/")
        assert (Seen.events, threads, reasons()) == ([], [], [])
        await answer(ThreadlessHandler(), "/uses_cache/")
        assert (Seen.events, threads) == (["cache closed"], ["HttpResponseBase.close"])
    assert len(told := reasons()) == 1 and "(cache): tests.test_asgi.ClosedCache" in told[0]


def scripted(*messages: Any) -> tuple[Any, list[Any]]:
    """A `receive` that gives these messages, and a `send` that notes what it gets."""
    given, sent = iter(messages), []

    async def receive() -> Any:
        return next(given)

    async def send(message: Any) -> None:
        sent.append(message)

    return (receive, send), sent


async def answer_here(application: Any) -> None:
    """Answer a request in the context of the caller, which a server does not do."""
    scope = {"type": "http", "method": "GET", "path": "/plain/", "headers": [(b"host", b"x")]}
    server, sent = scripted({"type": "http.request"})
    await application(scope, *server)
    assert sent[0]["status"] == 200


def test_under_sync_code_the_thread_of_that_is_told_of_requests(
    threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    async_to_sync(answer_here)(ThreadlessHandler())
    assert threads == ["Signal.asend.<locals>.sync_send", "HttpResponseBase.close"]
    assert len(told := reasons()) == 2 and all("sync code runs it" in line for line in told)


async def test_in_a_context_that_has_a_thread_that_is_told_of_requests(
    threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    async with ThreadSensitiveContext():
        await answer_here(ThreadlessHandler())
        assert (threads, reasons()) == ([], [])
        await sync_to_async(note)("the thread is made")
        threads.clear()
        await answer_here(ThreadlessHandler())
    assert threads == ["Signal.asend.<locals>.sync_send", "HttpResponseBase.close"]
    assert "it runs in a context that has one" in reasons()[0]


# Signals


class Receivers:
    """Receivers of both signals, connected in the block: sync ones, or async ones, which Django
    before 6.1 calls at the same time as the others."""

    def __init__(self, sender: Any = None, are_async: bool = False) -> None:
        self.sender = sender
        methods = (self.astarted, self.afinished) if are_async else (self.started, self.finished)
        self.all = tuple(zip((request_started, request_finished), methods, strict=True))

    def started(self, sender: Any, scope: Any, **kwargs: Any) -> None:
        note(("started", sender, scope["path"]))

    def finished(self, sender: Any, **kwargs: Any) -> None:
        note(("finished", sender))

    async def astarted(self, sender: Any, scope: Any, **kwargs: Any) -> None:
        self.started(sender, scope)

    async def afinished(self, sender: Any, **kwargs: Any) -> None:
        self.finished(sender)

    def __enter__(self) -> None:
        for signal, receiver in self.all:
            signal.connect(receiver, sender=self.sender)

    def __exit__(self, *exc_info: object) -> None:
        for signal, receiver in self.all:
            signal.disconnect(receiver, sender=self.sender)


@pytest.mark.parametrize("are_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("sender", [None, ASGIHandler], ids=["everybody", "Django's handler"])
@pytest.mark.parametrize("name", ["plain", "broken", "not decodable", "async body", "closers"])
async def test_receivers_of_a_project_hear_the_same_in_the_same_order(
    name: str, sender: Any, are_async: bool
) -> None:
    _, url, more = REQUESTS[name]
    with Receivers(sender, are_async):
        messages = await answer(ASGIHandler(), url, **more)
        events, Seen.events = Seen.events, []
        assert await answer(ThreadlessHandler(), url, **more) == messages
    assert Seen.events == events
    assert events[0] == ("started", ASGIHandler, url.partition("?")[0])
    # Django's handler is not the sender of the end of a request that could not be made.
    finished = [event for event in events if event[0] == "finished"]
    wanted = {("not decodable", None): [("finished", None)], ("not decodable", ASGIHandler): []}
    assert finished == wanted.get((name, sender), [("finished", ASGIHandler)])


async def test_receivers_are_named_and_bring_no_thread_when_they_have_gone(
    threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    application = ThreadlessHandler()
    receivers = Receivers()
    for _ in range(2):
        with receivers:
            await answer(application, "/plain/")
        assert len(threads) == len(Seen.events) == 2
        name = "(receiver): tests.test_asgi.Receivers.started"
        assert reasons()[0] == f"GET /plain/ takes Django's way {name}"
        await answer(application, "/plain/")
        assert (len(threads), reasons()) == (2, [])
        threads.clear()
        Seen.events.clear()


async def test_receivers_for_other_senders_bring_no_thread(threads: list[str]) -> None:
    with Receivers(WSGIHandler):
        await answer(ThreadlessHandler(), "/plain/")
    assert (Seen.events, threads) == ([], [])


async def test_a_receiver_in_the_place_of_another_is_called() -> None:
    """The list of receivers is as long as before."""
    application = ThreadlessHandler()
    receivers = Receivers()
    await answer(application, "/plain/")
    request_started.disconnect(close_old_connections)
    request_started.connect(receivers.started)
    try:
        await answer(application, "/plain/")
    finally:
        request_started.disconnect(receivers.started)
        request_started.connect(close_old_connections)
    assert Seen.events == [("started", ASGIHandler, "/plain/")]


async def test_receivers_that_are_collected_or_set_aside_bring_no_thread(
    threads: list[str],
) -> None:
    application = ThreadlessHandler()
    receivers: Receivers | None = Receivers()
    assert receivers is not None
    receivers.__enter__()
    await answer(application, "/plain/")
    aside = request_started.receivers, request_finished.receivers
    request_started.receivers, request_finished.receivers = [], []
    threads.clear()
    await answer(application, "/plain/")
    assert threads == []
    request_started.receivers, request_finished.receivers = aside
    await answer(application, "/plain/")
    assert len(threads) == 2
    receivers = None
    gc.collect()
    threads.clear()
    await answer(application, "/plain/")
    assert threads == []


async def test_what_a_receiver_raises_reaches_the_server() -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("receiver")

    for signal in (request_started, request_finished):
        signal.connect(fail)
        try:
            with pytest.raises(ZeroDivisionError):
                await answer(ThreadlessHandler(), "/plain/")
        finally:
            signal.disconnect(fail)


async def test_the_urlconf_is_forgotten_at_the_end() -> None:
    await answer_here(ThreadlessHandler())
    try:
        assert get_urlconf() is None
    finally:
        set_urlconf(None)


# Clients that go away, and servers that stop


@pytest.fixture(params=[None, False, True], ids=["no receivers", "sync ones", "async ones"])
def listened(request: pytest.FixtureRequest) -> Iterator[bool]:
    """With receivers of the project's, and so Django's way at both ends, and without."""
    receivers = nullcontext() if request.param is None else Receivers(are_async=request.param)
    with receivers:
        yield request.param is not None


def told(listened: bool, *more: str) -> list[Any]:
    """What was noted, when each signal was sent once, and this in between."""
    if not listened:
        return list(more)
    return [("started", ASGIHandler, "/wait/"), *more, ("finished", ASGIHandler)]


@pytest.mark.parametrize("body", [(), (b"begin",)], ids=["before the body", "in the body"])
async def test_a_client_that_goes_while_it_sends_gets_nothing(
    body: tuple[bytes, ...], handler: Any, listened: bool
) -> None:
    exchange = Exchange(handler(), "/plain/", ())
    for part in body:
        exchange.say("http.request", body=part, more_body=True)
    exchange.leave()
    assert await exchange.end() == []
    assert Seen.events == []


async def test_a_client_that_goes_cancels_the_view(handler: Any, listened: bool) -> None:
    exchange = Exchange(handler(), "/wait/")
    await Seen.started.wait()
    exchange.leave()
    assert await exchange.end() == []
    assert Seen.events == told(listened, "cancelled")
    assert not exchange.task.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_view_may_answer_although_it_was_cancelled(handler: Any, listened: bool) -> None:
    exchange = Exchange(handler(), "/wait/?stay=1")
    await Seen.started.wait()
    exchange.leave()
    assert text(await exchange.end()) == b"waited"
    assert Seen.events == told(listened, "cancelled")
    assert exchange.task.cancelling() == 0


async def test_a_client_that_goes_ends_the_body_that_is_sent(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 3600)
    exchange = Exchange(handler(), "/parts/?wait=1")
    await Seen.started.wait()
    exchange.leave()
    assert text(await exchange.end()) == b"one"
    assert await soon(lambda: Seen.events == ["body ended"])


async def test_a_client_that_goes_while_the_answer_is_written_is_no_error(
    handler: Any, listened: bool
) -> None:
    class Stuck(Exchange):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.sent) == 2:
                Seen.started.set()
                await asyncio.Event().wait()

    exchange = Stuck(handler(), "/large/")
    await Seen.started.wait()
    exchange.leave()
    assert len(await exchange.end()) == 2
    assert Seen.events[1:] == ([("finished", ASGIHandler)] if listened else [])


async def test_a_message_that_cannot_be_is_djangos_error(handler: Any) -> None:
    exchange = Exchange(handler(), "/wait/")
    await Seen.started.wait()
    exchange.say("http.request", body=b"again")
    with pytest.raises(AssertionError, match=r"Invalid ASGI message after request body: http\."):
        await exchange.end()
    Seen.release.set()


async def test_an_error_of_the_servers_receive_reaches_it() -> None:
    class Broken(Exchange):
        async def receive(self) -> Any:
            if self.received:
                raise ZeroDivisionError("receive")
            return await super().receive()

    exchange = Broken(ThreadlessHandler(), "/wait/")
    with pytest.raises(ZeroDivisionError):
        await exchange.end()
    assert Seen.events == ["cancelled"]


async def test_only_requests_that_last_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0.01)
    application = ThreadlessHandler()
    quick, slow = Exchange(application, "/plain/"), Exchange(application, "/wait/")
    await quick.end()
    assert await soon(lambda: slow.received == 2)
    Seen.release.set()
    assert text(await slow.end()) == b"waited"
    assert (quick.received, slow.received) == (1, 2)
    assert slow.left == 0, "it still receives when the request has ended"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_cancels_a_request_ends_it_at_once(listened: bool) -> None:
    exchange = Exchange(ThreadlessHandler(), "/wait/")
    await Seen.started.wait()
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.end()
    assert Seen.events == told(listened, "cancelled")
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_cancels_when_the_client_goes_is_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0)
    exchange = Exchange(ThreadlessHandler(), "/wait/")
    assert await soon(lambda: exchange.received == 2)
    exchange.leave()
    exchange.task.get_loop().call_soon(exchange.task.cancel)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.end()
    assert Seen.events == ["cancelled"]


async def test_an_error_while_the_answer_is_sent_reaches_the_server_and_closes_the_response() -> (
    None
):
    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            raise OSError("the client is gone")

    for receivers in (nullcontext(), Receivers()):
        with receivers, pytest.raises(OSError, match="the client is gone"):  # type: ignore[attr-defined]
            await Gone(ThreadlessHandler(), "/closers/").end()
    once = ["first closer", "second closer"]
    started, finished = ("started", ASGIHandler, "/closers/"), ("finished", ASGIHandler)
    assert Seen.events == [*once, started, *once, finished]


async def test_an_error_of_a_send_that_is_cancelled_reaches_the_server() -> None:
    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            Seen.started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as exc:
                raise OSError("the client is gone") from exc

    exchange = Gone(ThreadlessHandler(), "/plain/")
    await Seen.started.wait()
    exchange.leave()
    with pytest.raises(OSError, match="the client is gone"):
        await exchange.end()
    assert exchange.task.cancelling() == 0


async def test_a_listener_that_ends_late_cancels_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(ThreadlessHandler):
        async def listen_for_disconnect(self, receive: Any) -> None:
            try:
                await super().listen_for_disconnect(receive)
            finally:
                raise RequestAborted

    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0)
    exchange = Exchange(Late(), "/wait/")
    assert await soon(lambda: exchange.received == 2)
    Seen.release.set()
    assert text(await exchange.end()) == b"waited"
    assert exchange.task.cancelling() == 0


async def test_an_error_at_the_end_does_not_hide_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("receiver")

    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            raise OSError("the client is gone")

    request_finished.connect(fail)
    try:
        with pytest.raises(OSError, match="the client is gone"):
            await Gone(ThreadlessHandler(), "/plain/").end()
    finally:
        request_finished.disconnect(fail)
    assert "error ignored while a request was ended" in caplog.text
    assert "ZeroDivisionError: receiver" in caplog.text


# The life of the server


class Server:
    """A server that has started, or tried to, the application's life."""

    def __init__(self, application: Any) -> None:
        self.life = ApplicationCommunicator(application, {"type": "lifespan"})

    async def say(self, event: str) -> Any:
        await self.life.send_input({"type": f"lifespan.{event}"})
        return await self.life.receive_output(10)


def pools(alias: str, **options: Any) -> override_settings:
    return override_settings(ASYNC_SESSION={"ALIAS": alias, "POOLS": {alias: options}})


async def test_pools_open_and_close_with_the_server(real_database: DatabaseInterface) -> None:
    with pools(real_database.alias, min_size=2):
        server = Server(get_asgi_application())
        assert await server.say("startup") == {"type": "lifespan.startup.complete"}
        assert real_database.stats()["pool_available"] == 2
        others = [db for db in databases.all() if db is not real_database]
        assert not any(db.connected for db in others), "nobody wants to keep connections to it"
        assert await server.say("shutdown") == {"type": "lifespan.shutdown.complete"}
        assert not real_database.connected
        await server.life.wait(5)


async def test_open_sessions_get_time_when_the_server_ends(
    real_database: DatabaseInterface,
) -> None:
    server = Server(get_asgi_application(grace=30))
    await server.say("startup")
    session = real_database.get_session()
    await session.begin()
    await session.execute("SELECT 1")
    shutdown = asyncio.ensure_future(server.say("shutdown"))
    assert await soon(lambda: real_database.pools == [])
    assert await session.fetch_value("SELECT 7") == 7 and not shutdown.done()
    await session.close()
    assert await shutdown == {"type": "lifespan.shutdown.complete"}
    assert await server.life.wait(5) is None


async def test_a_pool_that_cannot_open_is_told_with_its_alias(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    alias = real_database.alias
    with pools(alias, min_size=3, max_size=2):
        server = Server(get_asgi_application())
        told = await server.say("startup")
        await server.life.wait(5)
    assert told["type"] == "lifespan.startup.failed"
    assert f"the pool of {alias!r} could not be opened: ConfigurationError: " in told["message"]
    assert "min_size=3, max_size=2" in told["message"] and "Traceback" in caplog.text


async def test_pools_that_are_open_are_closed_when_another_cannot_open(
    real_database: DatabaseInterface,
) -> None:
    other = next(alias for alias in databases if alias != real_database.alias)
    both = {real_database.alias: {"min_size": 1}, other: {"min_size": -1}}
    with override_settings(ASYNC_SESSION={"POOLS": both}):
        told = await Server(get_asgi_application()).say("startup")
    assert told["type"] == "lifespan.startup.failed" and repr(other) in told["message"]
    assert not real_database.connected


async def test_what_fails_when_the_server_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(grace: float = 0.0) -> None:
        raise OSError("cannot close")

    server = Server(get_asgi_application())
    await server.say("startup")
    monkeypatch.setattr(databases, "close_all", fail)
    message = "the pools could not be closed: OSError: cannot close"
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.failed", "message": message}


def test_a_grace_that_is_no_time_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="grace is -1"):
        get_asgi_application(grace=-1)
