"""Native mode for sync views and Django's own middleware: no thread, and the same results.

With a real pool where the point is that nothing is taken from it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from django.contrib import admin, messages
from django.contrib.auth.models import Group
from django.contrib.auth.models import User as Account
from django.core.handlers.asgi import ASGIHandler
from django.db import connection
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.test import modify_settings, override_settings
from django.urls import path
from django.utils.deprecation import MiddlewareMixin
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from django_asyncsession import databases, keep_thread
from django_asyncsession.asgi import ThreadlessHandler
from tests.models import User

MIDDLEWARE = [
    "django_asyncsession.middleware.AsyncSessionMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
NATIVE = {"NATIVE_ORM": True, "NATIVE_MIDDLEWARE": True}


def ident(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(threading.get_ident()))


@csrf_exempt
def create(request: HttpRequest) -> HttpResponse:
    User.objects.create(name=request.POST["name"])
    messages.success(request, f"{request.POST['name']} is saved")
    if "fail" in request.POST:
        raise ValueError("after the insert")
    return HttpResponse(str(User.objects.count()))


def told(request: HttpRequest) -> HttpResponse:
    return HttpResponse(", ".join(str(m) for m in messages.get_messages(request)))


async def acreate(request: HttpRequest) -> HttpResponse:
    await User.objects.acreate(name="async")
    return HttpResponse(str(await User.objects.acount()))


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        async for user in User.objects.order_by("pk").aiterator(chunk_size=2):
            yield f"{user.name};"

    return StreamingHttpResponse(body())


def in_thread(request: HttpRequest) -> StreamingHttpResponse:
    User.objects.create(name="saved")

    def body() -> Iterator[str]:
        yield f"{User.objects.count()} "
        yield str(threading.get_ident())
        connection.close()

    return StreamingHttpResponse(body())


async def lazy(request: HttpRequest) -> TemplateResponse:
    template = engines["django"].from_string("{% for u in users %}{{ u.name }}{% endfor %}")
    await User.objects.acreate(name="not committed yet")
    return TemplateResponse(request, template, {"users": User.objects.all()})


@keep_thread
def kept(request: HttpRequest) -> HttpResponse:
    return ident(request)


@keep_thread
class Kept(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return ident(request)


def blocks(request: HttpRequest) -> HttpResponse:
    time.sleep(0.05)
    return HttpResponse("ok")


def missing(request: HttpRequest) -> HttpResponse:
    raise Http404("nothing here")


views = (create, told, acreate, stream, in_thread, lazy, kept, blocks, missing, ident)
urlpatterns = [
    path("admin/", admin.site.urls),
    path("kept-class/", Kept.as_view()),
    *(path(f"{view.__name__}/", view) for view in views),
]


class Foreign(MiddlewareMixin):
    """Middleware of another package, which may wait for whatever it likes."""

    def process_request(self, request: HttpRequest) -> None:
        request.META["foreign"] = threading.get_ident()

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        response["foreign"] = str(request.META["foreign"])
        return response


def sync_only(get_response: Any) -> Any:
    """Middleware that knows nothing of async."""

    def middleware(request: HttpRequest) -> HttpResponse:
        here = threading.get_ident()
        response: HttpResponse = get_response(request)
        response["sync-only"] = str(here)
        return response

    return middleware


class Served:
    """By what the project is served."""

    handler: type[ASGIHandler]


@pytest.fixture(
    autouse=True, params=[ASGIHandler, ThreadlessHandler], ids=["Django's handler", "ours"]
)
def shared(request: pytest.FixtureRequest) -> Iterator[None]:
    Served.handler = request.param
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=MIDDLEWARE,
        ALLOWED_HOSTS=["test"],
        ASYNC_SESSION=NATIVE,
    ):
        yield


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that were started."""
    names: list[str] = []
    start = threading.Thread.start

    def note(self: threading.Thread) -> None:
        names.append(self.name)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", note)
    return names


