"""Settings of the site; TENANTS_OPTIONS is what ASYNC_SESSION has besides, as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from testproject.settings import *  # noqa: F403
from testproject.settings import DATABASES

DEBUG = False
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.ecosystem.tenants.urls"
DATABASES["default"]["ENGINE"] = "django_tenants.postgresql_backend"
DATABASE_ROUTERS = ["django_tenants.routers.TenantSyncRouter"]
SHARED_APPS = [
    "django.contrib.contenttypes",
    "django_asyncsession",
    "django_tenants",
    "tests.ecosystem.tenants",
]
TENANT_APPS = ["testproject.shop"]
INSTALLED_APPS = [*SHARED_APPS, *TENANT_APPS]
TENANT_MODEL = "tenants.Tenant"
TENANT_DOMAIN_MODEL = "tenants.Domain"
TENANT_LIMIT_SET_CALLS = bool(os.environ.get("TENANT_LIMIT_SET_CALLS"))
MIDDLEWARE = [
    "django_asyncsession.middleware.AsyncSessionMiddleware",
    "django_tenants.middleware.main.TenantMainMiddleware",
]
ASYNC_SESSION: dict[str, Any] = {
    "POOLS": {"default": {"max_size": 4}},
    **json.loads(os.environ.get("TENANTS_OPTIONS", "{}")),
}
