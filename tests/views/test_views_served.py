"""How views are served: decorators, middleware, templates, errors, cancellation, several databases.

With real commits and rollbacks of requests, and real pools, whole after each test.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.contrib.auth.models import AnonymousUser
from django.contrib.auth.models import User as Account
from django.http import HttpRequest
from django.template import TemplateDoesNotExist
from django.test import AsyncClient, AsyncRequestFactory, Client, override_settings
from django.views import generic

from django_asyncsession import AliasNotInSession, SyncContextError, databases, keep_thread
from django_asyncsession.exceptions import ConfigurationError
from tests.models import Author, Book, User
from tests.sessions import soon
from tests.views import pages
from tests.views.pages import MIDDLEWARE, TEMPLATES, Books, Slow, Thread
from tests.views.visits import numbers, read, text

pytestmark = pytest.mark.usefixtures("empty_tables")


# What else a view is


async def test_any_class_based_view_becomes_native(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    assert await text(client, "/born/1950/") == "that year"
    assert (await client.get("/born/1951/")).status_code == 404
    assert threads == []
    await read(lambda: Account.objects.create_user("ada", password="secret"))
    threads.clear()
    page = await client.post("/login/", {"username": "ada", "password": "wrong"})
    assert b"correct username" in page.content
    page = await client.post("/login/", {"username": "ada", "password": "secret"})
    assert (page.status_code, page["Location"]) == (302, "/books/")
    assert threads == []
    assert (await client.get("/members/")).status_code == 200
    # Its decorators get a response, whatever the method.
    assert (await client.delete("/login/")).status_code == 405


@pytest.mark.parametrize("is_native", [True])
async def test_a_login_is_saved_in_the_database_in_native_mode(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    with override_settings(SESSION_ENGINE="django.contrib.sessions.backends.db"):
        await read(lambda: Account.objects.create_user("ada", password="secret"))
        threads.clear()
        form = {"username": "ada", "password": "secret"}
        assert (await client.post("/login/", form)).status_code == 302
        assert (await client.get("/members/")).status_code == 200
        assert threads == []


async def test_a_view_made_of_others(site: Any, client: AsyncClient, threads: list[str]) -> None:
    pk, _, _ = await read(numbers)
    threads.clear()
    response = await client.get(f"/both/{pk}/")
    assert response.content == b"The Quiet Harbour by Ada Holm"
    assert "no-cache" in response["Cache-Control"]
    assert b"This field is required" in (await client.post(f"/both/{pk}/")).content
    assert threads == []


async def test_requests_at_the_same_time_do_not_disturb_each_other(
    everywhere: str, client: AsyncClient
) -> None:
    urls = ["/books/", "/async/books/", "/books/?page=2", "/async/books/?page=2"]
    once = [await text(client, url) for url in urls]
    assert len(set(once)) == 4
    assert await asyncio.gather(*(text(client, url) for url in urls * 5)) == once * 5


async def test_without_atomic_requests_each_statement_commits(
    site: Any, quiet: AsyncClient
) -> None:
    with override_settings(ASYNC_SESSION={**site, "ATOMIC_REQUESTS": False}):
        assert "1 of 2" in await text(quiet, "/books/")
        assert "1 of 3" in await text(quiet, "/async/books/")
        response = await quiet.post("/new-author/", {"name": "Nora", "also": "Ada Holm"})
        assert response.status_code == 500
    assert await read(lambda: Author.objects.filter(name="Nora").exists())


@pytest.mark.parametrize("is_native", [True])
async def test_a_view_that_blocks_the_loop_is_named(
    site: Any, client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "django_asyncsession"),
        override_settings(ASYNC_SESSION={**site, "LOOP_BLOCK_WARNING_SECONDS": 0.0}),
    ):
        await client.get("/thread/")
    assert f"{pages.__name__}.Thread blocked the event loop" in caplog.text


async def test_everything_runs_in_the_thread_of_the_loop(site: Any, client: AsyncClient) -> None:
    here = str(threading.get_ident())
    assert await text(client, "/thread/?text=x") == f"{here} x"
    assert await text(client, "/template/") == here


async def test_methods_are_allowed_as_the_class_says(site: Any, client: AsyncClient) -> None:
    response = await client.options("/thread/")
    assert (response.status_code, response["Allow"]) == (200, "GET, OPTIONS")
    for method in (client.post, client.put, client.patch):
        assert (await method("/thread/")).status_code == 405
    response = await client.head("/books/")
    assert (response.status_code, response.content) == (200, b"")


async def test_redirects_and_static_pages_take_no_connection_in_native_mode(
    client: AsyncClient,
) -> None:
    with override_settings(
        ROOT_URLCONF=pages.__name__,
        MIDDLEWARE=MIDDLEWARE[:1],
        TEMPLATES=[{**TEMPLATES[0], "OPTIONS": {"loaders": TEMPLATES[0]["OPTIONS"]["loaders"]}}],
        ASYNC_SESSION={"NATIVE_ORM": True},
    ):
        assert await text(client, "/page/") == "static "
        response = await client.get("/moved/")
    assert (response.status_code, response["Location"]) == (301, "/books/")
    assert databases["default"].stats()["pool_size"] == 0


async def test_decorators_of_dispatch_count(site: Any, quiet: AsyncClient) -> None:
    response = await quiet.get("/decorated/")
    assert "no-cache" in response["Cache-Control"]
    assert (await quiet.post("/decorated/", {"name": "Nora"})).status_code == 302
    assert await read(lambda: Author.objects.filter(name="Nora").exists())
    assert Thread.as_view().csrf_exempt is True


async def test_a_page_is_cached(site: Any, client: AsyncClient) -> None:
    before = await text(client, "/cached/")
    await read(Book.objects.all().delete)
    assert await text(client, "/cached/") == before
    assert await text(client, "/books/") != before


async def test_the_body_of_a_stream_has_the_session(site: Any, client: AsyncClient) -> None:
    response: Any = await client.get("/streamed/")
    assert [part async for part in response] == [b"streamed"]
    assert await read(User.objects.count) == 1


def test_the_class_says_that_it_is_async_and_what_it_is() -> None:
    view = Books.as_view(paginate_by=7)
    assert iscoroutinefunction(view)
    assert Books.view_is_async is True
    assert view.view_class is Books
    assert view.view_initkwargs == {"paginate_by": 7}
    assert issubclass(Books, generic.ListView)
    for wrong in ({"get": None}, {"no_such": 1}):
        with pytest.raises(TypeError):
            Books.as_view(**wrong)


class ChangesTemplate:
    """Middleware that gives each response another template."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> Any:
        return await self.get_response(request)

    async def process_template_response(self, request: HttpRequest, response: Any) -> Any:
        assert not response.is_rendered
        response.template_name = "other.html"
        response.context_data["origin"] = "middleware"
        return response


