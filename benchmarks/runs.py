"""One run: the sections that were asked for, one after the other."""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from benchmarks import competitors, memory, others, results, rounds
from benchmarks.bars import Result
from benchmarks.competitors.base import Competitor
from benchmarks.database import Database
from benchmarks.options import Options
from benchmarks.results import Figure, Section
from benchmarks.settings import POOL
from benchmarks.web import APPLICATIONS, bodies, served
from benchmarks.works import WORKS, Work

T = TypeVar("T")
Say = Callable[[str], None]
# At the same time, where no option says so.
TASKS = 20
# Whose versions are written into the JSON file.
PACKAGES = (
    "django-asyncsession",
    "django",
    "psycopg",
    "asyncpg",
    "django-async-backend",
    "sqlalchemy",
    "tortoise-orm",
    "piccolo",
    "asyncmy",
    "aiosqlite",
    "uvicorn",
    "uvloop",
    "starlette",
    "fastapi",
)


def run(options: Options, say: Say) -> Iterator[Section]:
    """Measure each section, and give it as soon as it is there."""
    if any(name in ON_POSTGRESQL for name in options.sections):
        with Database() as database:
            for name in options.sections:
                if name in ON_POSTGRESQL:
                    for section in ON_POSTGRESQL[name](options, database, say):
                        section.server = f"PostgreSQL {database.version()}"
                        yield section
    for name in options.sections:
        if name in ELSEWHERE:
            yield from _elsewhere(name, options, say)


def _postgresql(options: Options, database: Database, say: Say) -> Iterator[Section]:
    chosen = {name: competitors.load(competitors.POSTGRESQL[name]) for name in options.competitors}
    works = [WORKS[name] for name in options.works]
    measured, titles = _measure(chosen, works, options.tasks, options, database, say)
    named = {work.name: work.title for work in works}
    yield from results.sections_of("postgresql", competitors.UNIT, titles, named, measured)


def _measure(
    chosen: Mapping[str, type[Competitor]],
    works: Sequence[Work],
    tasks: Sequence[int],
    options: Options,
    database: Database | None,
    say: Say,
) -> tuple[list[rounds.Series], dict[str, str]]:
    """The competitors in as many groups as the server has room for; their titles."""
    absent = {name: why for name, kind in chosen.items() if (why := kind.missing())}
    present = [kind for name, kind in chosen.items() if name not in absent]
    room = min(database.room(), options.connections) if database else POOL * len(present)
    measured = []
    groups = list(rounds.groups([kind.pool for kind in present], room, POOL))
    for group in groups:
        ready = [present[place]() for place in group]
        if len(groups) > 1:
            say(f"room for {room} connections: {', '.join(each.name for each in ready)}")
        measured += in_loop(
            options.loop, rounds.measure(ready, works, tasks, options.plan, database, say)
        )
    for series in measured:
        series.absent.update(absent)
    return measured, {name: kind.title for name, kind in chosen.items()}


def _elsewhere(name: str, options: Options, say: Say) -> Iterator[Section]:
    found, unit, make = ELSEWHERE[name]
    chosen = {each: competitors.load(where) for each, where in found.items()}
    get = WORKS["get"]
    try:
        with make():
            say(name)
            measured, titles = _measure(chosen, [get], [TASKS], options, None, say)
    except LookupError as error:
        say(f"{name}: {error}")
        return
    yield from results.sections_of(name, unit, titles, {get.name: get.title}, measured)


def _http(options: Options, database: Database, say: Say) -> Iterator[Section]:
    absent = {name: why for name in options.applications if (why := served.missing(name))}
    chosen = [name for name in options.applications if name not in absent]
    measured = []
    room = min(database.room(), options.connections)
    for group in rounds.groups(chosen, room, POOL):
        here = [chosen[place] for place in group]
        measured += served.measure(here, options.plan.rounds, options.seconds, options.loop, say)
    titles = {name: APPLICATIONS[name].title for name in options.applications}
    for series in measured:
        series.absent.update(absent)
    for section in results.sections_of("http", "django", titles, bodies.TITLES, measured):
        section.is_speed, section.unit_of_measure = True, "requests/s"
        yield section


def _memory(options: Options, database: Database, say: Say) -> Iterator[Section]:
    kinds = {name: competitors.load(competitors.POSTGRESQL[name]) for name in options.competitors}
    present = [
        name for name, kind in kinds.items() if not kind.missing() and name not in memory.LEFT_OUT
    ]
    database.refill(memory.STREAMED)
    found, absent = memory.measure_all(present, 1, say)
    titles = {name: kind.title for name, kind in kinds.items()}
    section = Section("memory", 1, "", titles, memory.TITLES, unit_of_measure="", absent=absent)
    for work, measured in found.items():
        section.figures[work] = {
            name: Figure(statistics.median(values), None, tuple(values))
            for name, values in measured.items()
        }
    yield section


Measure = Callable[[Options, Database, Say], Iterator[Section]]
ON_POSTGRESQL: dict[str, Measure] = {"postgresql": _postgresql, "http": _http, "memory": _memory}
ELSEWHERE = {
    "mariadb": (competitors.MARIADB, "asyncmy", others.on_mariadb),
    "sqlite": (competitors.SQLITE, "hop", others.on_sqlite),
}


def in_loop(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run it in a loop of its own of this kind."""
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def about(options: Options) -> dict[str, Any]:
    """What was run, where and with which versions."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "loop": options.loop,
        "pool": POOL,
        "rounds": options.plan.rounds,
        "versions": versions,
    }


def save(options: Options, sections: Sequence[Section], judged: Sequence[Result]) -> None:
    """Write the files that were asked for."""
    described: Mapping[str, Any] = about(options)
    if options.json is not None:
        bars = [result.as_dict() for result in judged]
        results.save(options.json, results.to_json(sections, described, bars))
    if options.plots is not None:
        from benchmarks import plots

        plots.save(options.plots, sections, described)
