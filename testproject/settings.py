"""Django settings of the shop; DATABASE_URL chooses the database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dj_database_url

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "only for the demo")
DEBUG = os.environ.get("DEBUG", "1") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

ASGI_APPLICATION = "testproject.asgi.application"
ROOT_URLCONF = "testproject.urls"
INSTALLED_APPS = ["django_asyncsession", "testproject.shop"]

# The order counts. ApiErrors is outside, so that the session has seen an exception, and rolled
# back, before the exception becomes a JSON answer. CSRF is checked by a decorator on the one view
# with a form: Django's middleware for it would send every request through a thread.
MIDDLEWARE = [
    "testproject.shop.errors.ApiErrors",
    "django_asyncsession.middleware.AsyncSessionMiddleware",
]

DATABASES = {
    "default": dj_database_url.config(default="postgresql://postgres@127.0.0.1:5432/shop"),
}
POOL_MAX_SIZE = int(os.environ.get("POOL_MAX_SIZE", "10"))
ASYNC_SESSION: dict[str, Any] = {
    "POOLS": {"default": {"min_size": 1, "max_size": POOL_MAX_SIZE}},
}

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        # The server's own log has a line for each request; a traceback is all that is worth more.
        "django": {"handlers": [], "level": "WARNING"},
        "django.request": {"level": "ERROR"},
    },
}
