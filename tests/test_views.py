"""Django's class-based views in the request's session: all that a developer does with them.

With real commits and rollbacks of requests, seen from Django's own connection, and real pools,
whole after each test.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import date
from types import MappingProxyType
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django import forms
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.mixins import (
    LoginRequiredMixin,
    PermissionRequiredMixin,
    UserPassesTestMixin,
)
from django.contrib.auth.models import AnonymousUser, Permission
from django.contrib.auth.models import User as Account
from django.contrib.auth.views import LoginView
from django.contrib.messages.views import SuccessMessageMixin
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import IntegrityError, connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template import TemplateDoesNotExist
from django.test import AsyncClient, AsyncRequestFactory, Client, override_settings
from django.urls import path, reverse_lazy
from django.utils.decorators import method_decorator
from django.views import generic
from django.views.decorators.cache import cache_page, never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.generic.dates import YearArchiveView

from django_asyncsession import (
    AliasNotInSession,
    Session,
    SessionInUseError,
    SessionStateError,
    SyncContextError,
    databases,
    inject_session,
    keep_thread,
)
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.views import (
    CreateView,
    DeleteView,
    DetailView,
    FormView,
    ListView,
    RedirectView,
    TemplateView,
    UpdateView,
    View,
)
from tests.models import Author, Book, Tag, Upload, User
from tests.sessions import slow, soon, whole
from tests.threads import sent_to_threads

pytestmark = pytest.mark.usefixtures("empty_tables")

MIDDLEWARE = [
    "django_asyncsession.middleware.AsyncSessionMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
PAGES = {
    "tests/book_list.html": "{% for book in book_list %}{{ book.title }} by {{ book.author }}"
    "{% for tag in book.tags.all %} #{{ tag }}{% endfor %};{% endfor %}"
    "{% if is_paginated %}{{ page_obj.number }} of {{ paginator.num_pages }}{% endif %}",
    "tests/book_detail.html": "{{ object.title }} by {{ book.author.name }}{{ extra }}",
    "tests/book_form.html": "{{ form.errors }}{{ form.as_p }}{{ titles|join:',' }}",
    "tests/book_confirm_delete.html": "Delete {{ object }} by {{ object.author }}?",
    "tests/author_form.html": "{{ form.errors }}{{ form.as_p }}{{ books }}",
    "tests/author_confirm_delete.html": "Delete {{ object }}?",
    "tests/upload_form.html": "{{ form.as_p }}",
    "plain.html": "{{ text }}{{ view.heading }}{% for m in messages %}{{ m }}{% endfor %}",
    "broken.html": "{% for user in users %}{{ user.name }}{% endfor %}{% include missing %}",
    "other.html": "from {{ origin }}: {{ book_list|length }}",
    "registration/login.html": "{{ form.errors }}",
}
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {
            "loaders": [("django.template.loaders.locmem.Loader", PAGES)],
            "context_processors": [
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
# What Django, and its test client, do around a view.
AROUND = {
    "close",
    "log_response",
    "process_exception_by_middleware",
    "process_request",
    "process_response",
    "process_template_response",
    "response_for_exception",
    "sync_send",
}


# The views


class Books(ListView[Book]):
    model = Book
    ordering = "title"
    paginate_by = 2


class EmptyBooks(ListView[Book]):
    queryset = Book.objects.none()
    allow_empty = False


class BooksOf(ListView[Book]):
    """The books of the user who asks."""

    def setup(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().setup(request, *args, **kwargs)
        self.author = Author.objects.get(pk=kwargs["author"])

    def get_queryset(self) -> Any:
        return self.author.books.order_by("title")


class OneBook(DetailView[Book]):
    model = Book


class BookByTitle(DetailView[Book]):
    model = Book
    slug_field = "title"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        return super().get_context_data(extra=f", one of {Book.objects.count()}", **kwargs)


class NewBook(SuccessMessageMixin, CreateView[Book]):
    model = Book
    fields = ("title", "author", "tags", "price")
    success_url = "/books/{id}/"
    success_message = "%(title)s is saved"


class NewAuthor(CreateView[Author]):
    model = Author
    fields = ("name",)
    success_url = "/books/"

    def form_valid(self, form: Any) -> HttpResponse:
        super().form_valid(form)
        Book.objects.create(title="First", author=form.instance)
        if "fail" in self.request.POST:
            raise ValueError("after the insert")
        # The name is taken, and no form has asked.
        Author.objects.create(name=self.request.POST["also"])
        return HttpResponse("never")


class ChangedBook(UpdateView[Book]):
    model = Book
    fields = ("title", "author", "tags", "price")
    success_url = reverse_lazy("books")


class DeletedAuthor(DeleteView[Author]):
    model = Author
    success_url = "/books/"


class SearchForm(forms.Form):
    author = forms.ModelChoiceField(Author.objects.order_by("name"))

    def clean_author(self) -> Author:
        author: Author = self.cleaned_data["author"]
        if not author.books.exists():
            raise forms.ValidationError(f"{author} wrote nothing")
        return author


class Search(FormView[SearchForm]):
    form_class = SearchForm
    template_name = "tests/book_form.html"
    success_url = "/books/"

    def form_valid(self, form: SearchForm) -> HttpResponse:
        titles = form.cleaned_data["author"].books.values_list("title", flat=True)
        return self.render_to_response(self.get_context_data(form=form, titles=titles))


BookFormSet: Any = forms.inlineformset_factory(
    Author, Book, fields=("title", "price"), fk_name="author", extra=1
)


class AuthorAndBooks(UpdateView[Author]):
    model = Author
    fields = ("name",)
    success_url = "/books/"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        kwargs.setdefault("books", BookFormSet(instance=self.object))
        return super().get_context_data(**kwargs)

    def form_valid(self, form: Any) -> HttpResponse:
        books = BookFormSet(self.request.POST, instance=self.object)
        if not books.is_valid():
            transaction.set_rollback(True)
            return self.render_to_response(self.get_context_data(form=form, books=books))
        with transaction.atomic():
            books.save()
        return super().form_valid(form)


class NewUpload(CreateView[Upload]):
    model = Upload
    fields = ("file",)
    success_url = "/books/"


class Members(LoginRequiredMixin, Books):
    login_url = "/login/"


class Editors(PermissionRequiredMixin, Books):
    permission_required = "tests.change_book"
    login_url = "/login/"


class Staff(UserPassesTestMixin, Books):
    raise_exception = True

    def test_func(self) -> bool:
        user = self.request.user
        return Account.objects.filter(pk=user.pk, is_staff=True).exists()


class AsyncStaff(UserPassesTestMixin, Books):
    raise_exception = True

    async def test_func(self) -> bool:
        await asyncio.sleep(0)
        return Account.objects.filter(pk=self.request.user.pk, is_staff=True).exists()


class Login(View, LoginView):
    next_page = "/books/"
    authentication_form = AuthenticationForm


class AuthorsOfYear(View, YearArchiveView):
    model = Author
    date_field = "born"
    make_object_list = True
    allow_future = True
    template_name = "plain.html"
    extra_context = MappingProxyType({"text": "that year"})


class Page(TemplateView):
    template_name = "plain.html"
    extra_context = MappingProxyType({"text": "static "})


@method_decorator([never_cache, transaction.atomic], name="dispatch")
class Decorated(CreateView[Author]):
    model = Author
    fields = ("name",)
    success_url = "/books/"


@method_decorator(csrf_exempt, name="dispatch")
class Thread(View):
    """Where each part of a view runs."""

    http_method_names = ("get", "options", "put")

    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"{threading.get_ident()} {request.GET.get('text', '')}")


class Template(ListView[User]):
    model = User
    template_name = "plain.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        return super().get_context_data(text=Place(), **kwargs)


class Place:
    """Shows the thread that renders it."""

    def __str__(self) -> str:
        return str(threading.get_ident())


class Streamed(View):
    async def get(self, request: HttpRequest) -> StreamingHttpResponse:
        User.objects.create(name="streamed")

        async def body() -> AsyncIterator[str]:
            async for row in request.db_session.stream("SELECT name FROM tests_user"):
                yield row[0]

        return StreamingHttpResponse(body())


class AsyncBooks(ListView[Book]):
    """With every hook of a list that can be async."""

    paginate_by = 1

    async def setup(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().setup(request, *args, **kwargs)
        self.count = await request.db_session.fetch_value("SELECT COUNT(*) FROM tests_book")

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        response = super().dispatch(request, *args, **kwargs)
        response["count"] = self.count
        return response

    async def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return super().get(request, *args, **kwargs)

    async def get_queryset(self) -> Any:
        await asyncio.sleep(0)
        return Book.objects.select_related("author").order_by(self.get_ordering() or "-title")

    async def get_context_data(self, **kwargs: Any) -> Any:
        context = super().get_context_data(**kwargs)
        # Async code awaits its own async methods.
        context["again"] = await self.get_queryset()
        assert [book.title for book in context["again"]][:1] == ["The Quiet Harbour"]
        return context


class AsyncBook(UpdateView[Book]):
    """With every hook of a form that can be async."""

    fields = ("title", "author", "tags", "price")

    async def get_object(self, queryset: Any = None) -> Book:
        book = await self.request.db_session.get(Book, self.kwargs["pk"])
        return book or super().get_object(Book.objects.none())

    async def get_form_kwargs(self) -> Any:
        await asyncio.sleep(0)
        return super().get_form_kwargs()

    async def get_success_url(self) -> str:
        return f"/books/{self.object.pk}/"

    async def form_valid(self, form: Any) -> HttpResponse:
        form.instance.editor = await self.editor()
        return super().form_valid(form)

    async def editor(self) -> Author:
        """Its own method, which nothing of Django's knows."""
        editors = [self.named(name) for name in ("Ada Holm", "nobody")]
        found = [await editor for editor in editors]
        return next(author for author in found if author is not None)

    async def named(self, name: str) -> Author | None:
        session = self.request.db_session
        author: Author | None = await session.select(Author).where(name=name).one_or_none()
        return author

    async def form_invalid(self, form: Any) -> HttpResponse:
        await asyncio.sleep(0)
        response = super().form_invalid(form)
        response.status_code = 422
        return response


