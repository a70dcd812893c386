"""sentry-sdk sees every statement of a session, with the server's address, in the request that ran
it; and it costs the session nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sentry_sdk
from django.core.asgi import get_asgi_application
from django.db import DatabaseError, connections
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from sentry_sdk.integrations.django import DjangoIntegration

from django_asyncsession import DatabaseInterface, Session
from tests.ecosystem.pools import opened
from tests.models import User
from tests.sessions import INSERT, names

REQUESTS = 20


class Sent(sentry_sdk.Transport):
    """Keeps what would be sent to Sentry."""

    events: list[dict[str, Any]]

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [item.payload.json for item in envelope.items if item.payload.json]

    def of_type(self, kind: str | None) -> list[dict[str, Any]]:
        """The transactions, or with None the errors."""
        return [event for event in self.events if event.get("type") == kind]


@pytest.fixture
def sent(alias: str) -> Iterator[Sent]:
    """Sentry, with everything switched on that it can see of Django."""
    transport = Sent()
    transport.events = []
    everything = {"middleware_spans": True, "cache_spans": True, "db_transaction_spans": True}
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=transport,
        traces_sample_rate=1.0,
        integrations=[DjangoIntegration(**everything)],
    )
    yield transport
    sentry_sdk.get_global_scope().set_client(None)


def statements(transaction: dict[str, Any]) -> list[str]:
    """The text of each statement that has a span in the transaction."""
    return [span["description"] for span in spans(transaction)]


def spans(transaction: dict[str, Any]) -> list[dict[str, Any]]:
    """The spans of statements: neither of connecting, nor of the end of a transaction."""
    unasked = {"connect", "COMMIT", "ROLLBACK"}
    every = [span for span in transaction["spans"] if span["op"] == "db"]
    return [span for span in every if span["description"] not in unasked]


async def test_each_statement_is_one_span_with_the_address_of_the_server(
    fresh_database: DatabaseInterface, sent: Sent
) -> None:
    async with fresh_database.get_session() as session:
        await session.fetch_value("SELECT 0")
    with sentry_sdk.start_transaction(name="unit of work"):
        async with fresh_database.get_session() as session:
            assert await session.fetch_value("SELECT 1") == 1
            await session.execute(INSERT, ["ann"])
            await session.add(User(name="bob"))
            assert await session.select(User).count() == 2
    (transaction,) = sent.of_type("transaction")
    verbs = [text.split()[0] for text in statements(transaction)]
    assert verbs == ["SELECT", "INSERT", "INSERT", "SELECT"]
    for span in spans(transaction):
        data, wanted = span["data"], connections[fresh_database.alias].settings_dict
        assert data["db.system"] == fresh_database.vendor
        if fresh_database.vendor != "sqlite":
            assert data["server.address"] == wanted["HOST"]
            assert data["server.port"] == str(wanted["PORT"])
    assert await names(fresh_database) == ["ann", "bob"]


async def test_reading_the_address_neither_forbids_gather_nor_is_a_write(
    fresh_database: DatabaseInterface, sent: Sent
) -> None:
    async with fresh_database.get_session() as session:
        await session.fetch_value("SELECT 1")
        both = await session.gather(
            lambda reader: reader.fetch_value("SELECT 1"),
            lambda reader: reader.fetch_value("SELECT 2"),
        )
    assert both == [1, 2]


async def test_an_error_of_the_database_is_reported_and_the_next_session_is_well(
    fresh_database: DatabaseInterface, sent: Sent
) -> None:
    for _ in range(3):
        with pytest.raises(DatabaseError) as raised:
            async with fresh_database.get_session() as session:
                await session.execute(INSERT, ["lost"])
                await session.execute("SELECT * FROM no_such_table")
        sentry_sdk.capture_exception(raised.value)
    errors = sent.of_type(None)
    assert len(errors) == 3
    crumbs = [crumb["message"] for crumb in errors[0]["breadcrumbs"]["values"]]
    assert "SELECT * FROM no_such_table" in crumbs
    assert await names(fresh_database) == []


# Requests at the same time


def reads(error: dict[str, Any]) -> list[str]:
    """The reads that Sentry shows with an error, as what led to it."""
    crumbs = [crumb.get("message") or "" for crumb in error["breadcrumbs"]["values"]]
    return [message for message in crumbs if message.startswith("SELECT ")]


async def raises(request: HttpRequest, number: int) -> HttpResponse:
    """Statements of one request, each of which has the request's number; then an error."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    for step in range(5):
        await session.fetch_value(f"SELECT {number}000 + {step}")
        await asyncio.sleep(0)
    await session.execute(INSERT, ["lost"])
    raise LookupError(f"request {number}")


async def raises_in_native_mode(request: HttpRequest, number: int) -> HttpResponse:
    """The same, in code that knows nothing of sessions."""
    alias: str = request.db_session.alias  # type: ignore[attr-defined]
    for step in range(5):
        await User.objects.using(alias).filter(level=number * 1000 + step).aexists()
        await asyncio.sleep(0)
    await User.objects.using(alias).acreate(name="lost")
    raise LookupError(f"request {number}")


urlpatterns = [
    path("raises/<int:number>/", raises),
    path("native/<int:number>/", raises_in_native_mode),
]


@pytest.mark.parametrize("view", ["raises", "native"])
async def test_the_error_of_a_request_has_the_statements_of_that_request_alone(
    fresh_database: DatabaseInterface, sent: Sent, view: str
) -> None:
    settings = {"ALIAS": fresh_database.alias, "NATIVE_ORM": view == "native"}
    with override_settings(ROOT_URLCONF=__name__, ASYNC_SESSION=settings, ALLOWED_HOSTS=["*"]):
        await opened(fresh_database)
        transport = httpx.ASGITransport(get_asgi_application(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            urls = [f"/{view}/{number}/" for number in range(1, REQUESTS + 1)]
            answers = await asyncio.gather(*map(http.get, urls))
    assert {answer.status_code for answer in answers} == {500}
    errors = sent.of_type(None)
    reported = [error["exception"]["values"][-1]["value"] for error in errors]
    assert Counter(reported) == Counter(f"request {n}" for n in range(1, REQUESTS + 1))
    if view == "raises":
        for error, name in zip(errors, reported, strict=True):
            number = name.removeprefix("request ")
            assert reads(error) == [f"SELECT {number}000 + {step}" for step in range(5)]
    assert {len(reads(error)) for error in errors} == {5}
    traced = [
        Counter(text.split()[0] for text in statements(t)) for t in sent.of_type("transaction")
    ]
    assert traced == [{"SELECT": 5, "INSERT": 1}] * REQUESTS
    assert await names(fresh_database) == []
