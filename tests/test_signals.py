"""The signal at the beginning of each lease: what tenants and row-level security set up, every
session has, whatever connection it got.

On real connections of the pools, since leases of these are what it is about.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import DatabaseError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from django_asyncsession import DatabaseInterface, databases
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.signals import connection_leased
from tests.models import User
from tests.postgres import ask
from tests.sessions import INSERT, names, pool, whole

only_postgresql = pytest.mark.parametrize("alias", ["default"], ids=["postgresql"], indirect=True)


@contextmanager
def receiving(receiver: Callable[..., Any]) -> Iterator[None]:
    """Let a function receive the signal, in the block."""
    connection_leased.connect(receiver)
    try:
        yield
    finally:
        connection_leased.disconnect(receiver)


# When it is sent, and with what


async def test_it_is_sent_once_for_each_transaction_before_anything_else(
    real_database: DatabaseInterface,
) -> None:
    seen: list[Any] = []

    def receive(connection: Any, alias: str, session: Any, request: Any, **kwargs: Any) -> None:
        served = connections[alias] is connection and alias == real_database.alias
        seen.append((session, connection.in_atomic_block, served, request))

    with receiving(receive):
        async with real_database.get_session() as session:
            assert seen == []
            await session.fetch_value("SELECT 1")
            await session.fetch_value("SELECT 2")
            assert seen == [(session, True, True, None)]
            async with session.released():
                pass
            await session.run_sync(lambda: User.objects.using(real_database.alias).count())
            assert len(seen) == 2
        seen.clear()
        async with real_database.get_session(autocommit=True) as session:
            await session.execute("SELECT 1")
            await session.execute("SELECT 2")
            assert seen == [(session, False, True, None)] * 2
        seen.clear()
        async with real_database.get_transaction() as low_level:
            await low_level.execute("SELECT 1")
        assert seen == [(None, True, True, None)]
    await whole(real_database)


async def test_nothing_is_sent_without_a_receiver_or_a_connection(
    real_database: DatabaseInterface,
) -> None:
    seen: list[Any] = []

    def receive(**kwargs: Any) -> None:
        seen.append(kwargs)

    with receiving(receive):
        async with real_database.get_session():
            """Takes no connection."""
    async with real_database.get_session() as session:
        await session.execute("SELECT 1")
    assert seen == []


async def test_callbacks_of_a_transaction_without_statements_have_it_too(
    real_database: DatabaseInterface,
) -> None:
    seen: list[str] = []

    def receive(**kwargs: Any) -> None:
        seen.append("leased")

    with receiving(receive):
        async with real_database.get_session() as session:
            session.on_commit(lambda: seen.append("callback"))
    assert seen == ["leased", "callback"]


async def test_reads_of_gather_are_set_up_like_the_session(
    real_database: DatabaseInterface,
) -> None:
    """On every connection they get, with one snapshot where there is one; what the receiver sets
    is no write of the session."""

    def receive(connection: Any, session: Any, **kwargs: Any) -> None:
        connection.tenant = session.info["tenant"]
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 AS sql_of_a_receiver")

    async def tenant(session: Any) -> Any:
        return await session.run_sync(lambda: connections[real_database.alias].tenant)  # type: ignore[attr-defined]

    with receiving(receive):
        for isolation in (None, "repeatable read"):
            if isolation and real_database.vendor == "sqlite":
                continue
            async with real_database.get_session(isolation=isolation) as session:
                session.info["tenant"] = "a"
                assert await session.gather(*[tenant] * 4) == ["a"] * 4
                assert await tenant(session) == "a"
                assert await session.gather(*[tenant] * 4) == ["a"] * 4
    await whole(real_database)


async def test_what_a_receiver_writes_is_part_of_the_transaction(
    real_database: DatabaseInterface,
) -> None:
    def receive(alias: str, **kwargs: Any) -> None:
        User.objects.using(alias).create(name="by the receiver", level=1)

    with receiving(receive):
        with pytest.raises(LookupError):
            async with real_database.get_session() as session:
                await session.execute("SELECT 1")
                raise LookupError
        async with real_database.get_session() as session:
            await session.execute("SELECT 1")
    assert await names(real_database) == ["by the receiver"]


# When a receiver fails


def refuse(**kwargs: Any) -> None:
    raise PermissionError("no such tenant")


def send_nonsense(connection: Any, **kwargs: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT nonsense")


@pytest.mark.parametrize(
    ("receiver", "error"),
    [(refuse, PermissionError), (send_nonsense, DatabaseError)],
    ids=["raises", "its SQL fails"],
)
@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_an_error_of_a_receiver_fails_the_lease_and_leaks_nothing(
    real_database: DatabaseInterface, receiver: Any, error: Any, autocommit: bool
) -> None:
    with pool(real_database, max_size=2), receiving(receiver):
        for _ in range(5):
            with pytest.raises(error):
                async with real_database.get_session(autocommit=autocommit) as session:
                    await session.execute(INSERT, ("not written",))
        await whole(real_database)
    assert await names(real_database) == []


async def test_nothing_runs_in_a_transaction_that_a_receiver_has_failed(
    real_database: DatabaseInterface,
) -> None:
    """Not even when its error is swallowed: it would run without the tenant."""
    with pytest.raises(TransactionManagementError, match="swallowed"), receiving(refuse):
        async with real_database.get_session() as session:
            with pytest.raises(PermissionError):
                await session.execute("SELECT 1")
            with pytest.raises(TransactionManagementError):
                await session.execute(INSERT, ("not written",))
    assert await names(real_database) == []
    await whole(real_database)


async def test_a_cancelled_receiver_leaks_nothing(real_database: DatabaseInterface) -> None:
    from django_asyncsession.bridge import await_

    began = asyncio.Event()

    def wait(**kwargs: Any) -> None:
        began.set()
        await_(asyncio.Event().wait())

    async def use() -> None:
        async with real_database.get_session() as session:
            await session.execute(INSERT, ("not written",))

    with receiving(wait):
        task = asyncio.create_task(use())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await whole(real_database)
    assert await names(real_database) == []


def test_a_coroutine_function_is_refused_when_it_is_connected() -> None:
    async def receive(**kwargs: Any) -> None:
        """Never called."""

    with pytest.raises(ConfigurationError, match="receive of connection_leased is a coroutine"):
        connection_leased.connect(receive)


# Requests, tenants and row-level security


@pytest.fixture
async def guarded(alias: str) -> AsyncIterator[str]:
    """A table whose rows are a tenant's, as `set_config(..., true)` says, and a role that is bound
    to that; `default` works in the role."""
    role = f"das_tenants_{uuid.uuid4().hex[:8]}"
    ask(f"CREATE ROLE {role}")
    ask("CREATE TABLE das_documents (id serial, tenant text DEFAULT current_setting('app.tenant'))")
    ask("ALTER TABLE das_documents ENABLE ROW LEVEL SECURITY")
    ask(
        "CREATE POLICY own ON das_documents "
        "USING (tenant = current_setting('app.tenant', true)) "
        "WITH CHECK (tenant = current_setting('app.tenant', true))"
    )
    ask(f"GRANT ALL ON das_documents, das_documents_id_seq TO {role}")
    options = connections.settings["default"]["OPTIONS"]
    connections.settings["default"]["OPTIONS"] = {**options, "assume_role": role}
    try:
        yield role
    finally:
        connections.settings["default"]["OPTIONS"] = options
        await databases["default"].close()
        ask("DROP TABLE das_documents")
        ask(f"DROP ROLE {role}")


def set_tenant(connection: Any, request: HttpRequest | None, session: Any, **kwargs: Any) -> None:
    """What a project does."""
    tenant = request.headers["X-Tenant"] if request else session.info.get("tenant")
    if tenant is not None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.tenant', %s, true)", [tenant])


async def documents(request: Any) -> HttpResponse:
    """Writes one, and tells whose are seen: with the session, with Django's own, in parallel."""
    session = request.db_session
    await session.execute("INSERT INTO das_documents DEFAULT VALUES")
    await asyncio.sleep(0)
    sql = "SELECT DISTINCT tenant FROM das_documents"
    seen = [row[0] for row in await session.fetch_all(sql)]
    await session.commit()
    for rows in await session.gather(*[lambda s: s.fetch_all(sql)] * 2):
        seen += [row[0] for row in rows]

    def sync() -> list[str]:
        with transaction.atomic(), connections["default"].cursor() as cursor:
            cursor.execute(sql)
            return [row[0] for row in cursor.fetchall()]

    seen += await session.run_sync(sync)
    return HttpResponse(",".join(sorted(set(seen))))


