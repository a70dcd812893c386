"""Sync code in a session: all of Django, natively async, on its connection, in its transaction.

With real commits where the end of sync code in autocommit mode, or the pool, is the point.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from django import forms
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import authenticate
from django.contrib.auth.models import Group
from django.contrib.auth.models import User as Account
from django.core.exceptions import ObjectDoesNotExist
from django.core.paginator import Paginator
from django.db import IntegrityError, connections, router, transaction
from django.db.models import Avg, Count, F, Max, Prefetch, Q, Sum, signals
from django.http import Http404
from django.shortcuts import get_object_or_404
from django.template import Context, Template, TemplateDoesNotExist
from django.test import RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path

from django_asyncsession import DatabaseInterface
from django_asyncsession.testing import capture_on_commit_callbacks
from tests.faults import LoopProbe
from tests.models import Author, Book, Tag, User
from tests.sessions import INSERT, names, whole


@pytest.fixture
def books(database: DatabaseInterface) -> DatabaseInterface:
    """A database with three authors, and the first two with four books each, with two tags."""
    make_books(database.alias)
    return database


def make_books(alias: str) -> None:
    for name in ("Le Guin", "Borges", "Nobody"):
        Author.objects.using(alias).create(name=name)
    tags = [Tag.objects.using(alias).create(name=name) for name in ("new", "old")]
    for author in Author.objects.using(alias).exclude(name="Nobody"):
        for n in range(4):
            book = Book.objects.using(alias).create(title=f"{author} {n}", author=author, price=n)
            book.tags.set(tags)


async def run(db: DatabaseInterface, fn: Any) -> Any:
    """What `fn`, called in a session with the alias, returns; on this thread, and with no stall."""
    thread = threading.get_ident()

    def call() -> Any:
        assert threading.get_ident() == thread
        return fn(db.alias)

    threads = threading.active_count()
    async with db.get_session() as session:
        result = await session.run_sync(call)
    if db.vendor != "sqlite":
        assert threading.active_count() == threads
    return result


async def test_it_passes_arguments_results_and_errors(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        assert await session.run_sync(lambda a, *, b: (a, b), 1, b=2) == (1, 2)
        with pytest.raises(ZeroDivisionError):
            await session.run_sync(lambda: 1 / 0)

        async def wrong() -> None: ...

        with pytest.raises(TypeError, match="calls sync functions, and"):
            await session.run_sync(wrong)


async def test_an_errors_context_is_kept(database: DatabaseInterface) -> None:
    def fails() -> None:
        try:
            {}["missing"]
        except KeyError:
            raise ValueError("second")  # noqa: B904

    async with database.get_session() as session:
        with pytest.raises(ValueError, match="second") as caught:
            await session.run_sync(fails)
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__


async def test_select_related_and_prefetch_related(books: DatabaseInterface) -> None:
    def read(alias: str) -> Any:
        with CaptureQueriesContext(connections[alias]) as queries:
            joined = [
                (book.author.name, book.editor)
                for book in Book.objects.using(alias).select_related("author", "editor")
            ]
            cheap = Prefetch("books", Book.objects.filter(price__lt=2), to_attr="cheap")
            prefetched = {
                author.name: (len(author.cheap), [b.tags.count() for b in author.books.all()])
                for author in Author.objects.using(alias).prefetch_related(cheap, "books__tags")
            }
        return joined, prefetched, len(queries)

    joined, prefetched, queries = await run(books, read)
    assert len(joined) == 8 and joined[0][1] is None
    assert prefetched["Le Guin"] == (2, [2, 2, 2, 2])
    assert prefetched["Nobody"] == (0, [])
    assert queries == 5


async def test_aggregates_annotations_and_lazy_relations(books: DatabaseInterface) -> None:
    def read(alias: str) -> Any:
        totals = Book.objects.using(alias).aggregate(Sum("price"), Avg("price"), n=Count("*"))
        annotated = (
            Author.objects.using(alias)
            .annotate(n=Count("books"), top=Max("books__price"))
            .filter(Q(n__gt=0) & ~Q(name="Borges"))
            .values_list("name", "n", "top")
        )
        lazy = Book.objects.using(alias).first()
        assert lazy is not None
        return totals["n"], totals["price__sum"], list(annotated), lazy.author.books.count()

    n, total, annotated, siblings = await run(books, read)
    assert (n, total, siblings) == (8, 12, 4)
    assert annotated == [("Le Guin", 4, 3)]


async def test_bulk_work(database: DatabaseInterface) -> None:
    def work(alias: str) -> Any:
        users = User.objects.using(alias)
        users.bulk_create([User(name=f"{n}") for n in range(300)], batch_size=100)
        every = list(users.order_by("pk"))
        for user in every:
            user.xp = user.pk
        users.bulk_update(every, ["xp"], batch_size=100)
        users.filter(xp__gt=0).update(level=F("level") + 1)
        users.filter(name__in=["1", "2"]).delete()
        return users.filter(level=2, xp=F("pk")).count(), len(list(users.iterator(chunk_size=50)))

    assert await run(database, work) == (298, 298)


async def test_update_or_create_and_get_or_create(database: DatabaseInterface) -> None:
    def work(alias: str) -> Any:
        authors = Author.objects.using(alias)
        made = [authors.update_or_create(name="a", defaults={"born": None})[1] for _ in range(2)]
        made += [authors.get_or_create(name="b")[1] for _ in range(2)]
        return made, authors.count()

    assert await run(database, work) == ([True, False, True, False], 2)


async def test_nested_atomic_with_and_without_errors(database: DatabaseInterface) -> None:
    def work(alias: str) -> None:
        authors = Author.objects.using(alias)
        with transaction.atomic(using=alias):
            authors.create(name="a")
            with contextlib.suppress(IntegrityError), transaction.atomic(using=alias):
                authors.create(name="lost")
                authors.create(name="a")
            with transaction.atomic(using=alias), transaction.atomic(using=alias, savepoint=False):
                authors.create(name="b")
        with pytest.raises(RuntimeError, match="durable"), transaction.atomic(alias, durable=True):
            pass
        assert connections[alias].in_atomic_block

    await run(database, work)
    found = await run(database, lambda alias: sorted(a.name for a in Author.objects.using(alias)))
    assert found == ["a", "b"]


async def test_signals_and_on_commit(
    database: DatabaseInterface, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.option.pools:
        pytest.skip("captures callbacks, which only a test's transaction keeps from running")
    told: list[str] = []

    def saved(sender: Any, instance: Any, created: bool, using: str, **kwargs: Any) -> None:
        told.append(f"saved {instance.name} {created} {using == database.alias}")
        Tag.objects.using(using).create(name=f"by signal {Tag.objects.using(using).count()}")
        transaction.on_commit(lambda: told.append("committed"), using=using)

    signals.post_save.connect(saved, sender=User)
    try:
        async with capture_on_commit_callbacks(database.alias, execute=True):
            async with database.get_session() as session:
                user = await session.add(User(name="a"))
                user.name = "b"
                await session.add(user)
            assert told == ["saved a True True", "saved b False True"]
    finally:
        signals.post_save.disconnect(saved, sender=User)
    assert told[2:] == ["committed", "committed"]
    assert await run(database, lambda alias: Tag.objects.using(alias).count()) == 2


class AuthorForm(forms.ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = Author
        fields = ("name",)


class BookForm(forms.ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = Book
        fields = ("title", "author", "tags", "price")


class ToAlias:
    """A router that sends every query to one alias."""

    alias = "default"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.alias

    db_for_write = db_for_read

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        return True


@pytest.fixture
def routed(database: DatabaseInterface, monkeypatch: pytest.MonkeyPatch) -> DatabaseInterface:
    """The database that all queries go to which name none."""
    to_alias = ToAlias()
    to_alias.alias = database.alias
    monkeypatch.setattr(router, "routers", [to_alias])
    return database


async def test_a_model_form_checks_uniqueness_and_saves(
    routed: DatabaseInterface, books: DatabaseInterface
) -> None:
    def work(alias: str) -> Any:
        taken = AuthorForm({"name": "Borges"})
        assert not taken.is_valid()
        fresh = AuthorForm({"name": "Calvino"})
        assert fresh.is_valid()
        author = fresh.save()
        tags = [tag.pk for tag in Tag.objects.all()]
        form = BookForm({"title": "t", "author": author.pk, "tags": tags, "price": "1.50"})
        assert form.is_valid(), form.errors
        book = form.save()
        wrong = BookForm({"title": "t", "author": 4711, "price": "1"})
        assert not wrong.is_valid()
        return taken.errors["name"], book.tags.count(), str(BookForm(instance=book))

    errors, tags, html = await run(routed, work)
    assert errors == ["Author with this Name already exists."]
    assert tags == 2
    assert "<option" in html and "Calvino" in html


async def test_a_template_with_lazy_querysets(
    routed: DatabaseInterface, books: DatabaseInterface
) -> None:
    def work(alias: str) -> str:
        template = Template(
            "{% for a in authors %}{{ a.name }}: {% for b in a.books.all %}{{ b.title }},"
            "{{ b.tags.count }} {% empty %}none{% endfor %};{% endfor %}{{ authors|length }}"
        )
        return template.render(Context({"authors": Author.objects.order_by("name")}))

    html = await run(routed, work)
    assert html.startswith("Borges: Borges 0,2 Borges 1,2")
    assert html.endswith("Nobody: none;3")


async def test_a_response_is_rendered_in_the_session(
    routed: DatabaseInterface, books: DatabaseInterface
) -> None:
    page = (
        "{% for a in authors %}{{ a.name }} {{ a.books.count }};{% endfor %}{{ request.path }} "
        "{{ here }}"
    )
    engine = {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "context_processors": ["django.template.context_processors.request"],
            "loaders": [("django.template.loaders.locmem.Loader", {"authors.txt": page})],
        },
    }
    context = {"authors": Author.objects.order_by("name"), "here": threading.get_ident}
    async with routed.get_session() as session:
        await session.add(Author(name="Zora, not committed yet"))
        with override_settings(TEMPLATES=[engine]):
            request = RequestFactory().get("/authors/")
            names = ["no-such.txt", "authors.txt"]
            response = await session.render(request, names, context, "text/plain", 201)
            with pytest.raises(TemplateDoesNotExist):
                await session.render(None, "no-such.txt")
    expected = "Borges 4;Le Guin 4;Nobody 0;Zora, not committed yet 0;/authors/ "
    assert response.content.decode() == f"{expected}{threading.get_ident()}"
    assert (response.status_code, response["Content-Type"]) == (201, "text/plain")


async def test_a_paginator(routed: DatabaseInterface, books: DatabaseInterface) -> None:
    def work(alias: str) -> Any:
        pages = Paginator(Book.objects.order_by("pk").select_related("author"), 3)
        page = pages.page(3)
        return pages.count, pages.num_pages, [b.author.name for b in page], page.has_next()

    assert await run(routed, work) == (8, 3, ["Borges", "Borges"], False)


async def test_shortcuts_and_the_contrib_apps(
    routed: DatabaseInterface, books: DatabaseInterface
) -> None:
    def work(alias: str) -> Any:
        with pytest.raises(Http404):
            get_object_or_404(Author, pk=4711)
        with pytest.raises(ObjectDoesNotExist):
            Author.objects.get(pk=4711)
        account = Account.objects.create_user("heck", password="secret")
        account.groups.add(Group.objects.create(name="staff"))
        assert authenticate(username="heck", password="secret") == account
        assert authenticate(username="heck", password="wrong") is None
        return account.has_perm("tests.add_book"), get_object_or_404(Author, name="Borges").name

    assert await run(routed, work) == (False, "Borges")


class BookAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ("title", "author", "price")
    list_filter = ("author", "tags")
    search_fields = ("title", "author__name")


site = admin.AdminSite()
site.register(Author)
site.register(Book, BookAdmin)
urlpatterns = [path("admin/", site.urls)]


def request_of_the_boss(data: dict[str, str] | None = None, **query: str) -> Any:
    factory = RequestFactory()
    request: Any = factory.get("/admin/", query) if data is None else factory.post("/admin/", data)
    request.user = Account.objects.create_superuser("boss", password="secret")
    request.session = {}
    request._dont_enforce_csrf_checks = True
    request._messages = _Messages()
    return request


@override_settings(ROOT_URLCONF=__name__)
async def test_the_admins_changelist(routed: DatabaseInterface, books: DatabaseInterface) -> None:
    def work(alias: str) -> str:
        response: Any = BookAdmin(Book, site).changelist_view(request_of_the_boss(q="Guin"))
        return str(response.render().content.decode())

    html = await run(routed, work)
    assert "4 results" in html and "Le Guin 3" in html and "Borges 0" not in html


@override_settings(ROOT_URLCONF=__name__)
async def test_the_admins_add_view_with_its_log(routed: DatabaseInterface) -> None:
    def work(alias: str) -> Any:
        request = request_of_the_boss({"name": "Calvino", "born": "1923-10-15"})
        response = admin.ModelAdmin(Author, site).add_view(request)
        return response.status_code, Author.objects.count(), LogEntry.objects.count()

    assert await run(routed, work) == (302, 1, 1)


class _Messages(list[str]):
    def add(self, level: int, message: str, extra_tags: str) -> None:
        """As Django's message storage does."""
        self.append(message)


