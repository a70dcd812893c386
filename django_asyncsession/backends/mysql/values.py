"""Dates and times that MySQL keeps and Python has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import MySQLdb
from asyncmy import converters
from django.db.backends.utils import typecast_time


def time_or_text(text: str) -> Any:
    """The time of day, or the text itself when it is below zero, or a day and more."""
    try:
        return typecast_time(text)
    except ValueError:
        return text


# These give text when the value is none of their type.
KINDS: dict[Callable[..., Any], str] = {
    converters.convert_date: "date",
    converters.convert_datetime: "date",
    time_or_text: "time of day",
}


def check_readable(result: Any, rows: Iterable[Sequence[Any]], alias: str) -> None:
    """Refuse rows with a date or a time that there is not in Python.

    Raises:
        DataError: naming the column and the value.
    """
    for at, (_, _, converter) in enumerate(result.converters):
        if converter in KINDS and str in set(map(type, map(itemgetter(at), rows))):
            value = next(row[at] for row in rows if type(row[at]) is str)
            raise MySQLdb.DataError(0, _explanation(result.fields[at], value, converter, alias))


def _explanation(field: Any, value: str, converter: Callable[..., Any], alias: str) -> str:
    column = field.org_name or field.name
    table = f" of table {field.org_table!r}" if field.org_table else ""
    return (
        f"column {column!r}{table} holds {value!r}, which is no {KINDS[converter]} in Python; "
        f"change the value, select CAST({column} AS CHAR), or give OPTIONS['conv'] of {alias!r} a "
        "function for its type"
    )
