"""The pages of the site: authors of a tenant, in a session and in native mode, and the pool."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.urls import path

from django_asyncsession import Session, SessionStateError, databases
from testproject.shop.models import Author


async def in_session(request: HttpRequest, name: str) -> JsonResponse:
    """Add an author, and tell of all authors, and of the tenant as each statement saw it."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    before = await session.fetch_value("SELECT current_schema()")
    await session.add(Author(name=name, born=1950))
    await asyncio.sleep(0)
    names = await session.select(Author).values_list("name", flat=True)
    seen = await session.run_sync(lambda: connection.schema_name)  # type: ignore[attr-defined]
    after = await session.fetch_value("SELECT current_schema()")
    return JsonResponse({"schemas": sorted({before, seen, after}), "names": list(names)})


async def in_native_mode(request: HttpRequest, name: str) -> JsonResponse:
    """The same, in code that knows nothing of sessions."""
    await Author.objects.acreate(name=name, born=1950)
    await asyncio.sleep(0)
    names = [author.name async for author in Author.objects.all()]
    session: Session = request.db_session  # type: ignore[attr-defined]
    seen = await session.run_sync(lambda: connection.schema_name)  # type: ignore[attr-defined]
    return JsonResponse({"schemas": [seen], "names": names})


async def elsewhere(request: HttpRequest) -> JsonResponse:
    """The schemas of reads beside the session, of a session without a request, and of one that
    says whose it is."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    schema = "SELECT current_schema()"
    reads = [lambda reader: reader.fetch_value(schema)] * 3
    beside = await session.gather(*reads)
    beside.append(await session.fetch_value(schema))
    with suppress(SessionStateError):
        beside += await session.gather(*reads)
    database, tenant = databases["default"], request.tenant  # type: ignore[attr-defined]
    async with database.get_session() as own:
        without = await own.fetch_value(schema)
        await own.run_sync(lambda: connection.set_tenant(tenant))  # type: ignore[attr-defined]
        said = await own.fetch_value(schema)
    return JsonResponse({"beside": beside, "without": without, "said": said})


async def pool(request: HttpRequest) -> JsonResponse:
    """What each connection of the pool has of a tenant, while nobody uses it."""
    database = databases["default"]
    leases = await asyncio.gather(
        *(database.acquire() for _ in range(database.stats()["pool_max"]))
    )
    kept = [_kept(lease.connection) for lease in leases]
    for lease in leases:
        lease.release()
    return JsonResponse({"kept": kept})


def _kept(wrapper: Any) -> list[str]:
    # The server is asked below psycopg, where nothing sets a schema first.
    shown = wrapper.connection.pgconn.exec_(b"SHOW search_path")
    path = shown.get_value(0, 0).decode()
    return [wrapper.schema_name, wrapper.tenant.schema_name, wrapper.settings_dict["SCHEMA"], path]


urlpatterns = [
    path("session/<name>/", in_session),
    path("native/<name>/", in_native_mode),
    path("elsewhere/", elsewhere),
    path("pool/", pool),
]
