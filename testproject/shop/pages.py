"""The pages for people: the catalogue, the order form and the saved order."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import BadRequest
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_GET, require_http_methods

from django_asyncsession import Session, inject_session
from testproject.shop import services
from testproject.shop.errors import Conflict
from testproject.shop.forms import OrderForm
from testproject.shop.models import Book, Order


@require_GET
async def catalogue(request: HttpRequest) -> HttpResponse:
    """The books, searched and in pages."""
    session: Session = request.db_session  # type: ignore[attr-defined]

    def page() -> HttpResponse:
        try:
            books = services.books_page(request.GET)
        except BadRequest as exc:
            raise Http404(str(exc)) from exc
        context = {
            "books": books,
            "numbers": books.paginator.get_elided_page_range(books.number, on_ends=1),
            "search": request.GET.get("search", ""),
        }
        return render(request, "shop/catalogue.html", context)

    # Everything under here is ordinary Django: the template runs its queries while it is rendered,
    # and each of them awaits the event loop.
    return await session.run_sync(page)


@require_http_methods(["GET", "POST"])
@csrf_protect
@inject_session
async def order_form(request: HttpRequest, session: Session) -> HttpResponse:
    """The order form; a valid order is saved and then shown on its own page."""
    form = OrderForm(request.POST or None, initial={"isbn": request.GET.get("isbn", "")})
    if request.method == "POST" and await session.run_sync(form.is_valid):
        placed = await place(session, form)
        if placed:
            return redirect("order", pk=placed.pk)
    return await session.run_sync(render_form, request, form)


async def place(session: Session, form: OrderForm) -> Order | None:
    """Save the order of a valid form; None, with the reason in the form, when stock is short."""
    data = form.cleaned_data
    assert form.book is not None
    try:
        async with session.atomic():
            customer = await session.run_sync(services.customer_of, data)
            lines = [(form.book.pk, data["quantity"])]
            return await session.run_sync(services.sell, customer, lines, data["note"])
    except Conflict as exc:
        form.add_error("quantity", f"{str(exc)[0].upper()}{str(exc)[1:]}.")
        return None


def render_form(request: HttpRequest, form: OrderForm) -> HttpResponse:
    """The form, with the book it is about when the ISBN names one."""
    isbn = str(form["isbn"].value() or "").replace("-", "").replace(" ", "")
    book = services.search_books("").filter(isbn=isbn).first()
    context: dict[str, Any] = {"form": form, "book": book}
    if isinstance(book, Book):
        context["in_shop"] = services.in_shop(book)
    return render(request, "shop/order_form.html", context, status=400 if form.errors else 200)


@require_GET
@inject_session
async def order(request: HttpRequest, session: Session, pk: int) -> HttpResponse:
    """A saved order."""
    orders = session.select(Order).related("customer").prefetch("lines__book__author")
    found = await orders.where(pk=pk).one_or_none()
    if found is None:
        raise Http404(f"there is no order {pk}")
    total = sum(line.total for line in found.lines.all())
    return render(request, "shop/order.html", {"order": found, "total": total})
