"""Test cases and context managers for tests of code that uses sessions.

In an `AsyncSessionTestCase`, and with pytest in every test that uses pytest-django's `db`, sync
code and sessions share one connection for each database: they see the same uncommitted data, and
it is rolled back together.
"""

from __future__ import annotations

from .cases import AsyncSessionTestCase, AsyncSessionTransactionTestCase
from .leaks import assert_no_leaks
from .queries import async_assert_num_queries, capture_on_commit_callbacks, capture_queries

__all__ = [
    "AsyncSessionTestCase",
    "AsyncSessionTransactionTestCase",
    "assert_no_leaks",
    "async_assert_num_queries",
    "capture_on_commit_callbacks",
    "capture_queries",
]
