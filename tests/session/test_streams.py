"""Streams: memory stays flat however slow the reader is, and what nobody wants is not sent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connections

from tests import streams
from tests.conftest import empty
from tests.models import User

# MB: far less than the 200 that the database sends to whoever takes them.
FLAT = 30


@pytest.fixture(scope="module")
def full_tables() -> Iterator[None]:
    """So many users in each database that a stream of them is a long one."""
    for using in settings.DATABASES:
        users = [User(name="x") for _ in range(streams.ROWS)]
        User.objects.using(using).bulk_create(users, batch_size=2000)
        connections[using].close()
    yield
    for using in settings.DATABASES:
        empty(using)
        connections[using].close()
    gc.collect()


def growth(alias: str, way: str, loop: str) -> int:
    """MB by which a process of its own grew that streams to a slow reader."""
    name = str(connections[alias].settings_dict["NAME"])
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.streams", alias, name, way, loop],
        capture_output=True,
        text=True,
        timeout=100,
        env=env,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("way", ["stream", "aiterator", "http"])
def test_memory_is_flat_against_a_slow_reader(
    full_tables: None, alias: str, way: str, loop: str
) -> None:
    """`session.stream()`, `aiterator()` and a streaming response hold no more than a few chunks."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    assert growth(alias, way, loop) < FLAT