class AsyncHandlers(View):
    """As an async view of Django's."""

    async def get(self, request: HttpRequest, pk: int) -> HttpResponse:
        return HttpResponse((await request.db_session.get_one(Book, pk)).title)

    @method_decorator(never_cache)
    async def post(self, request: HttpRequest, pk: int) -> HttpResponse:
        Book.objects.filter(pk=pk).update(title=request.POST["title"])
        return HttpResponse(Book.objects.get(pk=pk).title)


class OnlyCheap(AsyncBooks):
    """A plain override of an async method, in which Django's code finds nothing to await."""

    def get_queryset(self) -> Any:
        return super().get_queryset()

    async def get_context_data(self, **kwargs: Any) -> Any:
        return {**kwargs, "book_list": await self.get_queryset(), "view": self}


@method_decorator(never_cache, name="dispatch")
class Both(View):
    """Made of two others, as Django's documentation has it."""

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return OneBook.as_view()(request, *args, **kwargs)

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return ChangedBook.as_view()(request, *args, **kwargs)


class Injected(View):
    @inject_session
    async def get(self, request: HttpRequest, session: Session) -> HttpResponse:
        await session.add(User(name="injected"))
        return HttpResponse(f"{User.objects.count()} {session is request.db_session}")


class DjangosAsyncMethods(AsyncBook):
    """Which only native mode brings into the session."""

    async def get_object(self, queryset: Any = None) -> Book:
        await User.objects.acreate(name="seen")
        return await Book.objects.aget(pk=self.kwargs["pk"])


