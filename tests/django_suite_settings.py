"""Django settings for Django's own tests of async code, on the database that SUITE_VENDOR names."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from django_asyncsession.backends.engines import install_drivers
from tests import servers

SECRET_KEY = "only for tests"
USE_TZ = False
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
TEST_RUNNER = "django_suite.Runner"

_vendor = os.environ["SUITE_VENDOR"]
# Each thread and each session must see the same database, so it is none in memory.
_folder = tempfile.mkdtemp(prefix="asyncsession-suite-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


def _database(alias: str) -> dict[str, Any]:
    if _vendor == "sqlite3":
        file = str(Path(_folder, alias))
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": file, "TEST": {"NAME": file}}
    server = servers.postgresql() if _vendor == "postgresql" else servers.mysql()
    if _vendor == "mysql":
        install_drivers(["django.db.backends.mysql"])
    assert server is not None, "no MySQL server: set TEST_MYSQL_URL, or run one on 127.0.0.1:3306"
    name = f"{servers.DATABASE_NAME}_suite_{alias}"
    return {**server, "NAME": name, "TEST": {"NAME": name}}


DATABASES = {alias: _database(alias) for alias in ("default", "other")}
