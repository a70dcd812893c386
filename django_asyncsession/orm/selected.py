"""What a SELECT is asked for: its columns with their names, their order, and how many rows."""

from __future__ import annotations

from typing import Any

from django.db.models.expressions import OrderBy

from django_asyncsession.results import Row

from .columns import Column


def _whole(what: str, count: int | None) -> int | None:
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and count >= 0):
        return count
    raise ValueError(f"{what} cannot be {count!r}; it is a whole number of rows, 0 or more")


def _descending(column: Any) -> Any:
    if isinstance(column, str):
        return column.removeprefix("-") if column.startswith("-") else f"-{column}"
    return column if isinstance(column, OrderBy) else column.desc()


def _split_at_annotate(steps: Any) -> tuple[Any, Any]:
    at = next((i for i, step in enumerate(steps) if step[0] == "annotate"), len(steps))
    return steps[:at], steps[at:]


def _plain(column: Any) -> Any:
    """A name where Django's `values` takes one, else the expression."""
    if isinstance(column, Column) and not column._splits:
        return column._path
    return column


def _named(
    columns: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and, under a name each, expressions."""
    names: list[str] = []
    computed = dict(named)
    for at, column in enumerate(map(_plain, columns)):
        if isinstance(column, str):
            names.append(column)
        else:
            computed[_name_of(column, at)] = column
    return tuple(names), computed


def _names(columns: tuple[Any, ...], named: dict[str, Any]) -> tuple[str, ...]:
    plain = [_plain(c) for c in columns]
    given = [c if isinstance(c, str) else _name_of(c, i) for i, c in enumerate(plain)]
    return (*given, *named)


def _name_of(expression: Any, at: int) -> str:
    return str(getattr(expression, "default_alias", None) or f"column{at + 1}")


def _first_value(row: Any) -> Any:
    if isinstance(row, dict):
        return next(iter(row.values()))
    return row[0] if isinstance(row, (Row, tuple)) else row
