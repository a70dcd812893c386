"""The settings of the test suite, with the packages that these tests are about installed."""

from __future__ import annotations

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = [
    *INSTALLED_APPS,
    "django_read_only",
    "polymorphic",
    "safedelete",
    "treebeard",
    "djmoney",
    "mptt",
    "tests.ecosystem",
]
