"""What a test asserts of connections that were not given back."""

from __future__ import annotations

import gc
import warnings
from types import TracebackType
from typing import Any

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.interface import DatabaseInterface, databases
from django_asyncsession.pool.lease import Lease

from .sharing import SharedSource

# Leaks


class LeakCheck:
    """Raises at the end of a block that leaves sessions open, or drops them unclosed.

    Use it with `with` or `async with`.
    """

    def __init__(self) -> None:
        self._before: list[Lease[BridgedMixin]] = []
        self._warnings = warnings.catch_warnings(record=True)
        self._recorded: list[warnings.WarningMessage] = []

    def __enter__(self) -> None:
        self._before = _all_leases()
        gc.collect()
        recorded = self._warnings.__enter__()
        assert recorded is not None
        self._recorded = recorded
        warnings.simplefilter("always", ResourceWarning)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.collect()
        self._warnings.__exit__(exc_type, exc, traceback)
        before, self._before = self._before, []
        dropped = []
        for warning in self._recorded:
            if issubclass(warning.category, ResourceWarning):
                dropped.append(str(warning.message))
            else:
                warnings.showwarning(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        left = [
            f"a session of {lease.connection.alias!r} made at {lease.made_at} is still open"
            for lease in _all_leases()
            if lease not in before
        ]
        if exc is None and (left or dropped):
            raise AssertionError("; ".join([*left, *dropped]))

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        self.__exit__(*exc_info)


def assert_no_leaks() -> LeakCheck:
    """Raise `AssertionError` at the end of a block that leaves a session open, or drops one that
    was not closed, with where it was made."""
    return LeakCheck()


def _all_leases() -> list[Lease[BridgedMixin]]:
    return [lease for interface in databases.all() for lease in _leases(interface)]


def _leases(interface: DatabaseInterface) -> list[Lease[BridgedMixin]]:
    leases = [lease for pool in interface.pools for lease in pool.leases]
    if isinstance(interface.source, SharedSource):
        leases += interface.source.leases
    return leases
