"""Engines of third parties: a project starts with them as it does without this package, in a
process of its own, on each real database."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from django.db import connections

START = """
import asyncio, json, os
import django
from django.conf import settings
settings.configure(
    DATABASES=json.loads(os.environ["DATABASES_OF_TEST"]),
    INSTALLED_APPS=["django_asyncsession", "django.contrib.contenttypes", "django.contrib.auth"],
    SECRET_KEY="x", USE_TZ=True,
)
django.setup()
from django.db import connections
from django_asyncsession import databases

async def main():
    try:
        async with databases["default"].get_session() as session:
            print(await session.fetch_value("SELECT 42"))
            print(await session.run_sync(lambda: type(connections["default"]).__mro__))
        try:
            async with databases["other"].get_session() as session:
                print(await session.fetch_value("SELECT 43"))
        except Exception as error:
            print(type(error).__name__, error)
    finally:
        await databases.close_all()

asyncio.run(main())
"""
ENTRY = ("ENGINE", "NAME", "USER", "PASSWORD", "HOST", "PORT")


def start(alias: str, default: str, other: str) -> list[str]:
    """What a process prints that starts with these engines on an alias's database."""
    entry = {name: str(connections[alias].settings_dict[name]) for name in ENTRY}
    entries = {"default": {**entry, "ENGINE": default}, "other": {**entry, "ENGINE": other}}
    env = {
        **os.environ,
        "DATABASES_OF_TEST": json.dumps(entries),
        "ENGINE_OF_TEST": entry["ENGINE"],
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("place", ["default", "other"])
def test_an_engine_that_imports_models_does_not_keep_django_from_starting(
    alias: str, place: str
) -> None:
    """Nothing that may need models is imported before they are ready."""
    plain = str(connections[alias].settings_dict["ENGINE"])
    engines = {"default": plain, "other": plain, place: "tests.engine_of_models"}
    first, classes, second = start(alias, **engines)
    assert (first, second) == ("42", "43")
    assert ("engine_of_models" in classes) is (place == "default")


BROKEN = {
    "no such module": ("tests.no_such_engine", "no_such_engine"),
    "no wrapper": ("tests.engine_without_wrapper", "no attribute 'DatabaseWrapper'"),
    "raises": ("tests.engine_that_raises", "this engine needs something"),
}


@pytest.mark.parametrize(("engine", "reason"), BROKEN.values(), ids=BROKEN)
def test_an_engine_that_cannot_be_imported_is_told_at_its_first_use(
    alias: str, engine: str, reason: str
) -> None:
    """A project that never uses it works."""
    plain = str(connections[alias].settings_dict["ENGINE"])
    first, _, said = start(alias, plain, engine)
    assert first == "42"
    assert said.startswith(f"ConfigurationError sessions cannot use the engine '{engine}'")
    assert reason in said