class Awaits(Books):
    async def get_context_data(self, **kwargs: Any) -> Any:
        return await super().get_context_data(**kwargs)


class Gathers(Books):
    async def get_queryset(self) -> Any:
        session = self.request.db_session
        assert Book.objects.exists()
        await asyncio.gather(session.execute("SELECT 1"), session.execute("SELECT 2"))


class GathersInParallel(Books):
    async def get_context_data(self, **kwargs: Any) -> Any:
        session = self.request.db_session
        books, authors = await session.gather(session.select(Book), session.select(Author))
        return super().get_context_data(text=f"{len(books)} by {len(authors)} ", **kwargs)


class Commits(Books):
    async def get_queryset(self) -> Any:
        User.objects.create(name="before")
        await self.request.db_session.commit()
        return super().get_queryset()


class Broken(Page):
    template_name = "broken.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        User.objects.create(name="half")
        return super().get_context_data(users=User.objects.all(), **kwargs)


class Slow(Books):
    """Slow where it is told to be."""

    started = asyncio.Event()
    where = ""

    def wait(self, where: str) -> None:
        if where == self.where:
            User.objects.create(name="half")
            self.started.set()
            connection = connections[User.objects.db]
            with connection.cursor() as cursor:
                cursor.execute(slow(databases[connection.alias], 30))

    def get_queryset(self) -> Any:
        self.wait("sync")
        return super().get_queryset()

    async def get_ordering(self) -> Any:
        self.wait("sync in async")
        if self.where == "async":
            User.objects.create(name="half")
            self.started.set()
            await asyncio.sleep(30)
        return "title"

    def heading(self) -> str:
        self.wait("template")
        return ""


