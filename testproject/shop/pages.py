"""The pages for people: the catalogue, the order form and the saved order.

Everything in them is ordinary Django: forms and templates run their queries as ever, and each of
these awaits the event loop.
"""

from __future__ import annotations

from typing import Any

from django.core.exceptions import BadRequest
from django.db import router, transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.utils.decorators import method_decorator
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_GET

from django_asyncsession import Session, inject_session
from django_asyncsession.views import DetailView, FormView
from testproject.shop import services
from testproject.shop.errors import Conflict
from testproject.shop.forms import OrderForm
from testproject.shop.models import Book, Order


@require_GET
@inject_session
async def catalogue(request: HttpRequest, session: Session) -> HttpResponse:
    """The books, searched and in pages."""
    try:
        books = await session.run_sync(services.books_page, request.GET)
    except BadRequest as exc:
        raise Http404(str(exc)) from exc
    context = {
        "books": books,
        "numbers": books.paginator.get_elided_page_range(books.number, on_ends=1),
        "search": request.GET.get("search", ""),
    }
    return await session.render(request, "shop/catalogue.html", context)


@method_decorator(csrf_protect, name="dispatch")
class OrderPage(FormView[OrderForm]):
    """The order form; a valid order is saved and then shown on its own page."""

    form_class = OrderForm
    template_name = "shop/order_form.html"

    def get_initial(self) -> dict[str, Any]:
        """The ISBN of the book that the visitor came from."""
        return {"isbn": self.request.GET.get("isbn", "")}

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """The form, with the book it is about when the ISBN names one."""
        context = super().get_context_data(**kwargs)
        isbn = str(context["form"]["isbn"].value() or "").replace("-", "").replace(" ", "")
        context["book"] = book = services.search_books("").filter(isbn=isbn).first()
        if isinstance(book, Book):
            context["in_shop"] = services.in_shop(book)
        return context

    def form_valid(self, form: OrderForm) -> HttpResponse:
        """Save the order; when stock is short, say so in the form."""
        data = form.cleaned_data
        assert form.book is not None
        try:
            with transaction.atomic(using=router.db_for_write(Order)):
                customer = services.customer_of(data)
                lines = [(form.book.pk, data["quantity"])]
                order = services.sell(customer, lines, data["note"])
        except Conflict as exc:
            form.add_error("quantity", f"{str(exc)[0].upper()}{str(exc)[1:]}.")
            return self.form_invalid(form)
        return redirect("order", pk=order.pk)

    def form_invalid(self, form: OrderForm) -> HttpResponse:
        """The form with its errors, and the status that programs understand."""
        response = super().form_invalid(form)
        response.status_code = 400
        return response


class SavedOrder(DetailView[Order]):
    """A saved order."""

    queryset = Order.objects.select_related("customer").prefetch_related("lines__book__author")
    template_name = "shop/order.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """The order with its total."""
        total = sum(line.total for line in self.object.lines.all())
        return super().get_context_data(total=total, **kwargs)
