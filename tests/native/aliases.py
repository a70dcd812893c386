"""Marks of tests that use several databases at a time."""

from __future__ import annotations

import pytest

# In one transaction on each; a test that is about connections has them from the pools.
two_databases = pytest.mark.django_db(databases=["default", "sqlite"])
