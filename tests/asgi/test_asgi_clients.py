"""Clients that go away, and servers that stop, in our ASGI handler as in Django's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished

from django_asyncsession import asgi
from django_asyncsession.asgi import ThreadlessHandler
from tests.asgi.exchanges import Exchange, text
from tests.asgi.signals import Receivers
from tests.asgi.site import Seen
from tests.sessions import soon

# Clients that go away, and servers that stop


@pytest.fixture(params=[None, False, True], ids=["no receivers", "sync ones", "async ones"])
def listened(request: pytest.FixtureRequest) -> Iterator[bool]:
    """With receivers of the project's, and so Django's way at both ends, and without."""
    receivers = nullcontext() if request.param is None else Receivers(are_async=request.param)
    with receivers:
        yield request.param is not None


def told(listened: bool, *more: str) -> list[Any]:
    """What was noted, when each signal was sent once, and this in between."""
    if not listened:
        return list(more)
    return [("started", ASGIHandler, "/wait/"), *more, ("finished", ASGIHandler)]


@pytest.mark.parametrize("body", [(), (b"begin",)], ids=["before the body", "in the body"])
async def test_a_client_that_goes_while_it_sends_gets_nothing(
    body: tuple[bytes, ...], handler: Any, listened: bool
) -> None:
    exchange = Exchange(handler(), "/plain/", ())
    for part in body:
        exchange.say("http.request", body=part, more_body=True)
    exchange.leave()
    assert await exchange.end() == []
    assert Seen.events == []


async def test_a_client_that_goes_cancels_the_view(handler: Any, listened: bool) -> None:
    exchange = Exchange(handler(), "/wait/")
    await Seen.started.wait()
    exchange.leave()
    assert await exchange.end() == []
    assert Seen.events == told(listened, "cancelled")
    assert not exchange.task.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_view_may_answer_although_it_was_cancelled(handler: Any, listened: bool) -> None:
    exchange = Exchange(handler(), "/wait/?stay=1")
    await Seen.started.wait()
    exchange.leave()
    assert text(await exchange.end()) == b"waited"
    assert Seen.events == told(listened, "cancelled")
    assert exchange.task.cancelling() == 0


async def test_a_client_that_goes_ends_the_body_that_is_sent(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 3600)
    exchange = Exchange(handler(), "/parts/?wait=1")
    await Seen.started.wait()
    exchange.leave()
    assert text(await exchange.end()) == b"one"
    assert await soon(lambda: Seen.events == ["body ended"])


async def test_a_client_that_goes_while_the_answer_is_written_is_no_error(
    handler: Any, listened: bool
) -> None:
    class Stuck(Exchange):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.sent) == 2:
                Seen.started.set()
                await asyncio.Event().wait()

    exchange = Stuck(handler(), "/large/")
    await Seen.started.wait()
    exchange.leave()
    assert len(await exchange.end()) == 2
    assert Seen.events[1:] == ([("finished", ASGIHandler)] if listened else [])


async def test_a_message_that_cannot_be_is_djangos_error(handler: Any) -> None:
    exchange = Exchange(handler(), "/wait/")
    await Seen.started.wait()
    exchange.say("http.request", body=b"again")
    with pytest.raises(AssertionError, match=r"Invalid ASGI message after request body: http\."):
        await exchange.end()
    Seen.release.set()


async def test_an_error_of_the_servers_receive_reaches_it() -> None:
    class Broken(Exchange):
        async def receive(self) -> Any:
            if self.received:
                raise ZeroDivisionError("receive")
            return await super().receive()

    exchange = Broken(ThreadlessHandler(), "/wait/")
    with pytest.raises(ZeroDivisionError):
        await exchange.end()
    assert Seen.events == ["cancelled"]


async def test_only_requests_that_last_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0.01)
    application = ThreadlessHandler()
    quick, slow = Exchange(application, "/plain/"), Exchange(application, "/wait/")
    await quick.end()
    assert await soon(lambda: slow.received == 2)
    Seen.release.set()
    assert text(await slow.end()) == b"waited"
    assert (quick.received, slow.received) == (1, 2)
    assert slow.left == 0, "it still receives when the request has ended"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_cancels_a_request_ends_it_at_once(listened: bool) -> None:
    exchange = Exchange(ThreadlessHandler(), "/wait/")
    await Seen.started.wait()
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.end()
    assert Seen.events == told(listened, "cancelled")
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_cancels_when_the_client_goes_is_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0)
    exchange = Exchange(ThreadlessHandler(), "/wait/")
    assert await soon(lambda: exchange.received == 2)
    exchange.leave()
    exchange.task.get_loop().call_soon(exchange.task.cancel)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.end()
    assert Seen.events == ["cancelled"]


async def test_an_error_while_the_answer_is_sent_reaches_the_server_and_closes_the_response() -> (
    None
):
    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            raise OSError("the client is gone")

    for receivers in (nullcontext(), Receivers()):
        with receivers, pytest.raises(OSError, match="the client is gone"):  # type: ignore[attr-defined]
            await Gone(ThreadlessHandler(), "/closers/").end()
    once = ["first closer", "second closer"]
    started, finished = ("started", ASGIHandler, "/closers/"), ("finished", ASGIHandler)
    assert Seen.events == [*once, started, *once, finished]


async def test_an_error_of_a_send_that_is_cancelled_reaches_the_server() -> None:
    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            Seen.started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as exc:
                raise OSError("the client is gone") from exc

    exchange = Gone(ThreadlessHandler(), "/plain/")
    await Seen.started.wait()
    exchange.leave()
    with pytest.raises(OSError, match="the client is gone"):
        await exchange.end()
    assert exchange.task.cancelling() == 0


async def test_a_listener_that_ends_late_cancels_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(ThreadlessHandler):
        async def listen_for_disconnect(self, receive: Any) -> None:
            try:
                await super().listen_for_disconnect(receive)
            finally:
                raise RequestAborted

    monkeypatch.setattr(asgi, "LISTEN_AFTER", 0)
    exchange = Exchange(Late(), "/wait/")
    assert await soon(lambda: exchange.received == 2)
    Seen.release.set()
    assert text(await exchange.end()) == b"waited"
    assert exchange.task.cancelling() == 0


async def test_an_error_at_the_end_does_not_hide_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ZeroDivisionError("receiver")

    class Gone(Exchange):
        async def send(self, message: Any) -> None:
            raise OSError("the client is gone")

    request_finished.connect(fail)
    try:
        with pytest.raises(OSError, match="the client is gone"):
            await Gone(ThreadlessHandler(), "/plain/").end()
    finally:
        request_finished.disconnect(fail)
    assert "error ignored while a request was ended" in caplog.text
    assert "ZeroDivisionError: receiver" in caplog.text
