"""The site that the handlers serve: views, middleware and a cache, which note what happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.core.cache.backends.locmem import LocMemCache
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect
from django.template import engines
from django.template.response import TemplateResponse
from django.urls import get_script_prefix, get_urlconf, path
from django.utils.deprecation import MiddlewareMixin


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
