"""Values that are put into a query to see where in its SQL they come out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

#: How many sets of probes there are that share no value; the last is for filling up lists.
SETS: Final = 3
# Each number is one of a small integer column, and each set has as many as the longest list.
_EACH: Final = 5000
_DAY: Final = dt.timedelta(days=1)

_MAKERS: Final[Mapping[type, Callable[[int, int], Any]]] = {
    int: lambda salt, at: 1000 + salt * _EACH + at,
    # With all that a pattern has to escape.
    str: lambda salt, at: f"p{salt}x{at}%_\\'",
    float: lambda salt, at: 1000.5 + salt * _EACH + at,
    # Few digits: it has to fit into a narrow column.
    Decimal: lambda salt, at: Decimal(SETS * at + salt + 1),
    dt.datetime: lambda salt, at: (
        dt.datetime(2001 + 30 * salt, 1, 1, 12, tzinfo=dt.UTC) + at * _DAY
    ),
    dt.date: lambda salt, at: dt.date(2001 + 30 * salt, 1, 1) + at * _DAY,
    dt.time: lambda salt, at: dt.time(salt + 1, at // 60 % 60, at % 60, at),
    dt.timedelta: lambda salt, at: dt.timedelta(days=salt + 1, seconds=at),
    UUID: lambda salt, at: UUID(int=(salt + 1 << 64) + at),
}


def probe(kind: type, salt: int, at: int) -> Any:
    """A value that no other probe equals.

    Args:
        kind: its type.
        salt: the set, below `SETS`.
        at: its number in the set.
    """
    return _MAKERS[kind](salt, at)


def probes(kinds: Iterable[tuple[type, int]], salt: int) -> list[Any]:
    """A probe for each slot."""
    flat = [kind for kind, count in kinds for _ in range(count)]
    return [probe(kind, salt, at) for at, kind in enumerate(flat)]


def refilled(kinds: Iterable[tuple[type, int]], values: Iterable[Any]) -> list[Any]:
    """The values with what fills up a list replaced by probes: Django would write repeated values
    once only."""
    found = list(values)
    at = 0
    for kind, count in kinds:
        end = at + count
        if count > 1:
            last = found[end - 1]
            while end - 2 >= at and found[end - 2] == last:
                end -= 1
                found[end] = probe(kind, SETS - 1, end)
        at += count
    return found
