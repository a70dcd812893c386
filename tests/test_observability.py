"""What is logged of slow statements and of sessions that keep their connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from django.test import override_settings

from django_asyncsession import databases
from django_asyncsession.interface import DatabaseInterface


@pytest.fixture
async def db(alias: str) -> AsyncIterator[DatabaseInterface]:
    yield databases[alias]
    await databases.close_all()


async def test_a_slow_statement_is_logged_without_its_parameters(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with override_settings(ASYNC_SESSION={"SLOW_QUERY_SECONDS": 1e-9}):
        async with db.get_session() as session:
            await session.fetch("SELECT %s AS who", ["secret"])
    assert f"slow statement on {db.alias!r}" in caplog.text
    assert "AS who" in caplog.text
    assert "secret" not in caplog.text


async def test_a_fast_statement_is_not_logged(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with override_settings(ASYNC_SESSION={"SLOW_QUERY_SECONDS": 60}):
        async with db.get_session() as session:
            await session.fetch("SELECT 1")
    assert "slow" not in caplog.text


async def test_a_session_that_keeps_its_connection_is_logged_once(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    logged = asyncio.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    listener = Listener(logging.WARNING)
    logging.getLogger("django_asyncsession.pool").addHandler(listener)
    try:
        with override_settings(ASYNC_SESSION={"LEAK_WARNING_SECONDS": 0.01}):
            async with db.get_session() as session, asyncio.timeout(5):
                await session.fetch("SELECT 1")
                await logged.wait()
    finally:
        logging.getLogger("django_asyncsession.pool").removeHandler(listener)
    lines = [line for line in caplog.text.splitlines() if "is held for" in line]
    assert len(lines) == 1
    assert "test_observability.py" in lines[0]
