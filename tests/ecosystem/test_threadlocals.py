"""Packages that keep what belongs to a request in thread-locals: each session has its own.

On real connections, where two sessions are open at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import import_module
from typing import Any

import crum
import pytest
from django_currentuser import middleware as currentuser

from django_asyncsession import DatabaseInterface, threadlocals
from django_asyncsession.bridge import await_
from tests.ecosystem.models import Area


async def together(db: DatabaseInterface, *services: Callable[[Any], Any]) -> list[Any]:
    """What sync code of sessions returns; each gets a function that waits for the others."""
    all_of_them = asyncio.Barrier(len(services))

    async def request(service: Callable[[Any], Any]) -> Any:
        async with db.get_session(autocommit=True) as session:
            return await session.run_sync(service, lambda: await_(all_of_them.wait()))

    return list(await asyncio.gather(*map(request, services)))


@pytest.mark.parametrize("module", ["crum", "django_currentuser.middleware", "mptt.models"])
def test_known_packages_have_what_the_table_says(module: str) -> None:
    import_module(module)
    held = [
        local
        for name in threadlocals.KNOWN[module]
        for local in threadlocals.named(f"{module}.{name}")
    ]
    assert held and {id(local) for local in held} <= {id(found) for found in threadlocals.known()}


async def test_crum_knows_the_user_of_each_session(real_database: DatabaseInterface) -> None:
    def service(name: str) -> Callable[[Any], Any]:
        def call(wait: Any) -> Any:
            with crum.impersonate(name):
                wait()
                return crum.get_current_user()

        return call

    assert await together(real_database, service("ann"), service("bob")) == ["ann", "bob"]
    assert crum.get_current_user() is None


async def test_currentuser_knows_the_user_of_each_session(
    real_database: DatabaseInterface,
) -> None:
    def service(name: str) -> Callable[[Any], Any]:
        def call(wait: Any) -> Any:
            currentuser._set_current_user(name)
            wait()
            return currentuser.get_current_user()

        return call

    assert await together(real_database, service("ann"), service("bob")) == ["ann", "bob"]
    assert currentuser.get_current_user() is None


async def test_a_tree_of_mptt_is_not_delayed_by_another_session(
    real_database: DatabaseInterface,
) -> None:
    def delays(wait: Any) -> bool:
        with Area.objects.using(real_database.alias).model._tree_manager.disable_mptt_updates():
            wait()
            return bool(Area._mptt_updates_enabled)

    def plants(wait: Any) -> bool:
        wait()
        return bool(Area._mptt_updates_enabled)

    assert await together(real_database, delays, plants) == [False, True]
    assert Area._mptt_updates_enabled