class TwoAliases(Page):
    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        User.objects.using("sqlite").create(name="there")
        User.objects.using("default").create(name="here")
        return super().get(request, *args, **kwargs)


urlpatterns = [
    path("books/", Books.as_view(), name="books"),
    path("few/", Books.as_view(paginate_by=1, template_name="tests/book_list.html")),
    path("books/page/<page>/", Books.as_view()),
    path("no-books/", EmptyBooks.as_view()),
    path("authors/<int:author>/books/", BooksOf.as_view()),
    path("books/<int:pk>/", OneBook.as_view()),
    path("books/<slug>/", BookByTitle.as_view()),
    path("new/", NewBook.as_view()),
    path("new-author/", NewAuthor.as_view()),
    path("books/<int:pk>/change/", ChangedBook.as_view()),
    path("authors/<int:pk>/delete/", DeletedAuthor.as_view()),
    path("authors/<int:pk>/", AuthorAndBooks.as_view()),
    path("search/", Search.as_view()),
    path("upload/", NewUpload.as_view()),
    path("members/", Members.as_view()),
    path("editors/", Editors.as_view()),
    path("staff/", Staff.as_view()),
    path("async-staff/", AsyncStaff.as_view()),
    path("only-members/", login_required(Books.as_view(), login_url="/login/")),
    path("cached/", cache_page(60)(Books.as_view())),
    path("login/", Login.as_view()),
    path("born/<int:year>/", AuthorsOfYear.as_view()),
    path("page/", Page.as_view()),
    path("moved/", RedirectView.as_view(pattern_name="books", permanent=True)),
    path("decorated/", Decorated.as_view()),
    path("thread/", Thread.as_view()),
    path("template/", Template.as_view()),
    path("streamed/", Streamed.as_view()),
    path("async/books/", AsyncBooks.as_view(template_name="tests/book_list.html")),
    path("async/books/<int:pk>/", AsyncBook.as_view()),
    path("async/handlers/<int:pk>/", AsyncHandlers.as_view()),
    path("async/cheap/", OnlyCheap.as_view(template_name="tests/book_list.html")),
    path("both/<int:pk>/", Both.as_view()),
    path("injected/", Injected.as_view()),
    path("async/django/<int:pk>/", DjangosAsyncMethods.as_view()),
    path("awaits/", Awaits.as_view()),
    path("gathers/", Gathers.as_view()),
    path("parallel/", GathersInParallel.as_view(template_name="plain.html")),
    path("commits/", Commits.as_view()),
    path("broken/", Broken.as_view()),
    path("slow/", Slow.as_view(template_name="plain.html")),
    path("two/", TwoAliases.as_view()),
]


