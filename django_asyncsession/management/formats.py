"""Rows as text: table, JSON, CSV or Markdown, written a chunk at a time.

What a database holds is data, whatever it looks like: control characters are escaped, so that no
value moves the cursor of a terminal, and a CSV cell that a spreadsheet would take for a formula is
defused.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, Final, Protocol

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Values = Sequence[Any]

NULL: Final = "NULL"
# Spreadsheets run a cell that starts with one of these.
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
# DEL and C1, line separators, what reverses the direction of text, lone surrogates.
_INVISIBLE: Final = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL: Final = re.compile(f"[\x00-\x1f{_INVISIBLE}]")
_CONTROL_IN_FILE: Final = re.compile(f"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f{_INVISIBLE}]")
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NARROWEST: Final = 4
# Between two columns of a table.
_GAP: Final = 2


class Format(Protocol):
    """Turns rows into text: `start` once, `rows` any number of times, `end` once."""

    def start(self, columns: Sequence[str]) -> str:
        """What comes before the first row."""

    def rows(self, rows: Sequence[Values]) -> str:
        """The text of some rows."""

    def end(self) -> str:
        """What comes after the last row."""


def escape(text: str) -> str:
    """The text on one line, with everything that acts on a terminal made visible."""
    return _CONTROL.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def plain(value: Any) -> str:
    """A value as text, not escaped yet."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"\\x{bytes(value).hex()}"
    if isinstance(value, dict | list):
        return json.dumps(value, default=_json_default, ensure_ascii=False)
    return str(value)


def cell(value: Any) -> str:
    """A value as escaped text; None is NULL."""
    return NULL if value is None else escape(plain(value))


def unique_names(columns: Sequence[str]) -> list[str]:
    """Names of the columns; one that came up before gets a number, as in id, id_2."""
    names: list[str] = []
    for column in columns:
        name, number = column, 1
        while name in names:
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names


class JSONFormat:
    """An array of objects, one object on a line."""

    def start(self, columns: Sequence[str]) -> str:
        """Open the array."""
        self._names = unique_names(columns)
        self._before = "\n"
        return "["

    def rows(self, rows: Sequence[Values]) -> str:
        """One object for each row."""
        parts: list[str] = []
        for values in rows:
            parts += (self._before, self._object(values))
            self._before = ",\n"
        return "".join(parts)

    def end(self) -> str:
        """Close the array."""
        return "\n]\n" if self._before != "\n" else "]\n"

    def _object(self, values: Values) -> str:
        data = {name: _json_value(v) for name, v in zip(self._names, values, strict=True)}
        text = json.dumps(data, default=_json_default, ensure_ascii=False)
        # All that is left to escape stands inside strings, where \u is what JSON has for it.
        return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _json_default(value: Any) -> str:
    # To the microsecond; Django's encoder cuts to milliseconds.
    return value.isoformat() if isinstance(value, date | time) else plain(value)


def _json_value(value: Any) -> Any:
    # JSON has no such numbers.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class CSVFormat:
    """Comma-separated values with a header line; NULL is an empty cell."""

    def start(self, columns: Sequence[str]) -> str:
        """The header."""
        return self.rows([columns])

    def rows(self, rows: Sequence[Values]) -> str:
        """One line for each row; a line break in a value stays one, in quotes."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
        return text.getvalue()

    def end(self) -> str:
        """Nothing."""
        return ""


def csv_cell(value: Any) -> str:
    """A value as a cell that no spreadsheet takes for a formula and no terminal for a command."""
    if value is None:
        return ""
    text = plain(value)
    if text.startswith(FORMULA_STARTS) and not isinstance(value, int | float | Decimal):
        text = f"'{text}"
    return _CONTROL_IN_FILE.sub(_visible, text)


class MarkdownFormat:
    """A table in Markdown."""

    def start(self, columns: Sequence[str]) -> str:
        """The header and the line under it."""
        return self.rows([columns]) + "|" + " --- |" * len(columns) + "\n"

    def rows(self, rows: Sequence[Values]) -> str:
        """One line for each row."""
        return "".join(f"| {' | '.join(map(markdown_cell, row))} |\n" for row in rows)

    def end(self) -> str:
        """Nothing."""
        return ""


def markdown_cell(value: Any) -> str:
    """A value as a cell; what means something in Markdown or HTML is escaped."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", cell(value))


