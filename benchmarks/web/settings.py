"""Django's settings of the served contestants; BENCHMARKS_SERVED says which."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.settings import *  # noqa: F403
from benchmarks.settings import ASYNC_SESSION as _POOLS
from benchmarks.settings import DATABASES as _DATABASES

_USUAL = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
_SERVED = os.environ["BENCHMARKS_SERVED"]
_IS_OURS = not _SERVED.startswith("django")

ROOT_URLCONF = "benchmarks.web.django_views"
MIDDLEWARE = _USUAL if _SERVED.endswith("_usual") else []
# One transaction for each request, with a pool of ten; Django's own ORM has Django's pool of ten.
DATABASES = {"default": _DATABASES["default" if _IS_OURS else "threads"]}
ASYNC_SESSION: dict[str, Any] = {"POOLS": {"default": _POOLS["POOLS"]["default"]}}
if _IS_OURS:
    MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware", *MIDDLEWARE]
    ASYNC_SESSION["NATIVE_ORM"] = _SERVED != "session"
    ASYNC_SESSION["NATIVE_MIDDLEWARE"] = _SERVED.endswith("_usual")
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django_asyncsession",
    "benchmarks",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
