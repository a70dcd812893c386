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
from django_asyncsession.scanner import scanner
from django_asyncsession.statements import change_in, check_one_statement

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
    "statements": "a; ",
}


def checked(text: str, vendor: str) -> None:
    """What `execute` asks first."""
    with contextlib.suppress(MultipleStatements):
        check_one_statement(text, vendor)


QUESTIONS: dict[str, Callable[[str, str], object]] = {
    "one statement": checked,
    "change": lambda text, vendor: change_in(text, scanner(vendor)),
    "split": lambda text, vendor: scanner(vendor).split(text),
    "normalise": lambda text, vendor: scanner(vendor).normalise(text),
}


def main() -> None:
    """Measure each text on each database."""
    size = 1000 * int(sys.argv[1] if len(sys.argv) > 1 else 1000)
    print(f"{'':38}", *(f"{question:>14}" for question in QUESTIONS))
    for vendor in ("postgresql", "mysql", "sqlite"):
        for name, part in TEXTS.items():
            text = "select 1 ; " + part * (size // len(part)) + " ';'"
            times = []
            for ask in QUESTIONS.values():
                begun = time.process_time()
                ask(text, vendor)
                times.append((time.process_time() - begun) * 1e9 / size)
            print(f"{vendor:12}{name:26}", *(f"{ms:14.1f}" for ms in times))


if __name__ == "__main__":
    main()
