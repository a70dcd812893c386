"""Django settings of the test suite: one alias for each database server there is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests import servers

SECRET_KEY = "only for tests"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "tests.urls"

_sqlite = Path(tempfile.mkdtemp(prefix="asyncsession-sqlite-")) / "tests.sqlite3"
DATABASES = {
    # The alias "default" is PostgreSQL.
    "default": servers.postgresql(),
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(_sqlite),
        "TEST": {"NAME": str(_sqlite)},
    },
}
if _mysql := servers.mysql():
    DATABASES["mysql"] = _mysql
for _entry in DATABASES.values():
    _entry["TEST"]["DEPENDENCIES"] = []  # type: ignore[index]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.postgres",
    "django.contrib.sessions",
    "django_asyncsession",
    "rest_framework",
    "testproject.shop",
    "tests",
]
MIDDLEWARE = [
    "django_asyncsession.middleware.AsyncSessionMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