@asynccontextmanager
async def visitor(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A browser of the project's ASGI application, served with these further settings."""
    with override_settings(**settings):
        transport = httpx.ASGITransport(Served.handler(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    await databases.close_all()


def an_admin() -> None:
    Account.objects.create_superuser("ada", password="secret")


async def log_in(client: httpx.AsyncClient) -> None:
    form = {"username": "ada", "password": "secret", "next": "/admin/"}
    response = await client.post("/admin/login/", data=await with_token(client, form))
    assert response.status_code == 302, response.text


async def with_token(client: httpx.AsyncClient, form: dict[str, str]) -> dict[str, str]:
    if "csrftoken" not in client.cookies:
        await client.get("/admin/login/")
    return {**form, "csrfmiddlewaretoken": client.cookies["csrftoken"]}


async def browse(client: httpx.AsyncClient, rounds: int) -> list[tuple[int, str]]:
    """Mixed requests, ten in a round, and what they gave."""
    got: list[tuple[int, str]] = []

    async def note(request: Any, pattern: str = ".*") -> None:
        response: httpx.Response = await request
        found = re.search(pattern, response.text, re.DOTALL)
        got.append((response.status_code, found[0] if found else response.text))

    for number in range(rounds):
        group = await with_token(client, {"name": f"group {number}"})
        await note(client.get("/admin/"), "Site administration")
        await note(client.post("/admin/auth/group/add/", data=group))
        await note(client.get("/admin/auth/group/"), r"\d+ groups?")
        await note(client.get("/admin/auth/user/"), r"\d+ user")
        await note(client.post("/create/", data={"name": f"sync {number}"}))
        await note(client.get("/told/"))
        await note(client.get("/acreate/"))
        await note(client.get("/stream/"))
        await note(client.get("/lazy/"))
        await note(client.get("/admin/jsi18n/"), "django")
    return got


@pytest.mark.django_db
async def test_200_mixed_requests_start_no_thread(started: list[str]) -> None:
    await asyncio.to_thread(an_admin)
    async with visitor() as client:
        started.clear()
        await log_in(client)
        got = await browse(client, rounds=20)
        assert started == []
    assert {status for status, _ in got} == {200, 302}
    assert got[4:6] == [(200, "1"), (200, "sync 0 is saved")]
    assert got[-3][1].startswith("sync 0;async;not committed yet;sync 1;")
    assert got[-8][1] == "20 groups"


@pytest.mark.django_db
async def test_native_mode_gives_the_same_answers_as_threads() -> None:
    answers = []
    for native_mode in (NATIVE, {"NATIVE_ORM": True}, {}):
        await asyncio.to_thread(an_admin)
        async with visitor(ASYNC_SESSION=native_mode) as client:
            await log_in(client)
            answers.append(await browse(client, rounds=2))
        await asyncio.to_thread(_empty)
    assert answers[0] == answers[1] == answers[2]


def _empty() -> None:
    for model in (User, Account, Group):
        model.objects.all().delete()


@pytest.mark.django_db
async def test_a_sync_view_is_in_the_requests_transaction() -> None:
    async with visitor() as client:
        assert (await client.get("/ident/")).text == str(threading.get_ident())
        data = {"name": "half", "fail": "yes"}
        assert (await client.post("/create/", data=data)).status_code == 500
        assert (await client.post("/create/", data={"name": "whole"})).text == "1"
        assert (await client.get("/missing/")).status_code == 404


def _a_flat_page() -> None:
    from django.contrib.flatpages.models import FlatPage
    from django.contrib.sites.models import Site

    with connection.schema_editor() as editor:
        editor.create_model(Site)
        editor.create_model(FlatPage)
    site = Site.objects.create(pk=1, domain="test")
    FlatPage.objects.create(url="/flat/", title="flat").sites.add(site)


@pytest.mark.django_db
async def test_a_flat_page_is_found_in_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    apps = ["django.contrib.sites", "django.contrib.flatpages"]
    name = "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware"
    asked: list[int] = []

    def flatpage(request: HttpRequest, url: str) -> HttpResponse:
        from django.contrib.flatpages.models import FlatPage

        asked.append(threading.get_ident())
        return HttpResponse(FlatPage.objects.get(url=url, sites=1).title)

    with modify_settings(INSTALLED_APPS={"append": apps}):
        await asyncio.to_thread(_a_flat_page)
        monkeypatch.setattr("django.contrib.flatpages.middleware.flatpage", flatpage)
        async with visitor(MIDDLEWARE=[*MIDDLEWARE, name]) as client:
            assert (await client.get("/flat/")).text == "flat"
    assert asked == [threading.get_ident()]


async def test_a_sync_view_that_uses_no_database_takes_no_connection() -> None:
    """Of a real pool."""
    async with visitor(MIDDLEWARE=MIDDLEWARE[:2]) as client:
        await client.get("/ident/")
        assert databases["default"].stats()["pool_size"] == 0


@pytest.mark.django_db
@pytest.mark.parametrize("url", ["/kept/", "/kept-class/"])
async def test_a_view_that_opts_out_keeps_its_thread(url: str) -> None:
    async with visitor() as client:
        assert (await client.get(url)).text != str(threading.get_ident())


@pytest.mark.django_db
@pytest.mark.parametrize("name", ["Foreign", "sync_only"])
async def test_middleware_of_other_packages_keeps_its_thread(name: str) -> None:
    async with visitor(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.{name}"]) as client:
        response = await client.get("/ident/")
        assert response.headers[name.lower().replace("_", "-")] != str(threading.get_ident())
        assert response.text == str(threading.get_ident())


@pytest.mark.django_db
async def test_without_the_setting_sync_views_keep_their_thread() -> None:
    async with visitor(ASYNC_SESSION={"NATIVE_ORM": True}) as client:
        assert (await client.get("/ident/")).text != str(threading.get_ident())


@pytest.mark.django_db
async def test_a_template_responses_lazy_querysets_are_in_the_session() -> None:
    async with visitor(ASYNC_SESSION={"NATIVE_ORM": True}) as client:
        assert (await client.get("/lazy/")).text == "not committed yet"


@pytest.mark.usefixtures("empty_tables")
async def test_the_body_of_a_sync_stream_is_made_in_a_thread_after_the_commit() -> None:
    """With a real commit, which another connection sees."""
    async with visitor(MIDDLEWARE=MIDDLEWARE[:1]) as client:
        with pytest.warns(Warning, match="must consume synchronous iterators"):
            count, ident = (await client.get("/in_thread/")).text.split()
    assert count == "1" and int(ident) != threading.get_ident()


@pytest.mark.django_db
async def test_code_that_blocks_the_loop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = {**NATIVE, "LOOP_BLOCK_WARNING_SECONDS": 0.04}
    with caplog.at_level(logging.WARNING, "django_asyncsession"):
        async with visitor(ASYNC_SESSION=settings, MIDDLEWARE=MIDDLEWARE[:1]) as client:
            await client.get("/ident/")
            caplog.clear()
            await client.get("/blocks/")
            named = [r.message for r in caplog.records if f"{__name__}.blocks" in r.message]
    assert len(named) == 1 and re.search(r"blocked the event loop for 0\.\d{3} s", named[0])
