"""Django's settings of the benchmarks: one database of their own on each server of the tests."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from typing import Any

from tests import servers

POOL = 10
# Seconds to wait for a connection, in every pool that asks.
TIMEOUT = 60

SECRET_KEY = "only for benchmarks"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DEBUG = False
ALLOWED_HOSTS = ["*"]

NAME = f"{servers.DATABASE_NAME}_benchmarks"
# Child processes read the file that the first process made.
SQLITE = os.environ.get("BENCHMARKS_SQLITE") or os.path.join(
    tempfile.mkdtemp(prefix="asyncsession-benchmarks-"), "benchmarks.sqlite3"
)
os.environ["BENCHMARKS_SQLITE"] = SQLITE

_postgresql: dict[str, Any] = {**servers.postgresql(), "NAME": NAME}
DATABASES: dict[str, dict[str, Any]] = {
    # This package.
    "default": _postgresql,
    # Django's own async ORM, with the pool that Django has for PostgreSQL.
    "threads": {
        **_postgresql,
        "OPTIONS": {"pool": {"min_size": POOL, "max_size": POOL, "timeout": TIMEOUT}},
    },
    "sqlite": {"ENGINE": "django.db.backends.sqlite3", "NAME": SQLITE},
}
if _mysql := servers.mysql():
    DATABASES["mysql"] = {**_mysql, "NAME": NAME}

INSTALLED_APPS = ["django_asyncsession", "benchmarks"]
if importlib.util.find_spec("django_async_backend"):
    INSTALLED_APPS.append("django_async_backend")
    DATABASES["backend"] = {
        **_postgresql,
        "ENGINE": "django_async_backend.db.backends.postgresql",
        "OPTIONS": {"pool": {"min_size": POOL, "max_size": POOL, "timeout": TIMEOUT}},
    }

ASYNC_SESSION = {
    "POOLS": {
        alias: {"min_size": POOL, "max_size": POOL, "timeout": TIMEOUT}
        for alias in ("default", "mysql", "sqlite")
    },
}
