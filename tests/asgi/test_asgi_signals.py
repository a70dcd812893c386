"""Receivers of a project hear our ASGI handler as they hear Django's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.urls import get_urlconf, set_urlconf

from django_asyncsession.asgi import ThreadlessHandler
from tests.asgi.exchanges import REQUESTS, answer, answer_here
from tests.asgi.signals import Receivers
from tests.asgi.site import Seen

# Signals


@pytest.mark.parametrize("are_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("sender", [None, ASGIHandler], ids=["everybody", "Django's handler"])
@pytest.mark.parametrize("name", ["plain", "broken", "not decodable", "async body", "closers"])
async def test_receivers_of_a_project_hear_the_same_in_the_same_order(
    name: str, sender: Any, are_async: bool
) -> None:
    _, url, more = REQUESTS[name]
    with Receivers(sender, are_async):
        messages = await answer(ASGIHandler(), url, **more)
        events, Seen.events = Seen.events, []
        assert await answer(ThreadlessHandler(), url, **more) == messages
    assert Seen.events == events
    assert events[0] == ("started", ASGIHandler, url.partition("?")[0])
    # Django's handler is not the sender of the end of a request that could not be made.
    finished = [event for event in events if event[0] == "finished"]
    wanted = {("not decodable", None): [("finished", None)], ("not decodable", ASGIHandler): []}
    assert finished == wanted.get((name, sender), [("finished", ASGIHandler)])


async def test_receivers_are_named_and_bring_no_thread_when_they_have_gone(
    threads: list[str], reasons: Callable[[], list[str]]
) -> None:
    application = ThreadlessHandler()
    receivers = Receivers()
    for _ in range(2):
        with receivers:
            await answer(application, "/plain/")
        assert len(threads) == len(Seen.events) == 2
        name = "(receiver): tests.asgi.signals.Receivers.started"
        assert reasons()[0] == f"GET /plain/ takes Django's way {name}"
        await answer(application, "/plain/")
        assert (len(threads), reasons()) == (2, [])
        threads.clear()
        Seen.events.clear()


async def test_receivers_for_other_senders_bring_no_thread(threads: list[str]) -> None:
    with Receivers(WSGIHandler):
        await answer(ThreadlessHandler(), "/plain/")
    assert (Seen.events, threads) == ([], [])


async def test_a_receiver_in_the_place_of_another_is_called() -> None:
    """The list of receivers is as long as before."""
    application = ThreadlessHandler()
    receivers = Receivers()
    await answer(application, "/plain/")
    request_started.disconnect(close_old_connections)
    request_started.connect(receivers.started)
    try:
        await answer(application, "/plain/")
    finally:
        request_started.disconnect(receivers.started)
        request_started.connect(close_old_connections)
    assert Seen.events == [("started", ASGIHandler, "/plain/")]


async def test_receivers_that_are_collected_or_set_aside_bring_no_thread(
    threads: list[str],
) -> None:
    application = ThreadlessHandler()
    receivers: Receivers | None = Receivers()
    assert receivers is not None
    receivers.__enter__()
    await answer(application, "/plain/")
    aside = request_started.receivers, request_finished.receivers
    request_started.receivers, request_finished.receivers = [], []
    threads.clear()
    await answer(application, "/plain/")
    assert threads == []
    request_started.receivers, request_finished.receivers = aside
    await answer(application, "/plain/")
    assert len(threads) == 2
    receivers = None
    gc.collect()
    threads.clear()
    await answer(application, "/plain/")
    assert threads == []


async def test_what_a_receiver_raises_reaches_the_server() -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("receiver")

    for signal in (request_started, request_finished):
        signal.connect(fail)
        try:
            with pytest.raises(ZeroDivisionError):
                await answer(ThreadlessHandler(), "/plain/")
        finally:
            signal.disconnect(fail)


async def test_the_urlconf_is_forgotten_at_the_end() -> None:
    await answer_here(ThreadlessHandler())
    try:
        assert get_urlconf() is None
    finally:
        set_urlconf(None)
