"""The options of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import competitors
from benchmarks.rounds import Plan
from benchmarks.web import APPLICATIONS
from benchmarks.works import WORKS

SECTIONS = ("postgresql", "http", "memory", "mariadb", "sqlite")
QUICK_SECTIONS = ("postgresql", "http", "mariadb", "sqlite")
ROUNDS, QUICK_ROUNDS = 5, 2
# uvloop is not made for Windows.
LOOP = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
QUICK_SHARE = 0.05


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        sections: kinds of comparisons.
        competitors: names, of PostgreSQL.
        applications: names, of HTTP.
        works: names, of PostgreSQL.
        tasks: numbers of tasks at the same time, of PostgreSQL.
        connections: to PostgreSQL, at most, besides one.
        plan: rounds, and how much is done in each.
        loop: "uvloop" or "asyncio".
        seconds: how long one turn of HTTP takes.
        json: file for the figures.
        plots: folder for the plots.
        check: whether a missed bar is an error.
    """

    sections: tuple[str, ...]
    competitors: tuple[str, ...]
    applications: tuple[str, ...]
    works: tuple[str, ...]
    tasks: tuple[int, ...]
    connections: int
    plan: Plan
    loop: str
    seconds: float
    json: Path | None
    plots: Path | None
    check: bool


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of the command line."""
    given = _parser().parse_args(arguments)
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    names = given.competitors or list(competitors.POSTGRESQL)
    return Options(
        sections=tuple(given.sections or (QUICK_SECTIONS if given.quick else SECTIONS)),
        # The unit is always there, and first.
        competitors=(competitors.UNIT, *[name for name in names if name != competitors.UNIT]),
        # The unit is first, where it is wanted.
        applications=tuple(n for n in APPLICATIONS if n in (given.applications or APPLICATIONS)),
        works=tuple(given.works or WORKS),
        tasks=tuple(given.tasks),
        connections=given.connections,
        plan=Plan(rounds, QUICK_SHARE if given.quick else 1.0),
        loop=given.loop,
        seconds=0.25 if given.quick else 1.0,
        json=given.json,
        plots=given.plots,
        check=given.check,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="This package beside the driver under it and other ORMs, in alternating rounds "
        "of one run, on the servers of the tests.",
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        type=_one_of(SECTIONS),
        help=f"of {', '.join(SECTIONS)}; all if none is given, but memory with --quick",
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, metavar="WORK", help=", ".join(WORKS))
    parser.add_argument(
        "--competitors",
        nargs="+",
        choices=competitors.POSTGRESQL,
        metavar="NAME",
        help=f"on PostgreSQL: {', '.join(competitors.POSTGRESQL)}",
    )
    parser.add_argument(
        "--applications",
        nargs="+",
        choices=APPLICATIONS,
        metavar="NAME",
        help=f"of HTTP: {', '.join(APPLICATIONS)}",
    )
    parser.add_argument(
        "--tasks", nargs="+", type=_positive, default=[20], metavar="N", help="at the same time; 20"
    )
    parser.add_argument(
        "--connections",
        type=_positive,
        default=200,
        metavar="N",
        help="to PostgreSQL, at most; competitors are compared in groups that need no more",
    )
    parser.add_argument("--rounds", type=_positive, help=f"{ROUNDS}, besides one to warm up")
    parser.add_argument("--quick", action="store_true", help="ends in a minute; says little")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default=LOOP)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots as SVG")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not one at least")
    return number


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def section(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return section
