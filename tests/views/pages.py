"""The views that the tests visit: class-based, of each kind, with templates and URLs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Any

from django import forms
from django.contrib.auth.decorators import login_required
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.mixins import (
    LoginRequiredMixin,
    PermissionRequiredMixin,
    UserPassesTestMixin,
)
from django.contrib.auth.models import User as Account
from django.contrib.auth.views import LoginView
from django.contrib.messages.views import SuccessMessageMixin
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path, reverse_lazy
from django.utils.decorators import method_decorator
from django.views.decorators.cache import cache_page, never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.generic.dates import YearArchiveView

from django_asyncsession import Session, databases, inject_session
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
from tests.models import Author, Book, Upload, User
from tests.sessions import slow

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
