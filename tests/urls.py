"""No URLs of its own: a test that needs one makes it with `override_settings(ROOT_URLCONF=...)`."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

urlpatterns = [path("admin/", admin.site.urls)]
