"""OpenTelemetry's instrumentations of psycopg and of Django: one span for each statement, where it
belongs, and nothing that is lost. On real connections of the pools, which it instruments."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import DatabaseError, transaction
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from opentelemetry import trace
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from django_asyncsession import DatabaseInterface, Session, databases, native
from tests.ecosystem.pools import opened
from tests.models import User
from tests.sessions import INSERT, names

TASKS = 10
REQUESTS = 40


@pytest.fixture(params=[False, True], ids=["plain", "commenter"])
def spans(request: pytest.FixtureRequest) -> Iterator[Spans]:
    """The spans of everything, with the instrumentations on; also with one that adds comments."""
    # What they leave in place of a class method is bound to that class: no good for subclasses.
    holders = [psycopg, psycopg.Connection, psycopg.AsyncConnection]
    before = [(holder, "connect", vars(holder)["connect"]) for holder in holders]
    provider = TracerProvider()
    seen = Spans()
    provider.add_span_processor(SimpleSpanProcessor(seen))
    AsyncPGInstrumentor().instrument(tracer_provider=provider)
    PsycopgInstrumentor().instrument(tracer_provider=provider, enable_commenter=request.param)
    yield seen
    PsycopgInstrumentor().uninstrument()
    AsyncPGInstrumentor().uninstrument()
    for holder, name, value in before:
        setattr(holder, name, value)


class Spans(InMemorySpanExporter):
    """The spans that have ended."""

    @property
    def statements(self) -> list[ReadableSpan]:
        """Those of statements, in the order in which they began."""
        every = [span for span in self.get_finished_spans() if "db.statement" in span.attributes]
        return sorted(every, key=lambda span: span.start_time)

    @property
    def verbs(self) -> list[str]:
        """The first word of each statement."""
        return [str(span.attributes["db.statement"]).split()[0] for span in self.statements]


@pytest.fixture
async def database(spans: Spans, empty_tables: None) -> AsyncIterator[DatabaseInterface]:
    """PostgreSQL, with the connections of the pool opened after the instrumentation."""
    database = databases["default"]
    await database.close()
    await opened(database)
    spans.clear()
    yield database
    await database.close()


async def test_nothing_is_lost(database: DatabaseInterface, spans: Spans) -> None:
    async with database.get_session() as session:
        assert await session.fetch_value("SELECT 1") == 1
        assert await session.execute(INSERT, ["ann"]) == 1
        assert (await session.add(User(name="bob"))).pk
    assert await names(database) == ["ann", "bob"]


async def raw(session: Session) -> list[str]:
    await session.execute(INSERT, ["x"])
    await session.execute_many(INSERT, [["y"], ["z"]])
    await session.fetch_value("SELECT 1")
    await session.fetch_all("SELECT %(n)s", {"n": 1})
    async with await session.cursor("SELECT 1") as cursor:
        await cursor.flatten()
    return ["INSERT", "INSERT", "SELECT", "SELECT", "SELECT"]


async def rows(session: Session) -> list[str]:
    user = await session.add(User(name="x"))
    user.name = "y"
    await session.add(user)
    await session.refresh(user)
    await session.get(User, 4711)
    return ["INSERT", "UPDATE", "SELECT", "SELECT"]


async def queries(session: Session) -> list[str]:
    await session.select(User).where(level=1)
    await session.select(User).count()
    await session.insert.rows(User(name="x"), User(name="y"))
    await session.update(User).all_rows().set(level=2)
    await session.select(User).where(name="x").for_update().all()
    return ["SELECT", "SELECT", "INSERT", "UPDATE", "SELECT"]


async def blocks(session: Session) -> list[str]:
    async with session.begin_nested():
        await session.fetch_value("SELECT 1")
    return ["SAVEPOINT", "SELECT", "RELEASE"]


async def sync_code(session: Session) -> list[str]:
    def fn() -> None:
        with transaction.atomic():
            User.objects.create(name="x")
            list(User.objects.all())

    await session.run_sync(fn)
    return ["SAVEPOINT", "INSERT", "SELECT", "RELEASE"]


async def native_mode(session: Session) -> list[str]:
    async with native.use(session):
        user = await User.objects.acreate(name="x")
        await User.objects.aget(pk=user.pk)
        await User.objects.all().aupdate(level=2)
    return ["INSERT", "SELECT", "UPDATE"]


@pytest.mark.parametrize("does", [raw, rows, queries, blocks, sync_code, native_mode])
async def test_each_statement_is_one_span(
    database: DatabaseInterface, spans: Spans, does: Callable[[Session], Awaitable[list[str]]]
) -> None:
    with override_settings(ASYNC_SESSION={"NATIVE_ORM": True}):
        async with database.get_session() as session:
            wanted = await does(session)
    assert spans.verbs == wanted
    assert {span.attributes["db.system"] for span in spans.statements} == {"postgresql"}


async def test_an_error_is_recorded_in_its_span_alone(
    database: DatabaseInterface, spans: Spans
) -> None:
    with pytest.raises(DatabaseError):
        async with database.get_session() as session:
            await session.execute(INSERT, ["lost"])
            await session.execute("SELECT * FROM no_such_table")
    async with database.get_session() as session:
        await session.execute(INSERT, ["kept"])
    assert [span.status.is_ok for span in spans.statements] == [True, False, True]
    (event,) = spans.statements[1].events
    assert event.attributes["exception.type"] == "psycopg.errors.UndefinedTable"
    assert await names(database) == ["kept"]


async def test_spans_of_sessions_at_the_same_time_are_their_tasks_own(
    database: DatabaseInterface, spans: Spans
) -> None:
    tracer = spans_tracer(spans)

    async def task(number: int) -> None:
        with tracer.start_as_current_span(f"task {number}"):
            async with database.get_session() as session:
                for step in range(3):
                    sql = f"SELECT pg_sleep({(number + 1) * 0.01}), {number}, {step}"
                    await session.fetch_value(sql)

    await asyncio.gather(*map(task, range(TASKS)))
    tasks = {
        span.context.span_id: span
        for span in spans.get_finished_spans()
        if span.name.startswith("task")
    }
    assert len(tasks) == TASKS and len(spans.statements) == 3 * TASKS
    for span in spans.statements:
        parent = tasks[span.parent.span_id]
        number = int(parent.name.removeprefix("task "))
        assert f"), {number}, " in str(span.attributes["db.statement"])
        assert span.context.trace_id == parent.context.trace_id
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
        assert span.end_time - span.start_time >= (number + 1) * 0.01 * 1e9


async def test_spans_of_gathered_reads_belong_to_who_gathers(
    database: DatabaseInterface, spans: Spans
) -> None:
    with spans_tracer(spans).start_as_current_span("gathers") as outer:
        async with database.get_session() as session:
            got = await session.gather(
                *(lambda reader, n=n: reader.fetch_value(f"SELECT {n}") for n in range(3))
            )
    assert got == [0, 1, 2]
    reads = [
        s
        for s in spans.statements
        if str(s.attributes["db.statement"]) in {"SELECT 0", "SELECT 1", "SELECT 2"}
    ]
    assert [span.parent.span_id for span in reads] == [outer.get_span_context().span_id] * 3


def spans_tracer(spans: Spans) -> Any:
    """A tracer whose spans are seen too."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test")