async def test_middleware_may_change_a_response_before_it_is_rendered(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.ChangesTemplate"]):
        assert await text(client, "/books/") == "from middleware: 2"
    assert threads == []


def sync_only(get_response: Any) -> Any:
    """Middleware that knows nothing of async."""
    return lambda request: get_response(request)


async def test_sync_only_middleware_around_a_view_changes_nothing(
    site: Any, client: AsyncClient
) -> None:
    with override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.sync_only"]):
        assert (await text(client, "/async/books/")).startswith("The Quiet Harbour")
        assert await text(client, "/template/") == str(threading.get_ident())


# Errors, cancellation


async def test_a_template_that_fails_rolls_back(everywhere: str, quiet: AsyncClient) -> None:
    assert (await quiet.get("/broken/")).status_code == 500
    with pytest.raises(TemplateDoesNotExist):
        await AsyncClient().get("/broken/")
    assert await read(User.objects.count) == 0


async def test_the_error_page_of_debug_shows_the_error(site: Any, quiet: AsyncClient) -> None:
    with override_settings(DEBUG=True):
        response = await quiet.post("/new-author/", {"name": "Nora", "fail": "yes"})
        assert response.status_code == 500
        page = response.content.decode()
        assert "ValueError at /new-author/" in page and "super().form_valid(form)" in page
        assert (await quiet.get("/books/4711/")).status_code == 404


@pytest.mark.parametrize("where", ["sync", "sync in async", "async", "template"])
async def test_a_cancelled_request_rolls_back(
    everywhere: str, where: str, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "started", asyncio.Event())
    monkeypatch.setattr(Slow, "where", where)
    task = asyncio.create_task(client.get("/slow/"))
    await Slow.started.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await soon(lambda: is_whole(everywhere))
    assert await read(User.objects.count) == 0


def is_whole(alias: str) -> bool:
    stats = databases[alias].stats()
    return bool(stats["pool_size"] == stats["pool_available"])


# Several databases


@pytest.mark.parametrize("is_native", [True])
async def test_in_native_mode_a_view_uses_several_databases(site: Any, client: AsyncClient) -> None:
    with override_settings(DATABASE_ROUTERS=[]):
        assert await text(client, "/two/") == "static "
        assert await read(User.objects.using("sqlite").count) == 1
    assert await read(User.objects.count) == 1


@pytest.mark.parametrize("is_native", [False])
async def test_without_it_another_database_is_refused(site: Any, client: AsyncClient) -> None:
    with override_settings(DATABASE_ROUTERS=[]), pytest.raises(AliasNotInSession, match="sqlite"):
        await client.get("/two/")


# Without the middleware


async def test_without_the_middleware_the_error_says_what_to_do() -> None:
    request = AsyncRequestFactory().get("/books/")
    with pytest.raises(ConfigurationError, match="first in MIDDLEWARE"):
        await Books.as_view()(request)


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
def test_under_the_sync_test_client_the_error_names_the_async_one() -> None:
    with (
        override_settings(ROOT_URLCONF=pages.__name__, MIDDLEWARE=MIDDLEWARE[:1]),
        pytest.raises(SyncContextError, match=r"use AsyncClient\(\)"),
    ):
        Client().get("/books/")


def test_a_view_that_keeps_its_thread_is_refused() -> None:
    @keep_thread
    class Kept(Books):
        pass

    with pytest.raises(ConfigurationError, match=r"derive it from .* django\.views\.generic"):
        Kept.as_view()


async def test_a_view_is_tested_alone_with_a_session_of_the_tests(site: Any) -> None:
    request: Any = AsyncRequestFactory().get("/books/")
    request.user = AnonymousUser()
    async with databases["default"].get_session() as session:
        request.db_session = session
        response: Any = await Books.as_view(paginate_by=1)(request)
        assert response.context_data["paginator"].num_pages == 3
        await response.render()
        assert response.content == b"A Slow Train by Ada Holm #sea;1 of 3"
        # Rendered, it is as any other.
        assert response.render() is response
