"""Our ASGI handler has no thread where none is needed, and tells what brings it back.

With real pools, as a session has one.
"""

from __future__ import annotations

import asyncio
import gc
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.test import override_settings

from django_asyncsession import DatabaseInterface
from django_asyncsession.asgi import ThreadlessHandler
from tests.asgi import site
from tests.asgi.exchanges import MULTIPART, REQUESTS, UPLOAD, Exchange, answer, answer_here, text
from tests.asgi.site import Seen, note

SESSION = "django_asyncsession.middleware.AsyncSessionMiddleware"


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
        ("/sync/", "(thread): used by sync view tests.asgi.site.sync"),
        ("/uses_thread/", "(thread): used by sync_to_async() in its code or a receiver"),
        ("/closers/", "(closer): tests.asgi.site.closers.<locals>.fail is called"),
        ("/own_close/", "(response): tests.asgi.site.OwnClose has a close() of its own"),
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
    name = f"{site.__name__}.{middleware}"
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
    backends = {"default": {"BACKEND": f"{site.__name__}.ClosedCache"}}
    with override_settings(CACHES=backends):
        await answer(ThreadlessHandler(), "/plain/")
        assert (Seen.events, threads, reasons()) == ([], [], [])
        await answer(ThreadlessHandler(), "/uses_cache/")
        assert (Seen.events, threads) == (["cache closed"], ["HttpResponseBase.close"])
    assert len(told := reasons()) == 1 and "(cache): tests.asgi.site.ClosedCache" in told[0]


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
