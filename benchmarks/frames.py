"""How long the way is: Python frames that a use of this package enters.

    python benchmarks/frames.py

Prints, for a get in an open session, sync code of nothing, a whole session with one get, Django's
own `aget()` in native mode and one HTTP request, how many frames and how many coroutines of this
package are entered, on the PostgreSQL of the tests. Frames do not depend on the machine: what
repeats itself for each statement costs a part of a microsecond each.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from inspect import CO_COROUTINE
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


async def count(use: Callable[[], Awaitable[Any]]) -> dict[str, int]:
    """Frames entered while `use` is awaited in this thread.

    Returns:
        "ours", "Django's", "others'", and "coroutines" of ours.
    """
    import django

    places = {
        str(ROOT / "django_asyncsession"): "ours",
        str(Path(django.__file__).parent): "Django's",
    }
    # Resumed as well as called; kept, so that no other frame gets the same place in memory.
    entered: dict[int, FrameType] = {}
    counts = Counter({"ours": 0, "Django's": 0, "others'": 0, "coroutines": 0})

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event != "call" or id(frame) in entered:
            return
        entered[id(frame)] = frame
        file = frame.f_code.co_filename
        whose = next((name for place, name in places.items() if file.startswith(place)), "others'")
        counts[whose] += 1
        if whose == "ours" and frame.f_code.co_flags & CO_COROUTINE:
            counts["coroutines"] += 1

    sys.setprofile(note)
    try:
        await use()
    finally:
        sys.setprofile(None)
    return dict(counts)


async def measure() -> dict[str, dict[str, int]]:
    """The counts of each use, with everything made and imported that is made once."""
    from django.http import HttpRequest, HttpResponse
    from django.test import AsyncClient, override_settings
    from django.urls import path

    from django_asyncsession import databases, native
    from tests.models import User

    db = databases["default"]
    found: dict[str, dict[str, int]] = {}

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(str(await request.db_session.get(User, 1)))  # type: ignore[attr-defined]

    class URLs:
        urlpatterns = (path("", view),)

    async def warm(use: Callable[[], Awaitable[Any]]) -> None:
        # The first time everything is made; the next ones, plans are compared with Django's way.
        for _ in range(4):
            await use()

    async def whole() -> None:
        async with db.get_session() as session:
            await session.get(User, 1)

    async with db.get_session() as session:
        uses: dict[str, Callable[[], Awaitable[Any]]] = {
            "get in an open session": lambda: session.get(User, 1),
            "run_sync of nothing": lambda: session.run_sync(int),
        }
        for name, use in uses.items():
            await warm(use)
            found[name] = await count(use)
    await warm(whole)
    found["a session with one get"] = await count(whole)
    with override_settings(ROOT_URLCONF=URLs):
        client = AsyncClient()
        await warm(lambda: client.get("/"))
        found["an HTTP request with one get"] = await count(lambda: client.get("/"))
    native.install()
    try:
        async with db.get_session() as session, native.use(session):
            await warm(lambda: User.objects.aget(pk=1))
            found["aget() in native mode"] = await count(lambda: User.objects.aget(pk=1))
    finally:
        native.uninstall()
    return found


def main() -> None:
    """Make a database, count, drop the database."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    sys.path.insert(0, str(ROOT))
    import django

    django.setup()
    from django.db import connection
    from django.test.utils import setup_databases, teardown_databases

    from django_asyncsession import databases
    from tests.models import User

    made = setup_databases(0, False, aliases={"default"})
    User.objects.create(id=1, name="one")

    async def run() -> dict[str, dict[str, int]]:
        try:
            return await measure()
        finally:
            await databases.close_all()

    try:
        for name, counts in asyncio.run(run()).items():
            print(f"{name:30} " + ", ".join(f"{n:4} {whose}" for whose, n in counts.items()))
    finally:
        connection.close()
        teardown_databases(made, 0)


if __name__ == "__main__":
    main()
