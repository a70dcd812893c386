"""Views whose methods are async, with the session of their request.

With real commits and rollbacks of requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.test import AsyncClient

from django_asyncsession import SessionInUseError, SessionStateError
from tests.models import Book, Tag, User
from tests.views.visits import numbers, read, text, titles

pytestmark = pytest.mark.usefixtures("empty_tables")


async def test_every_method_of_a_list_may_be_async(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    response = await client.get("/async/books/")
    assert response.content == b"The Quiet Harbour by Ada Holm #sea;1 of 3"
    assert response["count"] == "3"
    assert threads == []


async def test_every_method_of_a_form_may_be_async(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    pk, author, _ = await read(numbers)
    (tag,) = await read(lambda: list(Tag.objects.all()))
    threads.clear()
    url = f"/async/books/{pk}/"
    assert "The Quiet Harbour" in await text(client, url)
    form = {"title": "Changed", "author": author, "tags": tag.pk, "price": 1}
    response = await client.post(url, form)
    assert (response.status_code, response["Location"]) == (302, f"/books/{pk}/")
    assert (await client.post(url, {"title": ""})).status_code == 422
    assert (await client.get("/async/books/4711/")).status_code == 404
    assert threads == []
    book = await read(lambda: Book.objects.get(pk=pk))
    assert (book.title, book.editor_id) == ("Changed", author)


async def test_handlers_may_be_async(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    pk, _, _ = await read(numbers)
    threads.clear()
    assert await text(client, f"/async/handlers/{pk}/") == "The Quiet Harbour"
    response = await client.post(f"/async/handlers/{pk}/", {"title": "Changed"})
    assert response.content == b"Changed" and "no-cache" in response["Cache-Control"]
    assert threads == []
    assert (await read(titles))[0] == "Changed"


async def test_a_plain_method_may_override_an_async_one(site: Any, client: AsyncClient) -> None:
    found = await text(client, "/async/cheap/")
    assert found.startswith("The Quiet Harbour by Ada Holm #sea;Letters from Riga")


async def test_a_session_is_injected_into_a_handler(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    assert await text(client, "/injected/") == "1 True"
    assert threads == []


@pytest.mark.parametrize("is_native", [True])
async def test_djangos_async_methods_work_in_async_methods_in_native_mode(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    pk, _, _ = await read(numbers)
    threads.clear()
    assert "The Quiet Harbour" in await text(client, f"/async/django/{pk}/")
    assert threads == []
    assert await read(User.objects.count) == 1


@pytest.mark.parametrize("is_native", [False])
async def test_djangos_async_methods_keep_their_thread_without_it(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    pk, _, _ = await read(numbers)
    assert "The Quiet Harbour" in await text(client, f"/async/django/{pk}/")
    assert "QuerySet.create" in threads


async def test_awaiting_a_plain_method_of_django_is_pythons_error(
    site: Any, client: AsyncClient
) -> None:
    with pytest.raises(TypeError, match="dict can't be used in 'await' expression"):
        await client.get("/awaits/")


async def test_tasks_that_would_wait_for_the_view_are_refused(
    site: Any, client: AsyncClient
) -> None:
    with pytest.raises(SessionInUseError, match="session of its own"):
        async with asyncio.timeout(5):
            await client.get("/gathers/")


async def test_an_async_method_reads_in_parallel_as_any_async_code_does(
    everywhere: str, client: AsyncClient
) -> None:
    assert await text(client, "/parallel/") == "3 by 2 "


async def test_committing_in_the_middle_of_a_view_is_refused(
    site: Any, client: AsyncClient
) -> None:
    with pytest.raises(SessionStateError, match=r"commit\(\) inside sync code"):
        await client.get("/commits/")
    assert await read(User.objects.count) == 0
