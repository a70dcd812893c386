"""Addresses of the shop: two pages for people, an API and an export for programs."""

from __future__ import annotations

from django.urls import path

from testproject.shop import api, pages

urlpatterns = [
    path("", pages.catalogue, name="catalogue"),
    path("order/", pages.OrderPage.as_view(), name="order-form"),
    path("orders/<int:pk>/", pages.SavedOrder.as_view(), name="order"),
    path("api/books/", api.Books.as_view(), name="api-books"),
    path("api/books/<int:pk>/", api.book, name="api-book"),
    path("api/stock/transfer/", api.transfer, name="api-transfer"),
    path("api/orders/", api.place_order, name="api-orders"),
    path("api/orders/broken/", api.broken_order, name="api-broken-order"),
    path("api/summary/", api.summary, name="api-summary"),
    path("export/order-lines.csv", api.export, name="export"),
]
