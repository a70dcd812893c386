"""Competitors by turns: A B C, A B C, ... in one run, each result checked after its time was
taken."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks import works
from benchmarks.competitors.base import Client, Competitor, NotOffered
from benchmarks.works import Work

# Seconds that one turn may take; who is stuck is out, and the run goes on.
LONGEST_TURN = 60.0


@dataclass
class Series:
    """What was measured of one work with one number of tasks.

    Attributes:
        times: microseconds per operation by competitor, one for each round. Groups that could not
            be connected at the same time have a series each.
        absent: why a competitor has no times.
    """

    work: str
    tasks: int
    times: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: how often each competitor has its turn, the warm-up round not counted.
        share: the part of each work's operations that is done.
    """

    rounds: int
    share: float = 1.0

    def turn(self, work: Work, tasks: int) -> tuple[int, int]:
        """How many operations a turn has, and how many tasks: each has as many as any other, and
        one at least. Where only a share is done there may be fewer tasks than were asked for."""
        wanted = max(1, round(work.operations * self.share))
        if self.share < 1:
            tasks = min(tasks, wanted)
        return max(1, round(wanted / tasks)) * tasks, tasks


def groups(pools: Sequence[str], room: int, size: int) -> Iterator[list[int]]:
    """The competitors that can be connected at the same time, by their place, the unit in each.

    Args:
        pools: the pool of each competitor, the unit first.
        room: connections that the server still takes.
        size: connections of each pool.
    """
    group, open_pools = [0], {pools[0]}
    for place, pool in enumerate(pools[1:], 1):
        more = open_pools | {pool}
        # Two at the least: with less room than that nothing can be compared.
        if len(more) * size > room and len(more) > len(open_pools) > 1:
            yield group
            group, more = [0], {pools[0], pool}
        group.append(place)
        open_pools = more
    yield group


async def measure(
    competitors: Sequence[Competitor],
    chosen: Sequence[Work],
    tasks: Sequence[int],
    plan: Plan,
    database: works.Written | None,
    say: Callable[[str], None],
) -> list[Series]:
    """Measure these competitors, which are connected at the same time.

    Args:
        competitors: the unit first.
        chosen: the works.
        tasks: numbers of tasks at the same time.
        plan: how much.
        database: what is written to is filled and looked at through it; None if all is read only.
        say: is told of the progress.
    """
    found = []
    async with AsyncExitStack() as everything:
        absent = {}
        ready = []
        for competitor in competitors:
            try:
                await competitor.open()
            except Exception as error:
                absent[competitor.name] = f"cannot be opened: {_describe(error)}"
                say(f"{competitor.title} {absent[competitor.name]}")
                await _close(competitor)
            else:
                everything.push_async_callback(_close, competitor)
                ready.append(competitor)
        # What is there by now stays, and need not be looked through in each turn.
        gc.collect()
        gc.freeze()
        everything.callback(gc.unfreeze)
        for count in tasks:
            for work in chosen:
                say(f"{work.title}, {count} tasks")
                series = Series(work.name, count, absent=dict(absent))
                await _rounds(ready, work, series, plan, database)
                for name, reason in series.absent.items():
                    if name not in absent:
                        say(f"  {name}: {reason}")
                found.append(series)
    return found


async def _rounds(
    competitors: Sequence[Competitor],
    work: Work,
    series: Series,
    plan: Plan,
    database: works.Written | None,
) -> None:
    operations, tasks = plan.turn(work, series.tasks)
    for turn in range(plan.rounds + 1):
        for competitor in competitors:
            if competitor.name in series.absent:
                continue
            try:
                async with asyncio.timeout(LONGEST_TURN):
                    spent = await take_turn(competitor, work, operations, tasks, database)
            except NotOffered as error:
                series.absent[competitor.name] = str(error) or "not offered"
            except Exception as error:
                series.absent[competitor.name] = _describe(error)
                series.times.pop(competitor.name, None)
            else:
                if turn:
                    series.times.setdefault(competitor.name, []).append(spent / operations * 1e6)


async def take_turn(
    competitor: Competitor, work: Work, operations: int, tasks: int, database: works.Written | None
) -> float:
    """One turn of one competitor; returns the seconds it took.

    Raises:
        WrongResult: a result, or what is in the table afterwards, is not what it must be.
        NotOffered: the library has no way to do the work.
    """
    if work.writes and database:
        database.refill()
    results: list[tuple[Client, int, object]] = []

    async def share(numbers: range) -> None:
        async with competitor.client() as client:
            operation: Callable[[int], Awaitable[object]] = getattr(client, work.name)
            for number in numbers:
                results.append((client, number, await operation(number)))

    gc.collect()
    competitor.enter()
    try:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for first in range(tasks):
                group.create_task(share(range(first, operations, tasks)))
        spent = time.perf_counter() - started
    except* (NotOffered, Exception) as errors:
        raise _first(errors) from None
    finally:
        competitor.leave()
    for client, number, result in results:
        work.check(client, number, result)
    if work.writes and database:
        works.check_written(work, operations, database.written())
    return spent


def _first(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _close(competitor: Competitor) -> None:
    try:
        await competitor.close()
    except Exception as error:
        print(f"{competitor.title} cannot be closed: {_describe(error)}")


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
