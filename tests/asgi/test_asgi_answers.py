"""Our ASGI handler: what Django's answers, it answers the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import RequestDataTooBig
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.test import override_settings

from django_asyncsession.asgi import ThreadlessHandler
from tests.asgi import site
from tests.asgi.exchanges import REQUESTS, answer, text
from tests.asgi.site import Seen

# The same answer


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_same_request_has_the_same_answer(name: str, threads: list[str]) -> None:
    needs_thread, url, more = REQUESTS[name]
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=None):
        messages = await answer(ASGIHandler(), url, **more)
        events, Seen.events = Seen.events, []
        assert threads
        threads.clear()
        assert await answer(ThreadlessHandler(), url, **more) == messages
    assert messages[0]["type"] == "http.response.start" and not messages[-1].get("more_body")
    assert Seen.events == events
    assert bool(threads) is needs_thread


@pytest.mark.parametrize("url", ["/generator/", "/file/"])
async def test_sync_bodies_are_read_in_a_thread_with_the_same_warning(
    url: str, handler: Any
) -> None:
    with pytest.warns(Warning, match="must consume synchronous iterators"):
        messages = await answer(handler(), url)
    wanted = b"012" if url == "/generator/" else Path(site.__file__).read_bytes()
    assert text(messages) == wanted and messages[0]["status"] == 200
    if url == "/file/":
        assert len(messages) == 3 + len(wanted) // handler.chunk_size


async def test_a_request_that_is_refused_for_its_size_is_a_413(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooBig(ASGIRequest):
        def __init__(self, *args: Any) -> None:
            raise RequestDataTooBig

    monkeypatch.setattr(handler, "request_class", TooBig)
    messages = await answer(handler(), "/plain/")
    assert messages[0]["status"] == 413 and text(messages) == b"413 Payload too large"


@pytest.mark.parametrize("kind", ["websocket", "other"])
async def test_another_kind_of_connection_is_refused_with_djangos_words(
    kind: str, handler: Any
) -> None:
    with pytest.raises(ValueError, match=f"Django can only handle ASGI/HTTP.* not {kind}"):
        await answer(handler(), "/plain/", type=kind)
