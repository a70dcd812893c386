"""The life of the server, with real pools."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.test import override_settings

from django_asyncsession import ConfigurationError, DatabaseInterface, databases
from django_asyncsession.asgi import get_asgi_application
from tests.sessions import soon

# The life of the server


class Server:
    """A server that has started, or tried to, the application's life."""

    def __init__(self, application: Any) -> None:
        self.life = ApplicationCommunicator(application, {"type": "lifespan"})

    async def say(self, event: str) -> Any:
        await self.life.send_input({"type": f"lifespan.{event}"})
        return await self.life.receive_output(10)


def pools(alias: str, **options: Any) -> override_settings:
    return override_settings(ASYNC_SESSION={"ALIAS": alias, "POOLS": {alias: options}})


async def test_pools_open_and_close_with_the_server(real_database: DatabaseInterface) -> None:
    with pools(real_database.alias, min_size=2):
        server = Server(get_asgi_application())
        assert await server.say("startup") == {"type": "lifespan.startup.complete"}
        assert real_database.stats()["pool_available"] == 2
        others = [db for db in databases.all() if db is not real_database]
        assert not any(db.connected for db in others), "nobody wants to keep connections to it"
        assert await server.say("shutdown") == {"type": "lifespan.shutdown.complete"}
        assert not real_database.connected
        await server.life.wait(5)


async def test_open_sessions_get_time_when_the_server_ends(
    real_database: DatabaseInterface,
) -> None:
    server = Server(get_asgi_application(grace=30))
    await server.say("startup")
    session = real_database.get_session()
    await session.begin()
    await session.execute("SELECT 1")
    shutdown = asyncio.ensure_future(server.say("shutdown"))
    assert await soon(lambda: real_database.pools == [])
    assert await session.fetch_value("SELECT 7") == 7 and not shutdown.done()
    await session.close()
    assert await shutdown == {"type": "lifespan.shutdown.complete"}
    assert await server.life.wait(5) is None


async def test_a_pool_that_cannot_open_is_told_with_its_alias(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    alias = real_database.alias
    with pools(alias, min_size=3, max_size=2):
        server = Server(get_asgi_application())
        told = await server.say("startup")
        await server.life.wait(5)
    assert told["type"] == "lifespan.startup.failed"
    assert f"the pool of {alias!r} could not be opened: ConfigurationError: " in told["message"]
    assert "min_size=3, max_size=2" in told["message"] and "Traceback" in caplog.text


async def test_pools_that_are_open_are_closed_when_another_cannot_open(
    real_database: DatabaseInterface,
) -> None:
    other = next(alias for alias in databases if alias != real_database.alias)
    both = {real_database.alias: {"min_size": 1}, other: {"min_size": -1}}
    with override_settings(ASYNC_SESSION={"POOLS": both}):
        told = await Server(get_asgi_application()).say("startup")
    assert told["type"] == "lifespan.startup.failed" and repr(other) in told["message"]
    assert not real_database.connected


async def test_what_fails_when_the_server_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(grace: float = 0.0) -> None:
        raise OSError("cannot close")

    server = Server(get_asgi_application())
    await server.say("startup")
    monkeypatch.setattr(databases, "close_all", fail)
    message = "the pools could not be closed: OSError: cannot close"
    assert await server.say("shutdown") == {"type": "lifespan.shutdown.failed", "message": message}


def test_a_grace_that_is_no_time_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="grace is -1"):
        get_asgi_application(grace=-1)
