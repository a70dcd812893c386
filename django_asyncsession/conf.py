"""The ASYNC_SESSION setting, with the default of each key beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    # True: a query whose shape was seen before runs without Django's compiler. False: never.
    # "compare": Django's compiler runs too, and an AssertionError tells of a difference.
    "PLANS": True,
    # Pool options by alias, with psycopg_pool's names: {"default": {"max_size": 20}}.
    "POOLS": {},
    # True: sessions put SQLite database files into WAL mode, where readers and a writer do not
    # wait for each other. The mode stays with the file.
    "SQLITE_WAL": True,
    # Dotted names of `threading.local` objects, or of what holds them, that each session has for
    # itself; those of known packages are added.
    "THREAD_LOCALS": [],
    # Seconds that a stream, or the body of a streaming response, may be left unread before its
    # transaction is rolled back and its connection given back; None for ever.
    "STREAM_TIMEOUT": 60.0,
    # Seconds after which a statement is logged as slow; None logs none.
    "SLOW_QUERY_SECONDS": None,
    # Seconds after which a session that still holds its connection is logged; None logs none.
    "LEAK_WARNING_SECONDS": None,
}


# Keys that take these values and no others.
CHOICES: Final[Mapping[str, tuple[object, ...]]] = {"PLANS": (True, False, "compare")}


class Settings:
    """ASYNC_SESSION as attributes, read anew at each access so that `override_settings` works."""

    # What was found to be right; the same dict is not looked through at each access.
    _checked: object = DEFAULTS

    def __getattr__(self, name: str) -> Any:
        """The value of the key `name`, or its default.

        Raises:
            AttributeError: there is no such key.
            ConfigurationError: ASYNC_SESSION is no dict, has another key, or a value that cannot
                be.
        """
        from django.conf import settings as django_settings

        if name not in DEFAULTS:
            raise AttributeError(f"ASYNC_SESSION has no key {name!r}; it has {sorted(DEFAULTS)}")
        given: Any = getattr(django_settings, "ASYNC_SESSION", DEFAULTS)
        if given is not self._checked:
            self._check(given)
        return given.get(name, DEFAULTS[name])

    def _check(self, given: object) -> None:
        from .exceptions import ConfigurationError

        if problems := list(problems_of(given)):
            raise ConfigurationError("; ".join(problems))
        self._checked = given


def problems_of(given: object) -> Iterator[str]:
    """What is wrong with a value of ASYNC_SESSION, in words; the aliases are not looked at."""
    if not isinstance(given, Mapping):
        yield f"ASYNC_SESSION is {given!r}; give a dict, such as {{'NATIVE_ORM': True}}"
        return
    for name, value in given.items():
        if name not in DEFAULTS:
            yield f"ASYNC_SESSION has no key {name!r}; it has {sorted(DEFAULTS)}"
        elif name in CHOICES:
            if not any(type(value) is type(c) and value == c for c in CHOICES[name]):
                yield f'ASYNC_SESSION["{name}"] is {value!r}; give {_one_of(CHOICES[name])}'
        elif (wanted := _wanted(DEFAULTS[name], value)) is not None:
            yield f'ASYNC_SESSION["{name}"] is {value!r}; give {wanted}'


def _one_of(choices: Sequence[object]) -> str:
    *some, last = map(repr, choices)
    return f"{', '.join(some)} or {last}"


def _wanted(default: object, value: object) -> str | None:
    """What to give instead of a value that is not of the kind of its default; None: it is."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, str):
        return None if isinstance(value, str) and value else "a name"
    if isinstance(default, Mapping):
        return None if isinstance(value, Mapping) else "a dict"
    if isinstance(default, Sequence):
        return None if isinstance(value, list | tuple | set | frozenset) else "a list"
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        fits = value is None or 0 <= value < math.inf
        return None if fits else "seconds, 0 or more and not infinite, or None"
    return "seconds, or None"


settings: Final = Settings()
