"""Parameters as PostgreSQL's text format has them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any, Final
from uuid import UUID

from django.db.models import lookups

from .fallback import Fallback
from .operands import PATTERNS

Encode = Callable[[Any], bytes | None]


def _text(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise Fallback("nul") from None


def _iso(value: dt.datetime | dt.date | dt.time) -> bytes:
    return value.isoformat().encode()


def _plain(value: Any) -> bytes:
    return str(value).encode()


def _repr(value: float) -> bytes:
    return repr(value).encode()


_TEXTS_OF: Final[Mapping[type, Encode]] = {
    int: lambda value: b"%d" % value,
    str: _text,
    float: _repr,
    Decimal: _plain,
    dt.datetime: _iso,
    dt.date: _iso,
    dt.time: _iso,
    UUID: _plain,
}


def escaped(value: str) -> str:
    """A text as a pattern that matches nothing but it."""
    return value.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")


def encoder(lookup: Any, kind: type, ops: Any) -> Encode | None:
    """What encodes the values of a lookup; None when their text is not known.

    Args:
        ops: Django's operations of the database, which say how it escapes.
    """
    if type(lookup) in PATTERNS:
        return _escaping(lookup.param_pattern, ops.prep_for_like_query)
    if type(lookup) is lookups.IExact:
        return _escaping("%s", ops.prep_for_iexact_query)
    return _TEXTS_OF.get(kind)


def _escaping(pattern: str, function: Callable[[str], str]) -> Encode | None:
    escape = _escape(function)
    return None if escape is None else partial(_pattern, pattern, escape)


def _pattern(pattern: str, escape: Callable[[str], str], value: str) -> bytes:
    return _text(pattern % escape(value))


def _escape(function: Callable[[str], str]) -> Callable[[str], str] | None:
    """What does the same as a function of Django's, if it is known."""
    sample = "a%_\\\\b'\""
    return next((known for known in (escaped, str) if known(sample) == function(sample)), None)


def constant_text(value: Any) -> Encode | None:
    """What gives the text of a constant; None when it is not known."""
    if value is None:
        return lambda _: None
    if type(value) is bool:
        text = b"t" if value else b"f"
        return lambda _: text
    if isinstance(value, int) or type(value) is str:
        text = b"%d" % value if isinstance(value, int) else value.encode()
        return lambda _: text
    return None