class OneDatabase:
    """A router that sends everything to one database, as if the project had no other."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        return self._alias

    db_for_write = db_for_read


@contextmanager
def served(alias: str, is_native: bool) -> Iterator[dict[str, Any]]:
    """The settings under which the views are served; yields those of sessions."""
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=MIDDLEWARE,
        TEMPLATES=TEMPLATES,
        DATABASE_ROUTERS=[OneDatabase(alias)],
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        ASYNC_SESSION={"ALIAS": alias, "NATIVE_ORM": is_native},
    ):
        ada = Author.objects.create(name="Ada Holm", born=date(1950, 2, 3))
        tag = Tag.objects.create(name="sea")
        for title in ("The Quiet Harbour", "Letters from Riga", "A Slow Train"):
            Book.objects.create(title=title, author=ada, price=10).tags.add(tag)
        Author.objects.create(name="Ivo Sato")
        connections.close_all()
        yield settings.ASYNC_SESSION


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def is_native(request: pytest.FixtureRequest) -> bool:
    """Native mode off, and on."""
    return bool(request.param)


@pytest.fixture
def site(is_native: bool) -> Iterator[dict[str, Any]]:
    """The views on PostgreSQL; yields the settings of sessions."""
    with served("default", is_native) as of_sessions:
        yield of_sessions


@pytest.fixture
def everywhere(alias: str, is_native: bool) -> Iterator[str]:
    """The views on each database in turn."""
    with served(alias, is_native):
        yield alias


@pytest.fixture(autouse=True)
async def closing() -> AsyncIterator[None]:
    """Every pool is whole after the test, and closed; so are the connections of Django's own."""
    yield
    for db in databases.all():
        if db.connected:
            await whole(db)
    await databases.close_all()
    await sync_to_async(connections.close_all)()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions, other than those around views, that went to a thread."""
    return sent_to_threads(monkeypatch, lambda fn: fn.__name__ not in AROUND)


@pytest.fixture
def client() -> AsyncClient:
    return AsyncClient()


@pytest.fixture
def quiet() -> AsyncClient:
    """A client that gets the error response, as a browser does, instead of the exception."""
    return AsyncClient(raise_request_exception=False)


async def read(fn: Callable[[], Any]) -> Any:
    """Look into the database through Django's own connection."""
    return await sync_to_async(fn)()


async def text(client: AsyncClient, url: str, status: int = 200) -> str:
    """The body of a page, which has this status."""
    response = await client.get(url)
    assert response.status_code == status, response.content
    return str(response.content.decode())


async def user(client: AsyncClient, *permissions: str, **fields: Any) -> Account:
    """A user who is logged in."""
    account = await read(lambda: Account.objects.create_user("ada", **fields))
    found = Permission.objects.filter(codename__in=permissions)
    await read(lambda: account.user_permissions.set(found))
    await client.aforce_login(account)
    return account


def titles() -> list[str]:
    return list(Book.objects.order_by("pk").values_list("title", flat=True))


def numbers() -> tuple[int, int, int]:
    """Primary keys of the first book, its author, and the author without books."""
    book = Book.objects.order_by("pk").first()
    assert book is not None
    return book.pk, book.author_id, Author.objects.get(name="Ivo Sato").pk


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
    assert f"{__name__}.Thread blocked the event loop" in caplog.text


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
        ROOT_URLCONF=__name__,
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


# Async methods


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
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE[:1]),
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
