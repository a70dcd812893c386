"""Milliseconds of CPU per megabyte of SQL text, for texts of all kinds, by dialect and question.

    python benchmarks/scanner.py [kilobytes]

The aim is 10 ms per 100 kB for what is asked before a statement is sent: the first three, and
the first word and those that open it.
No question may take more
than BOUND for any text, or the program fails, as a test does: what is not linear takes minutes.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from django_asyncsession.backends.base import sets_something
from django_asyncsession.exceptions import MultipleStatements
from django_asyncsession.scanner import Scanner, scanner
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
# Milliseconds per megabyte; several times what a busy machine takes.
BOUND = 2000
VENDORS = ("postgresql", "mysql", "sqlite")

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
    "blanks": " \n\t",
    "half a lock": "for  no  key ",
    "versions": "/*! a */ /*!999999 b */ ",
}

# What opens, closes or hides something; mixed at random, a few kinds in each text.
PIECES = ["'", "''", '"', "`", "\\", "E'", "$$", "$a$", "$b$", "[", "]", "(", ")", ";", "a ", "é"]
PIECES += ["--", "-- ", "#", "\n", "/*", "*/", "/*!", "/*!50000 ", "/*!999999 ", "/*M!", "begin "]
PIECES += ["end ", "case ", "atomic ", "create function f() ", "1E'", "U&'", "q''", "%s", ", "]
PIECES += ["select ", "from ", "for ", "update", "no key ", "create ", "rollback ", "  ", "\t"]
MIXES = [f"mix {number}" for number in range(1, 9)]


def text_of(name: str, size: int) -> str:
    """A text of about so many characters, of one of the kinds of TEXTS or MIXES."""
    if name in TEXTS:
        body = TEXTS[name] * (size // len(TEXTS[name]))
    else:
        chance = random.Random(name)
        kinds = chance.sample(PIECES, chance.randint(2, 12))
        body = "".join(chance.choices(kinds, k=size // 3))[:size]
    return "select 1 ; " + body + " ';'"


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
    "opening": lambda text, vendor: scanner(vendor).opening(text, 4),
    "savepoint": lambda text, vendor: savepoint(text),
    "state": lambda text, vendor: sets_something(text),
    "asyncsql": lambda text, vendor: asked_by_asyncsql(text, scanner(vendor)),
}


def seconds(ask: Callable[[str, str], object], text: str, vendor: str) -> float:
    """Seconds of CPU that a question takes."""
    begun = time.process_time()
    ask(text, vendor)
    return time.process_time() - begun


def milliseconds(text: str, vendor: str, times: int = TIMES) -> dict[str, float]:
    """What each question takes per megabyte of the text."""
    return {
        question: min(seconds(ask, text, vendor) for _ in range(times)) * 1e9 / len(text)
        for question, ask in QUESTIONS.items()
    }


def main() -> None:
    """Measure each text on each database."""
    size = 1000 * int(sys.argv[1] if len(sys.argv) > 1 else 1000)
    print(f"{'':38}", *(f"{question:>13}" for question in QUESTIONS))
    worst = 0.0
    for vendor in VENDORS:
        for name in (*TEXTS, *MIXES):
            times = milliseconds(text_of(name, size), vendor).values()
            print(f"{vendor:12}{name:26}", *(f"{ms:13.1f}" for ms in times))
            worst = max(worst, *times)
    if worst > BOUND:
        sys.exit(f"{worst:.0f} ms per MB are more than {BOUND}")


if __name__ == "__main__":
    main()
