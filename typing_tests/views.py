"""What the types of the native views promise to a caller."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from django.contrib.auth.mixins import LoginRequiredMixin
from django.db.models import QuerySet
from django.forms import Form, ModelForm
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import path

from django_asyncsession import Session
from django_asyncsession.views import (
    CreateView,
    DeleteView,
    DetailView,
    FormView,
    ListView,
    TemplateView,
    UpdateView,
    View,
)
from testproject.shop.forms import BookForm, OrderForm
from testproject.shop.models import Book


class Books(LoginRequiredMixin, ListView[Book]):
    """Hooks of lists keep their types."""

    model = Book

    def get_queryset(self) -> QuerySet[Book]:
        """As in Django."""
        assert_type(super().get_queryset(), QuerySet[Book])
        return super().get_queryset().filter(title="x")


class OneBook(DetailView[Book]):
    """The row is known."""

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """As in Django."""
        assert_type(self.object, Book)
        assert_type(self.get_object(), Book)
        return super().get_context_data(**kwargs)


class NewBook(CreateView[Book, BookForm]):
    """Row and form are known."""

    form_class = BookForm

    def form_valid(self, form: BookForm) -> HttpResponse:
        """As in Django."""
        assert_type(form.instance, Book)
        return super().form_valid(form)


class ChangedBook(UpdateView[Book]):
    """The form need not be named."""

    def form_valid(self, form: ModelForm[Book]) -> HttpResponse:
        """As in Django."""
        assert_type(self.object, Book)
        return super().form_valid(form)


class DeletedBook(DeleteView[Book]):
    """Nor that of deleting."""

    def form_valid(self, form: Form) -> HttpResponse:
        """As in Django."""
        return super().form_valid(form)


class OrderPage(FormView[OrderForm]):
    """The form is known."""

    def get_success_url(self) -> str:
        """As in Django."""
        assert_type(self.get_form(), OrderForm)
        return super().get_success_url()


class Handlers(View):
    """Handlers may be async."""

    async def get(self, request: HttpRequest) -> HttpResponse:
        """As in Django."""
        return HttpResponse("x")


class AsyncHook(DetailView[Book]):
    """Django's types say that hooks are not async, so an async one is marked."""

    async def get_object(self, queryset: Any = None) -> Book:  # type: ignore[override]
        """As in the documentation."""
        return super().get_object(queryset)


def urls() -> None:
    """What `as_view` makes is an async view, which goes into a URL."""
    view = Books.as_view(paginate_by=3)
    assert_type(view, Callable[..., Coroutine[Any, Any, HttpResponseBase]])
    path("books/", view)
    path("page/", TemplateView.as_view(template_name="x"))


async def rendering(session: Session, request: HttpRequest) -> None:
    """As Django's `render()`."""
    assert_type(
        await session.render(request, "x.html", {"books": Book.objects.all()}), HttpResponse
    )
    await session.render(request, ["x.html", "y.html"], status=404)
    await session.render(request, 5)  # type: ignore[arg-type]
