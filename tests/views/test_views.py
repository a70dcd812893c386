"""Django's class-based views in the request's session: lists, rows, forms, and who may see them.

With real commits and rollbacks of requests, seen from Django's own connection, and real pools,
whole after each test.
"""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.contrib.auth.models import User as Account
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import IntegrityError
from django.test import AsyncClient

from tests.models import Author, Book, Tag, Upload
from tests.views.pages import Books
from tests.views.visits import numbers, read, text, titles, user

pytestmark = pytest.mark.usefixtures("empty_tables")


# Lists


async def test_a_list_is_in_pages_and_its_template_loads_what_it_shows(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    first = "A Slow Train by Ada Holm #sea;Letters from Riga by Ada Holm #sea;1 of 2"
    assert await text(client, "/books/") == first
    assert await text(client, "/books/?page=last") == "The Quiet Harbour by Ada Holm #sea;2 of 2"
    assert threads == []


async def test_pages_are_found_where_django_finds_them(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    assert "2 of 2" in await text(client, "/books/page/2/")
    assert "3 of 3" in await text(client, "/few/?page=3")
    for url in ("/books/?page=3", "/books/?page=x", "/books/page/0/", "/no-books/"):
        assert (await client.get(url)).status_code == 404
    assert threads == []


async def test_setup_and_get_queryset_may_ask_the_database(site: Any, client: AsyncClient) -> None:
    _, author, other = await read(numbers)
    assert (await text(client, f"/authors/{author}/books/")).startswith("A Slow Train by")
    assert await text(client, f"/authors/{other}/books/") == ""


async def test_the_context_of_a_response_is_as_a_test_expects_it(
    site: Any, client: AsyncClient
) -> None:
    response = await client.get("/books/")
    assert [template.name for template in response.templates] == ["tests/book_list.html"]
    assert response.context["paginator"].count == 3
    assert isinstance(response.context["view"], Books)


# One row


async def test_one_row_is_found_by_its_key_or_its_slug(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    pk, _, _ = await read(numbers)
    threads.clear()
    assert await text(client, f"/books/{pk}/") == "The Quiet Harbour by Ada Holm"
    found = await text(client, "/books/A%20Slow%20Train/")
    assert found == "A Slow Train by Ada Holm, one of 3"
    assert threads == []


async def test_a_row_that_is_not_there_is_a_404(site: Any, client: AsyncClient) -> None:
    assert (await client.get("/books/4711/")).status_code == 404
    assert (await client.get("/books/no-such-title/")).status_code == 404


# Forms


async def test_a_form_offers_rows_and_saves_one(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    _, author, _ = await read(numbers)
    (tag,) = await read(lambda: list(Tag.objects.all()))
    threads.clear()
    page = await text(client, "/new/")
    assert f'<option value="{author}">Ada Holm</option>' in page
    form = {"title": "New", "author": author, "tags": [tag.pk], "price": "12.50"}
    response = await client.post("/new/", form)
    assert response.status_code == 302
    assert threads == []
    book = await read(lambda: Book.objects.prefetch_related("tags").get(title="New"))
    assert response["Location"] == f"/books/{book.pk}/"
    assert (book.author_id, list(book.tags.all())) == (author, [tag])
    assert "New is saved" in await text(client, "/page/")


async def test_an_invalid_form_is_shown_again_with_its_errors(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    response = await client.post("/new/", {"title": "", "author": 4711, "price": "x"})
    page = response.content.decode()
    assert response.status_code == 200 and threads == []
    for error in ("This field is required", "Select a valid choice", "Enter a number"):
        assert error in page
    assert len(await read(titles)) == 3


async def test_an_integrity_error_in_form_valid_saves_nothing(
    everywhere: str, quiet: AsyncClient
) -> None:
    form = {"name": "Nora", "also": "Ada Holm"}
    assert (await quiet.post("/new-author/", form)).status_code == 500
    with pytest.raises(IntegrityError):
        await AsyncClient().post("/new-author/", form)
    assert await read(lambda: Author.objects.filter(name="Nora").exists()) is False
    assert len(await read(titles)) == 3


async def test_a_row_is_shown_in_its_form_and_changed(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    pk, author, _ = await read(numbers)
    tag = await read(lambda: Tag.objects.get().pk)
    threads.clear()
    assert 'value="The Quiet Harbour"' in await text(client, f"/books/{pk}/change/")
    form = {"title": "Changed", "author": author, "tags": tag, "price": 1}
    response = await client.post(f"/books/{pk}/change/", form)
    assert (response.status_code, response["Location"]) == (302, "/books/")
    assert threads == []
    assert (await read(titles))[0] == "Changed"
    assert (await client.post("/books/4711/change/", form)).status_code == 404


async def test_a_row_is_deleted_with_what_depends_on_it_after_a_question(
    everywhere: str, client: AsyncClient, threads: list[str]
) -> None:
    _, author, _ = await read(numbers)
    threads.clear()
    assert await text(client, f"/authors/{author}/delete/") == "Delete Ada Holm?"
    response = await client.post(f"/authors/{author}/delete/")
    assert (response.status_code, response["Location"]) == (302, "/books/")
    assert threads == []
    assert await read(titles) == []
    assert (await client.post(f"/authors/{author}/delete/")).status_code == 404


async def test_a_form_view_asks_the_database_in_clean_and_in_form_valid(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    _, author, other = await read(numbers)
    threads.clear()
    found = await client.post("/search/", {"author": author})
    assert b"The Quiet Harbour,Letters from Riga,A Slow Train" in found.content
    assert b"Ivo Sato wrote nothing" in (await client.post("/search/", {"author": other})).content
    assert threads == []


async def test_formsets_are_saved_with_the_row_or_not_at_all(
    site: Any, client: AsyncClient
) -> None:
    _, author, _ = await read(numbers)
    page = await client.get(f"/authors/{author}/")
    books = page.context["books"]
    form = {"name": "Ada Quist", **books.management_form.initial, **_fields(books)}
    form |= {"books-TOTAL_FORMS": 4, "books-INITIAL_FORMS": 3, "books-0-title": "Renamed"}
    form |= {"books-3-title": "Fourth", "books-3-price": "x"}
    response = await client.post(f"/authors/{author}/", form)
    assert response.status_code == 200 and b"Enter a number" in response.content
    assert (await read(titles))[0] == "The Quiet Harbour"
    response = await client.post(f"/authors/{author}/", {**form, "books-3-price": "4"})
    assert response.status_code == 302
    assert await read(titles) == ["Renamed", "Letters from Riga", "A Slow Train", "Fourth"]
    assert await read(lambda: Author.objects.get(pk=author).name) == "Ada Quist"


def _fields(formset: Any) -> dict[str, Any]:
    """What a browser sends for the rows of a formset."""
    return {
        form.add_prefix(name): form.initial.get(name, form.instance.pk)
        for form in formset.initial_forms
        for name in ("id", "title", "price")
    }


async def test_a_file_is_uploaded(site: Any, client: AsyncClient) -> None:
    file = SimpleUploadedFile("words.txt", b"some words")
    assert (await client.post("/upload/", {"file": file})).status_code == 302
    upload = await read(Upload.objects.get)
    assert upload.file.read() == b"some words"


# Who may


async def test_a_visitor_is_sent_to_the_login_page(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    for url in ("/members/", "/editors/"):
        response = await client.get(url)
        assert (response.status_code, response["Location"]) == (302, f"/login/?next={url}")
    assert (await client.get("/staff/")).status_code == 403
    assert (await client.get("/async-staff/")).status_code == 403
    assert threads == []
    assert (await client.get("/only-members/")).status_code == 302


async def test_a_user_sees_what_the_user_may(everywhere: str, client: AsyncClient) -> None:
    account = await user(client)
    statuses = [
        (await client.get(f"/{url}/")).status_code
        for url in ("members", "only-members", "editors", "staff", "async-staff")
    ]
    assert statuses == [200, 200, 403, 403, 403]
    found = Permission.objects.filter(codename="change_book")
    await read(lambda: account.user_permissions.set(found))
    await read(lambda: Account.objects.update(is_staff=True))
    for url in ("editors", "staff", "async-staff"):
        assert (await client.get(f"/{url}/")).status_code == 200


async def test_a_user_and_permissions_are_asked_for_without_a_thread(
    site: Any, client: AsyncClient, threads: list[str]
) -> None:
    await user(client, "change_book", is_staff=True)
    threads.clear()
    for url in ("members", "editors", "staff", "async-staff"):
        assert (await client.get(f"/{url}/")).status_code == 200
    assert threads == []
