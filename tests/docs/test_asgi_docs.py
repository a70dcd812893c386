"""The page on the ASGI application: its code runs, and it names every reason for Django's way."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator

from django_asyncsession import asgi

PAGE = (Path(__file__).parents[2] / "docs" / "asgi.rst").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the code of the page defines."""
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(dedent(block), names)
    return names


async def test_its_application_answers_requests_and_the_events_of_the_server(
    names: dict[str, Any],
) -> None:
    server = ApplicationCommunicator(names["application"], {"type": "lifespan"})
    await server.send_input({"type": "lifespan.startup"})
    assert await server.receive_output(5) == {"type": "lifespan.startup.complete"}
    scope = {"type": "http", "method": "GET", "path": "/nowhere/", "headers": []}
    request = ApplicationCommunicator(names["application"], scope)
    await request.send_input({"type": "http.request"})
    assert (await request.receive_output(5))["status"] == 404
    await request.receive_output(5)
    await request.wait(5)
    await server.send_input({"type": "lifespan.shutdown"})
    assert await server.receive_output(5) == {"type": "lifespan.shutdown.complete"}
    await server.wait(5)


def test_its_logging_is_of_the_logger_that_there_is(names: dict[str, Any]) -> None:
    assert list(names["LOGGING"]["loggers"]) == [asgi.logger.name]


def test_every_reason_is_explained() -> None:
    assert not [reason for reason in asgi.Reason if f"\n``{reason}``" not in PAGE]
    assert not [fn.__name__ for fn in asgi.HARMLESS if f"``{fn.__name__}``" not in PAGE]
