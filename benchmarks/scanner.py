"""Milliseconds of CPU per megabyte of SQL text, for texts of all kinds, by dialect and question.

    python benchmarks/scanner.py [kilobytes]

The bound is 10 ms per 100 kB for what is asked before a statement is sent.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from django_asyncsession.exceptions import MultipleStatements
from django_asyncsession.scanner import Scanner, scanner, stripped
from django_asyncsession.statements import (
    change_in,
    check_one_statement,
    check_savepoint_name,
    controls_transaction,
    is_query,
    locks,
)

# Of so many times the best counts.
TIMES = 3

TEXTS = {
    "words": "select a, b from t where c = %s and d < 12 ",
    "in list": "%s, ",
    "literals with semicolons": "'a;b', ",
    "dashes": "-" * 72 + "\n",
    "comments": "/* */ ",
    "hashes": "# ",
    "quotes": "'",
    "dollars": "$a$ $a$ ",
    "nested comments": "/*/*/*/**/*/*/*/",
    "open comments": "/*",
    "open tag": "$b$ $a$ ",
    "deep comments": "/*" * 200 + "*/" * 200 + " ",
    "comments in comments": "/*" * 8 + "/**/" * 100 + "*/" * 8,
    "statements": "a; ",
    "blocks": "create procedure p() begin a; b; end; ",
    "versions": "/*! a */ /*!999999 b */ ",
}


def checked(text: str, vendor: str) -> None:
    """What `execute` asks first."""
    with contextlib.suppress(MultipleStatements):
        check_one_statement(text, vendor)


def savepoint(name: str) -> None:
    """What `begin_nested` asks of a name."""
    with contextlib.suppress(ValueError):
        check_savepoint_name(name)


def asked_by_asyncsql(text: str, reader: Scanner) -> None:
    """What the command asks of a statement."""
    controls_transaction(text, reader)
    is_query(text, reader)


QUESTIONS: dict[str, Callable[[str, str], object]] = {
    "one statement": checked,
    "change": lambda text, vendor: change_in(text, scanner(vendor)),
    "locks": locks,
    "split": lambda text, vendor: scanner(vendor).split(text),
    "normalise": lambda text, vendor: scanner(vendor).normalise(text),
    "words": lambda text, vendor: scanner(vendor).words(text),
    "first word": lambda text, vendor: scanner(vendor).first_word(text),
    "DDL": lambda text, vendor: stripped(text, scanner(vendor)),
    "savepoint": lambda text, vendor: savepoint(text),
    "asyncsql": lambda text, vendor: asked_by_asyncsql(text, scanner(vendor)),
}


def seconds(ask: Callable[[str, str], object], text: str, vendor: str) -> float:
    """Seconds of CPU that a question takes."""
    begun = time.process_time()
    ask(text, vendor)
    return time.process_time() - begun


def main() -> None:
    """Measure each text on each database."""
    size = 1000 * int(sys.argv[1] if len(sys.argv) > 1 else 1000)
    print(f"{'':38}", *(f"{question:>13}" for question in QUESTIONS))
    for vendor in ("postgresql", "mysql", "sqlite"):
        for name, part in TEXTS.items():
            text = "select 1 ; " + part * (size // len(part)) + " ';'"
            times = []
            for ask in QUESTIONS.values():
                times.append(min(seconds(ask, text, vendor) for _ in range(TIMES)) * 1e9 / size)
            print(f"{vendor:12}{name:26}", *(f"{ms:13.1f}" for ms in times))


if __name__ == "__main__":
    main()
