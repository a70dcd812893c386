"""One run: the sections that were asked for, one after the other."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from benchmarks import competitors, results, rounds
from benchmarks.bars import Result
from benchmarks.competitors.base import Competitor
from benchmarks.database import Database
from benchmarks.options import Options
from benchmarks.results import Section
from benchmarks.settings import POOL
from benchmarks.works import WORKS

T = TypeVar("T")
Say = Callable[[str], None]
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
    on_postgresql = {"postgresql": _postgresql}
    if any(name in on_postgresql for name in options.sections):
        with Database() as database:
            for name in options.sections:
                if name in on_postgresql:
                    yield from on_postgresql[name](options, database, say)


def _postgresql(options: Options, database: Database, say: Say) -> Iterator[Section]:
    chosen = {name: competitors.load(competitors.POSTGRESQL[name]) for name in options.competitors}
    titles = {name: competitor.title for name, competitor in chosen.items()}
    works = [WORKS[name] for name in options.works]
    absent = {name: why for name, kind in chosen.items() if (why := kind.missing())}
    present = [kind for name, kind in chosen.items() if name not in absent]
    measured = []
    for group in rounds.groups(present, database.room(), POOL):
        ready = [present[place]() for place in group]
        measuring = rounds.measure(ready, works, options.tasks, options.plan, database, say)
        measured += in_loop(options.loop, measuring)
    for series in measured:
        series.absent.update(absent)
    named = {work.name: work.title for work in works}
    yield from results.sections_of("postgresql", competitors.UNIT, titles, named, measured)


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
    versions = {}
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
