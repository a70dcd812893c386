"""Django settings for Django's own tests in the bridge, on the engine that BRIDGED_VENDOR names."""

from __future__ import annotations

import os
from typing import Any

from tests import servers

SECRET_KEY = "only for tests"
USE_TZ = False
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

_vendor = os.environ["BRIDGED_VENDOR"]
_engine = {"ENGINE": f"django_asyncsession.backends.{_vendor}"}


def _database(alias: str) -> dict[str, Any]:
    if _vendor == "sqlite3":
        return _engine
    server = servers.postgresql() if _vendor == "postgresql" else servers.mysql()
    name = f"{servers.DATABASE_NAME}_bridged_{alias}"
    return {**(server or {}), **_engine, "NAME": name, "TEST": {"NAME": name}}


DATABASES = {alias: _database(alias) for alias in ("default", "other")}
