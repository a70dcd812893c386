"""The site, the handlers, and what is told of threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.test import override_settings

from django_asyncsession import asgi
from django_asyncsession.asgi import ThreadlessHandler
from tests.asgi import site
from tests.asgi.site import Seen
from tests.threads import sent_to_threads


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    Seen.events, Seen.started, Seen.release = [], asyncio.Event(), asyncio.Event()
    with override_settings(ROOT_URLCONF=site.__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"]):
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return sent_to_threads(monkeypatch)


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Why requests took Django's way since the last call, in the words of the log."""
    caplog.set_level(logging.DEBUG, asgi.logger.name)

    def told() -> list[str]:
        found = [record.message for record in caplog.records if record.name == asgi.logger.name]
        caplog.clear()
        return found

    return told


HANDLERS: list[type[ASGIHandler]] = [ASGIHandler, ThreadlessHandler]


@pytest.fixture(params=HANDLERS, ids=["django", "ours"])
def handler(request: pytest.FixtureRequest) -> Any:
    """Django's handler, and ours: what both do."""
    return request.param