async def test_sync_code_shares_the_transaction_with_sql(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        await session.execute(INSERT, ["sql"])
        assert await session.run_sync(User.objects.using(database.alias).count) == 1
        await session.run_sync(User.objects.using(database.alias).create, name="orm")
        assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 2
        await session.rollback()
        assert await session.run_sync(User.objects.using(database.alias).count) == 0
        await session.run_sync(User.objects.using(database.alias).create, name="kept")
    assert await names(database) == ["kept"]


async def test_an_atomic_block_left_open_in_sync_code_is_undone(
    database: DatabaseInterface,
) -> None:
    def work() -> None:
        transaction.atomic(using=database.alias).__enter__()
        User.objects.using(database.alias).create(name="lost")

    async with database.get_session(autocommit=True) as session:
        await session.run_sync(work)
    assert await names(database) == []


# On connections of the pool: how they go back to it, what they commit, what waits meanwhile


async def test_an_iterator_left_early_leaves_the_connection_usable(
    real_database: DatabaseInterface,
) -> None:
    users = User.objects.using(real_database.alias)

    def work() -> str:
        users.bulk_create([User(name=f"{n:03}") for n in range(200)])
        for user in users.order_by("name").iterator(chunk_size=10):
            return user.name
        return "none"

    async with real_database.get_session() as session:
        assert await session.run_sync(work) == "000"
        assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 200
    assert real_database.stats()["returns_bad"] == 0
    await whole(real_database)


async def test_in_autocommit_mode_sync_code_commits_by_itself(
    real_database: DatabaseInterface,
) -> None:
    def work() -> None:
        assert connections[real_database.alias].get_autocommit()
        User.objects.using(real_database.alias).create(name="a")
        with contextlib.suppress(ZeroDivisionError), transaction.atomic(using=real_database.alias):
            User.objects.using(real_database.alias).create(name="lost")
            raise ZeroDivisionError
        with transaction.atomic(using=real_database.alias, durable=True):
            User.objects.using(real_database.alias).create(name="b")

    async with real_database.get_session(autocommit=True) as session:
        await session.run_sync(work)
        assert await names(real_database) == ["a", "b"]
    await whole(real_database)


async def test_long_sync_work_lets_other_tasks_run(real_database: DatabaseInterface) -> None:
    def work() -> int:
        return sum(len(list(Book.objects.using(real_database.alias))) for _ in range(50))

    worst = []
    async with real_database.get_session() as session:
        await session.run_sync(make_books, real_database.alias)
    for _ in range(3):
        async with real_database.get_session() as session, LoopProbe() as probe:
            assert await session.run_sync(work) == 400
        worst.append(probe.worst)
    assert min(worst) < 0.05