class TableFormat:
    """A table for people.

    The first chunk of rows decides how wide the columns are; after that only numbers, which would
    be hard to read on two lines, make theirs wider.

    Args:
        width: characters in a line of the terminal; None, for a file: columns as wide as they want.
        colour: whether the header and NULL are set off.
    """

    def __init__(self, *, width: int | None = None, colour: bool = False) -> None:
        self._width, self._colour = width, colour
        self._widths: list[int] = []
        self._is_first = True

    def start(self, columns: Sequence[str]) -> str:
        """Nothing yet: the widths are not known."""
        self._columns = [escape(column) for column in columns]
        self._numbers = [False] * len(columns)
        return ""

    def rows(self, rows: Sequence[Values]) -> str:
        """The rows, with the header before the first ones."""
        if self._is_first:
            self._numbers = [
                _are_numbers(row[at] for row in rows) for at in range(len(self._columns))
            ]
            self._widths = self._widest([self._columns], rows)
            if self._width:
                self._widths = fit(self._widths, self._width)
        else:
            wider = self._widest([], rows)
            for at in (at for at, numbers in enumerate(self._numbers) if numbers):
                self._widths[at] = max(self._widths[at], wider[at])
        table = self._table(rows, show_header=self._is_first)
        self._is_first = False
        return self._render(table)

    def end(self) -> str:
        """The header, when there was no row to come after it."""
        return self.rows([]) if self._is_first else ""

    def _widest(self, headers: Sequence[Values], rows: Sequence[Values]) -> list[int]:
        widths = [1] * len(self._columns)
        for row in (*headers, *rows):
            for at, value in enumerate(row):
                widths[at] = max(widths[at], cell_len(cell(value)))
        return widths

    def _table(self, rows: Sequence[Values], show_header: bool) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
            show_header=show_header,
        )
        for column, width, numbers in zip(self._columns, self._widths, self._numbers, strict=True):
            table.add_column(
                Text(column),
                width=width,
                overflow="fold",
                justify="right" if numbers else "left",
                header_style="bold",
            )
        for row in rows:
            table.add_row(*map(self._cell, row))
        return table

    def _render(self, table: Table) -> str:
        text = io.StringIO()
        console = Console(
            file=text,
            # As wide as the table: rich would squeeze it differently for each chunk.
            width=sum(self._widths) + _GAP * len(self._widths),
            force_terminal=self._colour,
            no_color=not self._colour,
            legacy_windows=False,
        )
        console.print(table)
        return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())

    def _cell(self, value: Any) -> Text:
        return Text(cell(value), style="dim" if value is None else "")


def _are_numbers(values: Iterable[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(
        isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in given
    )


def fit(widths: Sequence[int], available: int) -> list[int]:
    """Widths of columns that fit into a line: the widest give way, none below four characters."""
    fitted = [min(width, max(available, _NARROWEST)) for width in widths]
    excess = sum(fitted) + _GAP * (len(fitted) - 1) - available
    while excess > 0 and max(fitted) > _NARROWEST:
        fitted[fitted.index(max(fitted))] -= 1
        excess -= 1
    return fitted


def make_format(name: str, *, width: int | None = None, colour: bool = False) -> Format:
    """The format with this name; `width` and `colour` are for a table on a terminal."""
    formats: dict[str, type[Format]] = {
        "json": JSONFormat,
        "csv": CSVFormat,
        "markdown": MarkdownFormat,
    }
    return formats[name]() if name in formats else TableFormat(width=width, colour=colour)
