"""Collects the folder only where its packages are installed; there a missing one is an error."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from django_asyncsession import DatabaseInterface, databases

if not os.environ.get("TEST_ECOSYSTEM"):
    collect_ignore_glob = ["*.py"]


@pytest.fixture
async def fresh_database(alias: str, empty_database: None) -> AsyncIterator[DatabaseInterface]:
    """Each database in turn, with real commits; its connections are opened in the test, where tools
    can see it, and none of them outlives it."""
    await databases[alias].close()
    yield databases[alias]
    await databases[alias].close()
