"""The ASYNC_SESSION setting, with the default of each key beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

DEFAULTS: Final[Mapping[str, Any]] = {
    # Alias of DATABASES that the middleware and the decorator use.
    "ALIAS": "default",
    # Name of the attribute that the middleware sets on the request.
    "REQUEST_ATTRIBUTE": "db_session",
    # True: one transaction per request. False: the request's session is in autocommit mode.
    "ATOMIC_REQUESTS": True,
    # True: Django's own aget(), asave(), async for ... run in the request's session.
    "NATIVE_ORM": False,
    # True: sync parts of Django's own middleware, and sync views, run without a thread too.
    "NATIVE_MIDDLEWARE": False,
    # Seconds after which sync code of native mode that did not await is logged; None logs none.
    "LOOP_BLOCK_WARNING_SECONDS": None,
    # Pool options by alias, with psycopg_pool's names: {"default": {"max_size": 20}}.
    "POOLS": {},
    # True: sessions put SQLite database files into WAL mode, where readers and a writer do not
    # wait for each other. The mode stays with the file.
    "SQLITE_WAL": True,
    # Seconds after which a statement is logged as slow; None logs none.
    "SLOW_QUERY_SECONDS": None,
    # Seconds after which a session that still holds its connection is logged; None logs none.
    "LEAK_WARNING_SECONDS": None,
}


class Settings:
    """ASYNC_SESSION as attributes, read anew at each access so that `override_settings` works."""

    def __getattr__(self, name: str) -> Any:
        """The value of the key `name`, or its default.

        Raises:
            AttributeError: there is no such key.
        """
        from django.conf import settings as django_settings

        if name not in DEFAULTS:
            raise AttributeError(f"ASYNC_SESSION has no key {name!r}; it has {sorted(DEFAULTS)}")
        given: Mapping[str, Any] = getattr(django_settings, "ASYNC_SESSION", {})
        return given.get(name, DEFAULTS[name])


settings: Final = Settings()