# Requests at the same time


async def in_session(request: HttpRequest, number: int) -> HttpResponse:
    """Statements of the request's session, with its number."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    for step in range(3):
        await session.fetch_value(f"SELECT {number}000 + {step}")
    await session.run_sync(User.objects.create, name=f"user {number}")
    return HttpResponse(trace.get_current_span().get_span_context().span_id)


async def in_native_mode(request: HttpRequest, number: int) -> HttpResponse:
    """The same, in code that knows nothing of sessions."""
    for step in range(3):
        await User.objects.filter(level=number * 1000 + step).aexists()
    await User.objects.acreate(name=f"user {number}")
    return HttpResponse(trace.get_current_span().get_span_context().span_id)


urlpatterns = [
    path("session/<int:number>/", in_session),
    path("native/<int:number>/", in_native_mode),
]


@pytest.fixture
def django_spans(spans: Spans) -> Iterator[None]:
    """Each request has a span, by the middleware that OpenTelemetry puts in front."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    middleware = ["django_asyncsession.middleware.AsyncSessionMiddleware"]
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=middleware, ALLOWED_HOSTS=["*"]):
        DjangoInstrumentor().instrument(tracer_provider=provider)
        assert len(settings.MIDDLEWARE) == 2
        yield
        DjangoInstrumentor().uninstrument()


@pytest.mark.parametrize("view", ["session", "native"])
@pytest.mark.parametrize("middleware", [False, True], ids=["threads", "native middleware"])
async def test_statements_are_children_of_their_request(
    database: DatabaseInterface, spans: Spans, django_spans: None, view: str, middleware: bool
) -> None:
    options = {"NATIVE_ORM": view == "native", "NATIVE_MIDDLEWARE": view == "native" and middleware}
    with override_settings(ASYNC_SESSION=options):
        transport = httpx.ASGITransport(get_asgi_application())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            urls = [f"/{view}/{number}/" for number in range(REQUESTS)]
            answers = await asyncio.gather(*map(http.get, urls))
    assert {answer.status_code for answer in answers} == {200}
    requests = [span for span in spans.get_finished_spans() if span.name.startswith("GET")]
    assert len(requests) == REQUESTS
    parents = Counter(span.parent.span_id for span in spans.statements)
    assert parents == {span.context.span_id: 4 for span in requests}
    assert await names(database) == sorted(f"user {number}" for number in range(REQUESTS))
