"""Django settings for Django's own tests of async code."""

from __future__ import annotations

from tests import servers

SECRET_KEY = "only for tests"
USE_TZ = False
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
TEST_RUNNER = "django_suite.Runner"

_name = f"{servers.DATABASE_NAME}_suite"
DATABASES = {
    alias: {
        **servers.postgresql(),
        "NAME": f"{_name}_{alias}",
        "TEST": {"NAME": f"{_name}_{alias}"},
    }
    for alias in ("default", "other")
}