urlpatterns = [path("documents/", documents)]


@only_postgresql
@pytest.mark.parametrize("native", [False, True], ids=["sessions", "native"])
async def test_sixty_requests_of_two_tenants_see_their_own_rows_only(
    alias: str, guarded: str, native: bool
) -> None:
    settings = {
        "ROOT_URLCONF": __name__,
        "MIDDLEWARE": ["django_asyncsession.middleware.AsyncSessionMiddleware"],
        "ASYNC_SESSION": {"NATIVE_ORM": native, "POOLS": {alias: {"max_size": 3}}},
    }
    client = AsyncClient()

    async def ask_as(tenant: str) -> tuple[str, str]:
        response = await client.get("/documents/", headers={"X-Tenant": tenant})
        return tenant, response.content.decode()

    with override_settings(**settings), receiving(set_tenant):
        answers = await asyncio.gather(*(ask_as("ab"[number % 2]) for number in range(60)))
        await whole(databases[alias])
    assert set(answers) == {("a", "a"), ("b", "b")}
    assert ask("SELECT tenant, count(*) FROM das_documents GROUP BY 1 ORDER BY 1") == [
        ("a", 30),
        ("b", 30),
    ]


@only_postgresql
async def test_a_session_without_a_tenant_sees_nothing_of_the_last_one(
    alias: str, guarded: str
) -> None:
    db = databases[alias]
    with pool(db, max_size=1), receiving(set_tenant):
        for autocommit in (False, True):
            async with db.get_session(autocommit=autocommit) as session:
                session.info["tenant"] = "a"
                async with session.atomic():
                    await session.execute("INSERT INTO das_documents DEFAULT VALUES")
                    assert await session.fetch_value("SELECT count(*) FROM das_documents") > 0
            async with db.get_session(autocommit=autocommit) as session:
                assert await session.fetch_value("SELECT count(*) FROM das_documents") == 0


async def test_a_request_and_its_session_are_known_by_each_other_and_freed_together(
    real_database: DatabaseInterface,
) -> None:
    """Without the garbage collector, which a reference each way would need."""
    import gc
    import weakref

    request = HttpRequest()
    session = real_database.get_session()
    session.request = request
    request.db_session = session  # type: ignore[attr-defined]
    assert session.request is request
    gone = weakref.ref(session)
    gc.disable()
    try:
        del request, session
        assert gone() is None
    finally:
        gc.enable()
