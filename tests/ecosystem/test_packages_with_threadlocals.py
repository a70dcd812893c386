"""Packages that keep what belongs to a request in thread-locals: each session has its own.

On real connections, where two sessions are open at the same time.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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


# Those whose present release can be installed beside the others. They are read, since most can only
# be imported by a project that has them as apps.
READ = [
    "allauth.account.auth_backends",
    "cachalot.cache",
    "cacheops.invalidation",
    "cacheops.query",
    "cacheops.transaction",
    "crum",
    "django_currentuser.middleware",
    "django_middleware_global_request.middleware",
    "django_multitenant.utils",
    "modeltranslation.thread_context",
    "mptt.models",
    "pghistory.runtime",
    "pgtrigger.runtime",
    "threadlocals.threadlocals",
]


@pytest.mark.parametrize("module", READ)
def test_known_names_are_defined_where_the_table_says(module: str) -> None:
    source = source_of(module)
    defined: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            defined.update(ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.ClassDef):
            defined.add(node.name)
    assert set(threadlocals.KNOWN[module]) <= defined
    assert "local" in source


def source_of(module: str) -> str:
    """The text of a module of a package that is installed."""
    package, *parts = module.split(".")
    found = find_spec(package)
    assert found is not None and found.submodule_search_locations, package
    place = Path(found.submodule_search_locations[0], *parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.read_text(encoding="utf-8")


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
