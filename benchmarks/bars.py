"""What must hold, as data, and whether a run kept it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from benchmarks.results import MEAN, Section
from benchmarks.works import WORKS


class Verdict(StrEnum):
    """What a run says of a bar."""

    HELD = "held"
    MISSED = "missed"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Bar:
    """One promise: the ratio of a competitor to another at one work.

    Attributes:
        competitor: who promises.
        work: its name, or MEAN.
        limit: at most; of `is_least`, at least.
        base: whom it is compared with.
        section: the kind of comparison.
        tasks: at the same time.
    """

    competitor: str
    work: str
    limit: float
    base: str = "psycopg"
    section: str = "postgresql"
    tasks: int = 20
    is_least: bool = False


def _of(competitor: str, **limits: float) -> tuple[Bar, ...]:
    return tuple(Bar(competitor, work, limit) for work, limit in limits.items())


def _http(competitor: str, work: str, base: str, least: float) -> Bar:
    return Bar(competitor, work, least, base, "http", is_least=True)


BARS: tuple[Bar, ...] = (
    *_of("session", get=0.6, raw=0.6, count=0.6, filter=1.2, related=1.6, prefetch=2.5),
    *_of("session", values=1.2, insert=0.65, update=0.6, transaction=0.65, insert_many=2.3),
    Bar("session", MEAN, 0.95),
    *_of("native", get=1.2, filter=1.8, related=2.3),
    *_of("run_sync", get=1.5, filter=1.9, related=2.3),
    # Of Django's own aget(), in one thread: faster than in twenty.
    Bar("session", "get", 0.75, base="django_one"),
    Bar("transaction", "get", 1.0, base="django_one"),
    _http("session", "get", "django", 3.0),
    _http("session", "get", "starlette", 1.0),
    _http("session", "get", "fastapi", 1.0),
    _http("session_usual", "get", "django_usual", 2.5),
    Bar("session", "get", 1.6, base="asyncmy", section="mariadb"),
    Bar("session", "get", 3.0, base="hop", section="sqlite"),
    # Megabytes.
    Bar("session", "stream", 20.0, base="", section="memory", tasks=1),
)


@dataclass(frozen=True)
class Result:
    """What a run says of one bar."""

    bar: Bar
    measured: float | None
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self.bar) | {"measured": self.measured, "verdict": str(self.verdict)}


def judge(sections: Sequence[Section], bars: Sequence[Bar] = BARS) -> list[Result]:
    """Compare each bar with what was measured."""
    return [_judged(bar, sections) for bar in bars]


def _judged(bar: Bar, sections: Sequence[Section]) -> Result:
    found = next((s for s in sections if (s.name, s.tasks) == (bar.section, bar.tasks)), None)
    measured = None
    if found is not None and bar.work == MEAN and found.works.keys() != WORKS.keys():
        # The promise is of all works.
        found = None
    if found is not None and bar.base:
        measured = found.ratio(bar.work, bar.competitor, bar.base)
    elif found is not None:
        figure = found.figures.get(bar.work, {}).get(bar.competitor)
        measured = figure.median if figure else None
    if measured is None:
        return Result(bar, None, Verdict.NOT_MEASURED)
    is_held = measured >= bar.limit if bar.is_least else measured <= bar.limit
    return Result(bar, measured, Verdict.HELD if is_held else Verdict.MISSED)
